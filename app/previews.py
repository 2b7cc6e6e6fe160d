"""A cheap look at the picture while it forms: latents to colours by one 3 × 3 convolution, no VAE.

Colour is nearly a linear function of the latent channels (the "latent to RGB factors" of the field's user interfaces). Those
factors are known for a few published VAEs; here they are fitted to the VAE that is loaded, once, over a cell and its
neighbours: pictures of random flat patches are encoded, and least squares with a small ridge gives the kernel. That costs one
small VAE call and holds for bundled and private models alike.

Shown is the model's estimate of the clean latent where the scheduler keeps one (the data prediction of DPM-Solver++,
arXiv 2211.01095 §4), which looks like the picture from the first step on; else the noisy latent itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from PIL.Image import Image
    from torch import Tensor

    from qdiff.correction.scheduler import Scheduler
    from qdiff.models import Model

_SIDE = 64  # pixels
_FIELDS, _PATCHES = 8, (1, 2, 4)  # pictures of each kind, and their patches along a side
_RIDGE = 1e-2


class AutoencoderConfig(TypedDict, total=False):
    """Holds how latents are scaled: by one factor and shift, or by mean and deviation of each channel."""

    scaling_factor: float
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float]


class EncoderOutput(Protocol):
    """What an autoencoder returns for pictures."""

    latent_dist: DiagonalGaussianDistribution


class Autoencoder(Protocol):
    """What is asked of an autoencoder of diffusers, for pictures or for clips."""

    @property
    def config(self) -> AutoencoderConfig: ...

    def encode(self, x: Tensor) -> EncoderOutput: ...

    def parameters(self) -> Iterator[Tensor]: ...


class Previewer:
    """Small pictures from the latents of one model."""

    def __init__(self, model: Model) -> None:
        self._pipeline = model.pipeline
        self._kernel = _fit(model.pipeline.vae)  # [9 C + 1, 3]

    def __call__(self, latents: Tensor) -> Image:
        """Return the first picture of ``latents [B, C, h, w]``, or the middle frame of a clip's ``[B, C, T, h, w]``,
        ``h × w`` large.
        """
        import torch
        from PIL import Image

        latent = self._clean_estimate(latents)[:1].float().cpu()
        if latent.ndim == 5:
            latent = latent[:, :, latent.shape[2] // 2]
        colours = (_neighbours(latent) @ self._kernel).clamp(0, 1).mul(255).round().to(torch.uint8)  # [h * w, 3]
        return Image.fromarray(colours.reshape(*latent.shape[-2:], 3).numpy(), "RGB")

    def _clean_estimate(self, latents: Tensor) -> Tensor:
        scheduler: Scheduler = self._pipeline.scheduler
        if "++" in str(scheduler.config.get("algorithm_type", "")):
            newest = (getattr(scheduler, "model_outputs", None) or [None])[-1]
            if newest is not None and newest.shape == latents.shape:
                return newest
        return latents


def _neighbours(latents: Tensor) -> Tensor:
    """Return ``[N h w, 9 C + 1]`` for ``[N, C, h, w]``: each cell with its eight neighbours (edges repeated), and a
    one.
    """
    import torch
    from torch.nn import functional

    padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    rows = functional.unfold(padded, 3).transpose(1, 2).flatten(0, 1)  # [N h w, 9 C]
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def _scaled_latents(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """Return what a diffusion model sees of pictures ``[N, 3, H, W]``; a video's autoencoder gets clips of one
    frame.
    """
    import torch

    config = vae.config
    mean = config.get("latents_mean")
    if mean is None:
        shift = config.get("shift_factor") or 0.0
        return (vae.encode(pixels).latent_dist.mode().float().cpu() - shift) * config["scaling_factor"]
    latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0].float().cpu()
    return (latents - torch.tensor(mean)[:, None, None]) / torch.tensor(config["latents_std"])[:, None, None]


def _fit(vae: Autoencoder) -> Tensor:
    """Return the least squares fit from latents to RGB in [0, 1]. The generator is our own: no caller's seed is
    touched.
    """
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        fields = torch.cat(
            [
                functional.interpolate(torch.rand(_FIELDS, 3, count, count, generator=generator), size=(_SIDE, _SIDE))
                for count in _PATCHES
            ]
        )
        pixels = (2 * fields - 1).to(next(vae.parameters()))
        latents = _scaled_latents(vae, pixels)  # [N, C, h, w]
        rows = _neighbours(latents)
        colours = (
            functional.interpolate(fields, size=latents.shape[-2:], mode="area").permute(0, 2, 3, 1).reshape(-1, 3)
        )
        gram = rows.T @ rows
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        return torch.linalg.solve(gram + ridge, rows.T @ colours)
