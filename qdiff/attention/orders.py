"""Orders of the tokens of a picture or clip: candidates of which every head gets one.

Heads look along different axes: within a frame, along a row, at the same place in every frame. In the right order what a head
looks at lies together, so that few blocks hold it (PAROAttention, arXiv 2506.16054, which tries the six orders of the axes;
here boxes of a block's size join them, as in arXiv 2502.04507, and the Morton curve). A name says all: ``fhw`` has frames
outermost and columns innermost, ``box4x4x4`` goes box by box, ``morton`` interleaves the bits of the three places.
"""

from __future__ import annotations

import itertools
import math
import re

import torch
from torch import Tensor

from qdiff.errors import InputError

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens; a picture has one frame."""

_AXES = "fhw"


def order_named(name: str, grid: Grid) -> Tensor:
    """Return the permutation ``[frames * rows * columns]`` of tokens that the model numbers with columns innermost:
    int64, the token that lies at each place.

    Raises:
        InputError: no such order.
    """
    if not re.fullmatch(r"morton|box[1-9]\d*x[1-9]\d*x[1-9]\d*", name) and sorted(name) != sorted(_AXES):
        raise InputError(
            f"unknown order of tokens {name!r}", "orders are those of the axes, such as fhw or hwf, box2x4x4 and morton"
        )
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij")])
    if name == "morton":
        return torch.argsort(_interleaved(places), stable=True)
    if name.startswith("box"):
        sides = torch.tensor([int(side) for side in name.removeprefix("box").split("x")])[:, None]
        keys = [*(places // sides), *(places % sides)]
    else:
        keys = [places[_AXES.index(axis)] for axis in name]
    order = torch.arange(math.prod(grid))
    for key in reversed(keys):  # the last key decides least, so it is sorted by first
        order = order[torch.argsort(key[order], stable=True)]
    return order


def candidates(grid: Grid, block: int) -> dict[str, Tensor]:
    """Return different orders by name: those of the axes, boxes of ``block`` tokens (or the next smaller power of two),
    Morton's.
    """
    names = ["".join(axes) for axes in itertools.permutations(_AXES)]
    exponent = block.bit_length() - 1
    for f, h in itertools.product(range(exponent + 1), repeat=2):
        sides = (2**f, 2**h, 2 ** (exponent - f - h)) if f + h <= exponent else (0, 0, 0)
        if all(1 < side <= length or (side == 1 and length == 1) for side, length in zip(sides, grid, strict=True)):
            names.append("box" + "x".join(map(str, sides)))
    found: dict[str, Tensor] = {}
    seen: set[bytes] = set()
    for name in [*names, "morton"]:
        order = order_named(name, grid)
        if (key := order.numpy().tobytes()) not in seen:
            seen.add(key)
            found[name] = order
    return found


def _interleaved(places: Tensor) -> Tensor:
    code = torch.zeros_like(places[0])
    for bit in range(16):
        for axis in range(3):
            code |= (places[2 - axis] >> bit & 1) << (3 * bit + axis)
    return code
