"""Block Hadamard rotations: they spread an outlier over its block, and leave every product as it was.

``R`` is block-diagonal with one orthogonal symmetric matrix H on the diagonal, so ``(x R)(W R)ᵀ = x Wᵀ``.

H is the *regular* Hadamard matrix of order 4^k: all its rows and columns have the same sum. The usual Sylvester matrix has a
column of ones, which gathers what the channels have in common into a single new outlier, and inputs of a DiT have much in
common (ConvRot, arXiv 2512.03673: 160 against 13). Regular matrices exist for 4, 16, 64, 256; their entries are ±2^-k, so
products in 16 bit lose nothing by them. With ``signs`` the columns are multiplied by random signs first, the randomised
Hadamard transform of QuIP# (arXiv 2402.04396); that is a diagonal of ±1, which the layer's multiplier carries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.errors import InputError

BLOCKS = (256, 64, 16, 4)
_REGULAR = (
    torch.tensor([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]) / 2
)


def hadamard(block: int) -> Tensor:
    """The regular Hadamard matrix ``[block, block]``, orthogonal and symmetric, float32.

    Raises:
        InputError: a block that is no power of 4 up to 256.
    """
    if block not in BLOCKS:
        raise InputError(f"there is no rotation of block {block}", f"known: {', '.join(map(str, BLOCKS))}")
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(matrix, _REGULAR)
    return matrix


def largest_block(columns: int, most: int = 256) -> int:
    """The largest block that divides ``columns`` and is at most ``most``; 0 when none does."""
    return next((block for block in BLOCKS if block <= most and columns % block == 0), 0)


def rotate_columns(x: Tensor, block: int) -> Tensor:
    """``x R`` for ``x [..., columns]`` in its own dtype.

    Raises:
        InputError: the block does not divide the columns.
    """
    if x.shape[-1] % block:
        raise InputError(f"blocks of {block} do not divide {x.shape[-1]} columns", "choose a smaller rotation")
    return (x.unflatten(-1, (-1, block)) @ hadamard(block).to(x)).flatten(-2)
