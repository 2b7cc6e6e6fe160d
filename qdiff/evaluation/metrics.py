"""How far two results are apart: pictures (PSNR, SSIM) and tensors (SQNR, cosine, relative error).

Quality is *paired*: the same prompt and seed through the float and the quantized model. A set score such as FID needs
thousands of pictures to see what PSNR of eight pairs shows, and it calls a different but pretty picture a success.

Rules that every number in a report follows:

- PSNR and SSIM are per picture; the mean PSNR is the mean of the per-picture dB, not the dB of the pooled error
  (one broken picture would then hide all the others). Equal pictures have infinite dB, which has no mean and no JSON:
  :func:`decibels` clamps to 100 dB, and ``identical`` says when that happened.
- NaN and infinity in the input are refused with a count, never averaged: a quantized model that overflows must not get
  a score.
- Sums run in float64, one picture at a time: the error of an 8-bit model is small against its signal, and sixteen
  pictures of 1024 x 1024 would not fit as float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import InputError

DB_CAP = 100.0
"""dB that equal signals get where a finite number is needed. 100 dB is an error of 1e-5 of the signal: nobody sees it."""
SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window (sigma 1.5) of SSIM; smaller pictures have no SSIM."""


@dataclass(frozen=True)
class ImageQuality:
    """One pair. ``psnr_db`` is clamped to :data:`DB_CAP`; ``identical`` says that every value is equal."""

    psnr_db: float
    ssim: float
    identical: bool


@dataclass(frozen=True)
class PairedQuality:
    """All pairs, in order, and their means and worst values (identical pictures count as :data:`DB_CAP` dB)."""

    per_image: list[ImageQuality]
    psnr_db_mean: float
    psnr_db_min: float
    ssim_mean: float
    ssim_min: float


def decibels(value: float) -> float:
    """Return ``value`` clamped to [-100, 100] dB: a number that JSON and a mean can take.

    Raises:
        InputError: NaN.
    """
    if math.isnan(value):
        raise InputError("a dB value is NaN", "the signal it came from holds NaN: find the first layer that makes one")
    return min(max(value, -DB_CAP), DB_CAP)


def psnr(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair, in dB, peak 1: ``-10 log10(mean((a - b)^2))``.

    Args:
        images_a: ``[N, (frames,) H, W, C]``, uint8, or floating in [0, 1].
        images_b: the same shape; its dtype may differ.

    Returns:
        float64 ``[N]``; ``inf`` where a pair is equal. The frames of a video are pooled.

    Raises:
        InputError: shapes differ, no pictures, values outside [0, 1], NaN or infinity.
    """
    _same_shape(images_a, images_b)
    errors = [(_unit(a, "a") - _unit(b, "b")).square().mean() for a, b in zip(images_a, images_b, strict=True)]
    return -10.0 * torch.log10(torch.stack(errors))


def ssim(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Return the structural similarity of each pair (Wang et al. 2004, Gaussian window 11 x 11, sigma 1.5), by
    torchmetrics.

    Channels are compared one by one and averaged (no conversion to luminance).

    Args:
        images_a: as for :func:`psnr`, H and W at least 11.
        images_b: the same shape.

    Returns:
        float64 ``[N]``, 1 for equal pictures. A video gets the mean of its frames.

    Raises:
        InputError: as :func:`psnr`; pictures smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _same_shape(images_a, images_b)
    height, width = images_a.shape[-3:-1]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {width} x {height}"
        )
    scores = []
    for a, b in zip(images_a, images_b, strict=True):
        frames = structural_similarity_index_measure(_planes(a, "a"), _planes(b, "b"), reduction="none", data_range=1.0)
        assert isinstance(frames, Tensor)
        scores.append(frames.mean())
    return torch.stack(scores)


def paired(images_a: Tensor, images_b: Tensor) -> PairedQuality:
    """Return the PSNR and SSIM of every pair, with mean and minimum.

    Args:
        images_a: reference, ``[N, (frames,) H, W, C]``, uint8 or floating in [0, 1].
        images_b: the same shape.

    Raises:
        InputError: as :func:`psnr` and :func:`ssim`.
    """
    ratios, similarities = psnr(images_a, images_b).tolist(), ssim(images_a, images_b).tolist()
    pairs = [
        ImageQuality(decibels(ratio), similarity, math.isinf(ratio))
        for ratio, similarity in zip(ratios, similarities, strict=True)
    ]
    return PairedQuality(
        per_image=pairs,
        psnr_db_mean=sum(pair.psnr_db for pair in pairs) / len(pairs),
        psnr_db_min=min(pair.psnr_db for pair in pairs),
        ssim_mean=sum(pair.ssim for pair in pairs) / len(pairs),
        ssim_min=min(pair.ssim for pair in pairs),
    )


@dataclass(frozen=True)
class MotionQuality:
    """How clips move, beside the reference's.

    Args:
        magnitude_ratio: mean absolute change from frame to frame, over the reference's: 0 is a frozen video, above 1 flickers.
        change_psnr_db: PSNR of the changes from frame to frame (peak 2), of all clips together: sees flicker that single
            frames hide.
        steadiness: mean change of the change (second difference) over the mean change; ``reference_steadiness`` is the
            reference's. It grows with jitter and is independent of what moves.
    """

    magnitude_ratio: float
    change_psnr_db: float
    steadiness: float
    reference_steadiness: float


def motion(clips_a: Tensor, clips_b: Tensor) -> MotionQuality:
    """Return motion of ``clips_b`` against the reference ``clips_a``.

    Args:
        clips_a: ``[N, frames, H, W, C]``, uint8 or floating in [0, 1], at least three frames.
        clips_b: the same shape.

    Raises:
        InputError: other shapes, values outside [0, 1], NaN or infinity.
    """
    _same_shape(clips_a, clips_b)
    if clips_a.ndim != 5 or clips_a.shape[1] < 3:
        raise InputError(f"motion needs clips [N, frames, H, W, C] of three frames or more, got {list(clips_a.shape)}")
    changes = [0.0, 0.0]
    jumps = [0.0, 0.0]
    error = 0.0
    for a, b in zip(clips_a, clips_b, strict=True):
        moved = [_unit(a, "a").diff(dim=0), _unit(b, "b").diff(dim=0)]
        error += float((moved[0] - moved[1]).square().mean()) / len(clips_a)
        for index, change in enumerate(moved):
            changes[index] += float(change.abs().mean())
            jumps[index] += float(change.diff(dim=0).abs().mean())
    still = [max(change, 1e-12) for change in changes]
    return MotionQuality(
        magnitude_ratio=changes[1] / still[0],
        change_psnr_db=decibels(math.inf if error == 0 else 10.0 * math.log10(4.0 / error)),
        steadiness=jumps[1] / still[1],
        reference_steadiness=jumps[0] / still[0],
    )


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Return signal-to-quantization-noise ratio ``10 log10(sum r^2 / sum (r - a)^2)`` in dB.

    Returns:
        ``inf`` when both are equal, ``-inf`` for an error on an all-zero reference; :func:`decibels` clamps both.

    Raises:
        InputError: shapes differ, empty, NaN or infinity.
    """
    reference, approximation = _pair(reference, approximation)
    signal = float(reference.square().sum())
    noise = float((reference - approximation).square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def cosine(reference: Tensor, approximation: Tensor) -> float:
    """Return cosine of the angle between the two flattened tensors, in [-1, 1]. Blind to a wrong factor: read it with
    SQNR.

    Two zero tensors point the same way (1); a zero and a non-zero tensor share nothing (0).

    Raises:
        InputError: shapes differ, empty, NaN or infinity.
    """
    reference, approximation = _pair(reference, approximation)
    norms = float(reference.norm()), float(approximation.norm())
    if 0.0 in norms:
        return 1.0 if norms[0] == norms[1] else 0.0
    product = float(torch.dot(reference.flatten() / norms[0], approximation.flatten() / norms[1]))
    return min(max(product, -1.0), 1.0)


def _pair(reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != approximation.shape:
        raise InputError(f"cannot compare shapes {tuple(reference.shape)} and {tuple(approximation.shape)}")
    if reference.numel() == 0:
        raise InputError("cannot compare empty tensors")
    return _finite(reference.detach(), "reference"), _finite(approximation.detach(), "approximation")


def _finite(values: Tensor, name: str) -> Tensor:
    values = values.to(torch.float64)
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise InputError(
            f"the {name} has {bad} NaN or infinite of {values.numel()} values",
            "compare layer by layer to find the first one that overflows, and keep it in float (recipe: ignore)",
        )
    return values


def _same_shape(images_a: Tensor, images_b: Tensor) -> None:
    if images_a.shape != images_b.shape:
        raise InputError(f"cannot compare pictures of shapes {tuple(images_a.shape)} and {tuple(images_b.shape)}")
    if images_a.ndim not in (4, 5) or images_a.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"pictures have shape {tuple(images_a.shape)}, expected [N, H, W, C] or [N, frames, H, W, C]",
            "put the channels last: images.permute(0, 2, 3, 1)",
        )
    if images_a.numel() == 0:
        raise InputError("there are no pictures to compare")


def _planes(image: Tensor, name: str) -> Tensor:
    return _unit(image, name).reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)  # [frames, C, H, W]


def _unit(image: Tensor, name: str) -> Tensor:
    if image.dtype == torch.uint8:
        return image.to(torch.float64) / 255.0
    if not image.dtype.is_floating_point:
        raise InputError(f"picture {name} has dtype {image.dtype}, expected uint8 or floating point")
    values = _finite(image.detach(), f"picture {name}")
    low, high = float(values.min()), float(values.max())
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise InputError(
            f"picture {name} has values from {low:.3g} to {high:.3g}, expected [0, 1]",
            "scale it first: (x + 1) / 2 for [-1, 1], uint8 for 0..255",
        )
    return values.clamp(0.0, 1.0)
