"""What the kernel computes, tile by tile, in torch: the online softmax with its running maximum, probabilities rounded against
that maximum, and, on request, the tensor cores' short accumulator.

Where :mod:`qdiff.attention.gathered` sees a whole row of scores, a kernel sees one tile at a time. In exact arithmetic that makes
no difference; with rounded probabilities it does, because they are rounded relative to the maximum so far.

Hopper's FP8 tensor cores add products of 32 pairs at a time into a register that keeps about 22 bits (DeepSeek-V3,
arXiv 2412.19437 §3.3.2). ``accumulator_bits`` models it (:func:`aligned_sum`), in FP8 scores and in the output: 32 products and
what the register holds are aligned to the largest of them, and what falls below that many bits of it is lost.
``flush`` says whether the sum goes to a float32 accumulator after each tile, as the kernel does, or lives in the short one to
the end, which at 75,600 keys costs several percent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.attention.gathered import rounded
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import Numerics
from qdiff.attention.packing import Packed, from_places

STEP = 32  # keys of one FP8 tensor-core instruction
FP22_MANTISSA = 13


def attend(
    packed: Packed,
    order: Tensor,
    lists: BlockLists,
    tiling: Tiling,
    numerics: Numerics,
    scale: float | None = None,
    *,
    tile: int | None = None,
    accumulator_bits: int | None = None,
    flush: bool = True,
) -> Tensor:
    """Return the attention, float32, in the shapes of :func:`qdiff.attention.oracle.attend`.

    Args:
        packed: operands (:func:`qdiff.attention.packing.pack`), as the kernel is given them.
        order: int ``[heads, ordered]``.
        lists: the blocks of keys that each block of queries reads.
        tiling: how the sequence is cut into blocks.
        numerics: formats of the operands.
        scale: of the scores; ``None``: ``size ** -0.5``.
        tile: keys that the kernel takes at a time, a divisor of the block; ``None``: a block.
        accumulator_bits: mantissa of the accumulator of FP8 products; ``None``: float32's.
        flush: whether each tile has an accumulator of its own.
    """
    queries, keys, values = packed.values(tiling)
    scores = queries @ keys.mT
    bits = accumulator_bits if numerics.output == "fp8" else None
    if bits is not None and numerics.scores == "fp8":
        scores = _in_steps(packed.q.float(), packed.k.float().mT, torch.zeros_like(scores), bits)
        scores = scores * packed.score_scale(tiling)
    scores = scores * (queries.shape[-1] ** -0.5 if scale is None else scale)
    result = torch.zeros_like(queries)
    offsets, entries = lists.by_row(tiling)
    step = tile or tiling.block_k
    for head in range(lists.heads):
        for row in range(offsets.shape[1] - 1):
            span = slice(row * tiling.block_q, (row + 1) * tiling.block_q)
            listed = entries[offsets[head, row] : offsets[head, row + 1]].tolist()
            columns = [
                slice(start, start + step)
                for block in listed
                for start in range(block * tiling.block_k, (block + 1) * tiling.block_k, step)
            ]
            for sample in range(len(queries)):
                result[sample, head, span] = _row(
                    scores[sample, head, span],
                    values[sample, head],
                    columns,
                    packed.filled,
                    numerics,
                    bits,
                    flush,
                )
    if packed.v_mean is not None:
        read = (offsets.diff(dim=1) > 0).repeat_interleave(tiling.block_q, dim=1)
        result += packed.v_mean * read[..., None]
    return from_places(result, tiling.places(order, tiling.block_q), tiling.tokens)


def _row(
    scores: Tensor,
    values: Tensor,
    columns: list[slice],
    filled: Tensor,
    numerics: Numerics,
    bits: int | None,
    flush: bool,
) -> Tensor:
    """Return one block of queries: scores ``[queries, places of keys]``, values ``[places of keys, size]``."""
    largest = torch.full((len(scores), 1), -torch.inf)
    total = torch.zeros(len(scores), 1)
    result = torch.zeros(len(scores), values.shape[1])
    for tile in columns:
        part = scores[:, tile].masked_fill(~filled[tile], -torch.inf)
        grown = torch.maximum(largest, part.amax(dim=1, keepdim=True))
        shift = grown.clamp_min(torch.finfo(torch.float32).min)
        probabilities = (part - shift).exp()
        fade = (largest - shift).exp()
        total = total * fade + probabilities.sum(dim=1, keepdim=True)
        result = result * fade
        codes = rounded(probabilities, numerics)
        if bits is None:
            result = result + codes @ values[tile]
        else:
            result = _accumulated(codes, values[tile], result, bits, flush)
        largest = grown
    return result / total.clamp_min(torch.finfo(torch.float32).tiny)


def _accumulated(codes: Tensor, values: Tensor, before: Tensor, bits: int, flush: bool) -> Tensor:
    register = _in_steps(codes, values, torch.zeros_like(before) if flush else before, bits)
    return before + register if flush else register


def _in_steps(a: Tensor, b: Tensor, register: Tensor, bits: int) -> Tensor:
    """Return ``register + a @ b``, one instruction's products at a time."""
    for start in range(0, a.shape[-1], STEP):
        span = slice(start, start + STEP)
        products = a[..., :, None, span] * b[..., span, :].mT[..., None, :, :]
        register = aligned_sum(torch.cat([products, register[..., None]], dim=-1), bits)
    return register


def aligned_sum(x: Tensor, bits: int) -> Tensor:
    """Return the sum over the last axis of float32 ``x`` as a tensor core adds: every addend is cut, towards zero, to
    multiples of the largest one's power of two over ``2 ** bits``.
    """
    exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent - 1
    unit = torch.ldexp(torch.ones_like(x[..., :1]), exponent - bits)
    return ((x / unit).trunc() * unit).sum(dim=-1)
