"""Effective bits: what one weight of the quantized layers costs on disk, scales and low-rank factors included.

One rule for every library, whatever it keeps in memory while it simulates: a code has its bits; a scale of a channel or group
has 16 (integers and FP8), a block scale of NVFP4 or MX has 8, a tensor scale 32, a zero point as many as a code; low-rank
factors have 16 bits an entry, rotations that were fitted to a layer what they have in its file. Biases, and the vectors by
which inputs are multiplied by channel (SmoothQuant, AWQ), are left out: engines fold them or keep them like biases, and
counting them would add 16 / out bits to either side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdiff.formats.table import TENSOR_SCALE_BITS, low_rank_bits

SCALE_BITS = 16


@dataclass(frozen=True)
class Storage:
    """How one weight ``[out, in]`` is stored.

    Args:
        bits: of a code.
        block: neighbours in a row that share a scale; 0: the whole row. A last block may be smaller.
        scale_bits: of each such scale.
        tensor_scale: whether there is one 32-bit scale more for the tensor.
        zero_point: whether every scale has a zero point.
        rank: of the low-rank branch in 16 bit.
        per_tensor: one scale for the whole weight.
        parts: into how many the columns are split, each with scales of its own.
        column_bits: of what else is stored for each column: rotations that were fitted.
    """

    bits: float
    block: int = 0
    scale_bits: int = SCALE_BITS
    tensor_scale: bool = False
    zero_point: bool = False
    rank: int = 0
    per_tensor: bool = False
    parts: int = 1
    column_bits: int = 0

    def total(self, shape: tuple[int, int]) -> float:
        """Return bits of the whole weight."""
        rows, columns = shape
        scales = 1 if self.per_tensor else rows * (math.ceil(columns / self.block) if self.block else self.parts)
        each = self.scale_bits + (self.bits if self.zero_point else 0)
        total = rows * columns * self.bits + scales * each + (TENSOR_SCALE_BITS if self.tensor_scale else 0)
        total += columns * self.column_bits
        return total + (rows * columns * low_rank_bits(rows, columns, self.rank) if self.rank else 0)


def effective_bits(storage: dict[str, Storage], shapes: dict[str, tuple[int, int]]) -> float:
    """Return the mean bits over all weights of the quantized layers."""
    weights = sum(rows * columns for rows, columns in shapes.values())
    return sum(storage[name].total(shape) for name, shape in shapes.items()) / weights
