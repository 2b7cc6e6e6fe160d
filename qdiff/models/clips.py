"""How video families and their pipelines meet: sizes that work, a callback after every step, frames as clips."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qdiff.evaluation.video import Clip
from qdiff.models.given import tensor_of
from qdiff.models.model import Model, Request, StepCallback


def capture(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the named inputs from a call to a backbone that is given states of a text and one timestep for all
    samples.
    """
    given = {**dict(zip(("hidden_states",), args, strict=False)), **kwargs}
    hidden_states = tensor_of(given, "hidden_states")
    return {
        "hidden_states": hidden_states.float(),
        "encoder_hidden_states": tensor_of(given, "encoder_hidden_states").float(),
        "timestep": tensor_of(given, "timestep").float().reshape(-1).expand(hidden_states.shape[0]),
    }


def generate(model: Model, request: Request, on_step: StepCallback | None, **further: object) -> list[Clip]:
    """Return the clips of a request.

    Args:
        model: with the pipeline.
        request: prompts, seeds and settings.
        on_step: called after each denoising step.
        further: arguments of the pipeline besides those that all have.
    """
    arguments = {**model.arguments(request), **further}
    if on_step is not None:

        def after(pipeline: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step, float(timestep), tensors["latents"])
            return tensors

        arguments["callback_on_step_end"] = after
    model.pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        made = model.pipeline(
            negative_prompt=[request.negative_prompt] * len(request.prompts), output_type="np", **arguments
        ).frames  # float32 [N, T, H, W, 3] in 0..1
    return [Clip((frames * 255).round().astype("uint8")) for frames in made]
