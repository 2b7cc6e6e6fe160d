"""Sizes and numbers of frames that a model makes, and what is said of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.errors import UsageError, option

if TYPE_CHECKING:
    from qdiff.models.base import Family
    from qdiff.models.model import Model

MOST_FRAMES = 1_000
LARGEST_SIDE = 16_384  # pixels


def check_size(model: Model, height: int | None, width: int | None, frames: int | None) -> None:
    """Refuse sizes that the backbone cannot cut into patches or the VAE into frames.

    Raises:
        UsageError: with the nearest sizes that work; or frames are asked of a picture.
    """
    family = model.family
    for label, value in (("height", height), ("width", width)):
        if value is not None and abs(value) > LARGEST_SIDE:
            raise UsageError(f"{label} {str(value)[:20]} is not between 1 and {LARGEST_SIDE}", "choose a smaller one")
        if value is not None and (value <= 0 or value % family.size_divisor):
            nearest_size = max(1, round(value / family.size_divisor)) * family.size_divisor
            raise UsageError(f"{label} {value} does not divide by {family.size_divisor}", f"use {nearest_size}")
    if frames is None:
        return
    check_frames(family, frames)
    factor = model.pipeline.vae_scale_factor_temporal
    if (frames - 1) % factor:
        usable = max(1, round((frames - 1) / factor)) * factor + 1
        raise UsageError(f"{frames} frames are not 1 and a multiple of {factor}", f"use {usable}")


def check_frames(family: Family, frames: int | None) -> None:
    """Check a number of frames as far as is known before a model is loaded.

    Raises:
        UsageError: frames of a picture, or a number that no clip has.
    """
    if frames is None:
        return
    if family.media != "video":
        raise UsageError(f"{option('frames', frames)}: {family.title} makes pictures", f"leave {option('frames')} out")
    if not 2 <= frames <= MOST_FRAMES:
        raise UsageError(f"{option('frames', frames)} is not between 2 and {MOST_FRAMES}", "81 are usual")
