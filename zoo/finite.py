"""Pictures of a model as bytes; NaN would become a black pixel, which counts as a wrong picture and not as a broken model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdiff.errors import InputError


def in_bytes(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Return pictures or clips with values in 0..1, one for each prompt, as uint8.

    Raises:
        InputError: NaN or infinity; names the first prompt.
    """
    for picture, prompt in zip(pictures, prompts, strict=True):
        if not np.isfinite(picture).all():
            raise InputError(
                f"the model makes NaN or infinity for {prompt!r}",
                "take an earlier checkpoint, or train at a lower rate",
            )
    return np.rint(np.asarray(pictures) * 255).astype(np.uint8)
