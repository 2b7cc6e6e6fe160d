"""The inputs that sparse attention adds to a graph, and the sizes that it fixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qdiff.attention.lists import BlockLists
from qdiff.plan.attention_plan import BLOCKS, BOUNDS
from qdiff.recording.inputs import InputSpec

LISTED = "listed"  # the axis along which all lists lie


def list_inputs(lists: BlockLists) -> tuple[InputSpec, ...]:
    """Return the two inputs; how many blocks are listed differs from group to group of timesteps."""
    return (
        InputSpec(BLOCKS, (len(lists.blocks), LISTED), torch.int32, varies=True),
        InputSpec(BOUNDS, (len(lists.bounds),), torch.int64, varies=True),
    )


def fixed_sizes(specs: Iterable[InputSpec], example: Mapping[str, Tensor]) -> tuple[InputSpec, ...]:
    """Return inputs whose frames, height and width are those of ``example``: the order of tokens is one of that many
    tokens.
    """
    return tuple(
        dataclasses.replace(
            spec,
            axes=tuple(
                size if axis in ("frames", "height", "width") else axis
                for axis, size in zip(spec.axes, example[spec.name].shape, strict=True)
            ),
        )
        for spec in specs
    )
