"""What a pipeline gives its backbone in a call, by name, and what of it nobody would take.

An argument that is dropped makes a picture that is wrong without an error: a ControlNet's residual that nobody adds, a class
that nobody embeds. So recording and engines ask the same question: is everything that has a value an input?
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qdiff.errors import InputError

_CONTROL = ("return_dict",)  # arguments that say how to answer, not what
_IMPLIED = ("image_rotary_emb",)  # positions: they follow from the latent's size, which a graph knows


def tensor_of(given: Mapping[str, object], name: str) -> Tensor:
    """Return the tensor that a call gives under a name.

    Raises:
        InputError: it is something else.
    """
    value = given[name]
    if not isinstance(value, Tensor):
        raise InputError(
            f"the pipeline gives its backbone a {type(value).__name__} as {name!r}, not a tensor",
            "use the pipeline class that this model was published with",
        )
    return value


def added_conditions(given: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors of ``added_cond_kwargs`` in float32, without those that are ``None``."""
    added = given.get("added_cond_kwargs")
    if not isinstance(added, Mapping):
        return {}
    return {name: tensor_of(added, name).float() for name, value in added.items() if value is not None}


def flattened(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return arguments by name; those in a dict (``added_cond_kwargs``, or what a ``**kwargs`` takes) by their own."""
    given: dict[str, object] = {}
    for name, value in arguments.items():
        given |= flattened(value) if isinstance(value, Mapping) else {name: value}
    return given


def unknown(given: Mapping[str, object], inputs: Collection[str]) -> list[str]:
    """Return names of what has a value and is no input."""
    return [
        name
        for name, value in given.items()
        if name not in inputs and name not in (*_CONTROL, *_IMPLIED) and not _is_nothing(name, value)
    ]


def _is_nothing(name: str, value: object) -> bool:
    if value is None or (isinstance(value, (tuple, list)) and not value):
        return True
    # A mask of ones masks nothing; graphs may be exported without it.
    return name.endswith("attention_mask") and isinstance(value, torch.Tensor) and bool((value == 1).all())
