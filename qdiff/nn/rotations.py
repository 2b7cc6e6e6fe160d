"""Rotations of a layer's input: they spread an outlier over its block, and leave every product as it was.

``R`` is orthogonal, so ``(x R)(W R)ᵀ = x Wᵀ``. Two kinds:

- **hadamard**: block-diagonal with one matrix H on the diagonal. H is the *regular* Hadamard matrix of order 4^k: all its rows
  and columns have the same sum. The usual Sylvester matrix has a column of ones, which gathers what the channels have in
  common into a single new outlier, and inputs of a DiT have much in common (ConvRot, arXiv 2512.03673: 160 against 13).
  Regular matrices exist for 4, 16, 64, 256; their entries are ±2^-k, so products in 16 bit lose nothing by them. The
  randomised form (QuIP#, arXiv 2402.04396) multiplies channels by random signs first: a diagonal of ±1, which the layer's
  multiplier carries.
- **outlier**: R = G P H, after DuQuant (arXiv 2406.01721) as LRQ-DiT uses it for salient outliers (arXiv 2508.03485). G rotates
  every block by a matrix of its own that was fitted to the block's largest channels, P deals the channels out in a zigzag, so
  that every block gets its share of what is still large, and H spreads that. It costs a matrix a block and a gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import InputError

BLOCKS = (256, 64, 16, 4)
_REGULAR = (
    torch.tensor([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]) / 2
)


@dataclass(frozen=True, eq=False)
class Rotation:
    """``R`` by its factors.

    Args:
        last: H ``[block, block]``.
        first: G ``[in / block, block, block]``, float32 numbers of the float16 grid, or ``None``: no G and no P.
        order: P ``[in]`` int64, with ``first``: channel ``order[i]`` goes to place ``i``.
    """

    last: Tensor
    first: Tensor | None = None
    order: Tensor | None = None

    @property
    def block(self) -> int:
        """Return channels that are mixed with each other by one factor."""
        return self.last.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x R`` for ``x [..., in]``, in its own dtype.

        Raises:
            InputError: the block does not divide the columns.
        """
        if x.shape[-1] % self.block:
            raise InputError(f"blocks of {self.block} do not divide {x.shape[-1]} columns", "choose a smaller rotation")
        return rotate(x, self.last.to(x), None if self.first is None else self.first.to(x), self.order)

    def weight(self, weight: Tensor) -> Tensor:
        """Return ``W (Rᵀ)⁻¹`` for ``W [out, in]``: what the rotated input is multiplied with. G on the float16 grid is
        orthogonal to 2^-11 only, so its own inverse is taken.
        """
        if self.first is None:
            return self.forward(weight)
        inverse = torch.linalg.inv(self.first.double()).transpose(-1, -2).to(weight)
        return rotate(weight, self.last.to(weight), inverse, self.order)


def rotate(x: Tensor, last: Tensor | None, first: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Return ``x G P H`` for ``x [..., in]`` with the factors of :class:`Rotation`; what a quantized layer's graph
    holds.
    """
    if first is not None and order is not None:
        blocks = x.unflatten(-1, (first.shape[0], 1, first.shape[1]))
        x = (blocks @ first).flatten(-3).index_select(-1, order)
    if last is not None:
        x = (x.unflatten(-1, (-1, last.shape[-1])) @ last).flatten(-2)
    return x


def hadamard(block: int) -> Tensor:
    """Return the regular Hadamard matrix ``[block, block]``, orthogonal and symmetric, float32.

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
    """Return the largest block that divides ``columns`` and is at most ``most``; 0 when none does."""
    return next((block for block in BLOCKS if block <= most and columns % block == 0), 0)


def outlier_rotation(x: Tensor, block: int, steps: int = 32, seed: int = 0) -> Rotation:
    """Return the *outlier* kind, fitted to tokens ``x [N, in]``: see the module's docstring.

    Greedy, block by block: the channel with the largest value becomes the first of its block and a random rotation whose first
    row is constant spreads it; of up to ``steps`` such rotations in a row the product with the smallest largest value is
    kept (DuQuant, section 3.2).

    Raises:
        InputError: the block does not divide the columns.
    """
    if x.shape[-1] % block:
        raise InputError(f"blocks of {block} do not divide {x.shape[-1]} columns", "choose a smaller rotation")
    generator = torch.Generator().manual_seed(seed)
    blocks = x.float().unflatten(-1, (-1, block)).transpose(0, 1).contiguous()  # [in / block, N, block]
    count = len(blocks)
    product = torch.eye(block, device=x.device).repeat(count, 1, 1)
    best, least = product.clone(), blocks.abs().amax(dim=(1, 2))
    for _ in range(steps):
        worst = blocks.abs().amax(dim=1).argmax(dim=1)  # [in / block]
        swap = torch.eye(block, device=x.device).repeat(count, 1, 1)
        rows = torch.arange(count, device=x.device)
        swap[rows, 0, 0], swap[rows, worst, worst] = 0.0, 0.0
        swap[rows, 0, worst], swap[rows, worst, 0] = 1.0, 1.0
        turn = swap @ _spreading(block, generator).to(x.device)
        blocks, product = blocks @ turn, product @ turn
        largest = blocks.abs().amax(dim=(1, 2))
        better = largest < least
        best[better], least = product[better], torch.minimum(largest, least)
    best = best.half().float()
    magnitudes = (x.float().unflatten(-1, (-1, 1, block)) @ best).flatten(-3).abs().amax(dim=0)
    return Rotation(hadamard(block).to(x.device), best, zigzag(magnitudes, block))


def zigzag(magnitudes: Tensor, block: int) -> Tensor:
    """Return channels dealt to blocks from the largest on, forwards and backwards in turn: ``[in]`` int64, block after
    block.
    """
    count = len(magnitudes) // block
    dealt = magnitudes.argsort(descending=True, stable=True).reshape(block, count)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)


def _spreading(block: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix ``[block, block]`` whose first row is constant: it spreads the first channel
    evenly.
    """
    matrix = torch.randn(block, block, generator=generator, dtype=torch.float64)
    matrix[:, 0] = 1.0
    q, _ = torch.linalg.qr(matrix)
    return (q.T * q[0, 0].sign()).float()
