"""The one scoring code. It is given a model whose backbone is any torch module, and never asks who made it.

SQNR is of what the backbone predicts, call by call, against float on the *same* inputs: the error that one step adds. PSNR
and SSIM are of the pictures that the whole pipeline makes with that backbone from the same noise: what all steps' errors come
to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdiff.evaluation.images import to_pixels
from qdiff.evaluation.metrics import decibels, paired, sqnr_db
from qdiff.models.model import Model, Request
from qdiff.recording.trajectory import Trajectory
from qdiff.stages.compare import accuracy as prompt_accuracy
from qdiff.stages.generate import simulate

BUCKETS = 3
BATCH = 8  # pictures denoised together; a picture does not depend on it


def predictions(model: Model, calls: Trajectory) -> Tensor:
    """Return what the backbone predicts on every call: ``[calls, batch, ...]``, float32."""
    model.backbone.eval()
    with torch.inference_mode():
        answers = [model.family.call(model.backbone, step.inputs).float() for step in calls]
    return torch.stack(answers).clone()


def answers(model: Model, calls: Trajectory, request: Request) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
    """Return predictions ``[calls, batch, ...]``, pictures ``[N, H, W, C]`` uint8, and prompt accuracy where the model
    has one.
    """
    predicted = predictions(model, calls)
    images = simulate(model, model.backbone, request, BATCH)
    right = prompt_accuracy(model, images, list(request.prompts))
    if right is not None:
        right.pop("per_prompt", None)
    return predicted, to_pixels(images), right


def buckets(timesteps: list[float]) -> list[tuple[float, float]]:
    """Return the timestep values, from noise to picture, in :data:`BUCKETS` runs of nearly equal length: (first, last)
    of each.
    """
    ordered = sorted(set(timesteps), reverse=True)
    count = min(BUCKETS, len(ordered))
    cuts = [round(i * len(ordered) / count) for i in range(count + 1)]
    return [(ordered[start], ordered[stop - 1]) for start, stop in zip(cuts, cuts[1:], strict=False)]


def sqnr_by_bucket(timesteps: list[float], reference: Tensor, predicted: Tensor) -> list[dict[str, float]]:
    """Return the mean over the calls of each bucket of the call's SQNR in dB."""
    each = [decibels(sqnr_db(a, b)) for a, b in zip(reference, predicted, strict=True)]
    result = []
    for first, last in buckets(timesteps):
        inside = [value for t, value in zip(timesteps, each, strict=True) if last <= t <= first]
        result.append({"first": first, "last": last, "sqnr_db": sum(inside) / len(inside)})
    return result


def score(
    timesteps: list[float], reference: tuple[Tensor, Tensor], predicted: Tensor, pictures: Tensor
) -> dict[str, Any]:
    """Return the columns that compare with float.

    Args:
        timesteps: of the held-out calls.
        reference: float's predictions and pictures.
        predicted: the row's predictions on the held-out calls.
        pictures: the row's pictures.
    """
    quality = paired(reference[1], pictures)
    return {
        "sqnr": sqnr_by_bucket(timesteps, reference[0], predicted),
        "psnr_db_mean": quality.psnr_db_mean,
        "psnr_db_min": quality.psnr_db_min,
        "ssim_mean": quality.ssim_mean,
    }
