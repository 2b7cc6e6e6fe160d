"""Block-sparse attention as a Triton kernel, for GPUs of compute capability 8.9 and above; written for Hopper.

One program computes 64 queries (or 128) of a block of one head: it walks the block's list of keys and keeps a running maximum
and sum, as :mod:`qdiff.attention.emulator` does. Nothing that is off the list is loaded. What decides its speed on tensor cores:

- **Programs are small enough for two to share a multiprocessor**: while one multiplies, the other takes its exponentials.
- **Both products are asynchronous** (wgmma). FP8 takes its second operand only with the summed axis contiguous, so every block of
  values lies transposed (:mod:`qdiff.attention.kernels.pack`); otherwise they would pass through registers.
- **Every tile has an accumulator of its own**, ``acc * fade + dot(p, v)``, never ``dot(p, v, acc)``: Hopper sums FP8 products in
  about 22 bits (:mod:`qdiff.attention.emulator`). BF16 sums in full precision, there the compiler fuses the two.
- **Addresses are multiples of a constant**: inside a block all strides are known at compile time, so that loads become
  asynchronous copies whatever the number of tokens is, and differ by constants.
- **Probabilities stay in their registers.** In FP8 the second product takes its first operand with other columns in a thread than
  the scores come in; the keys of each 16 are summed in an order in which they are the same (:func:`interleaved`), and the
  values are packed in that order. Otherwise a tile's probabilities would be shuffled between threads.
- **Exponentials are of base 2**, the scales and log2 e are one factor, and the step of the probabilities, 2^-8, is part of
  the exponent.
- **Numbers of blocks are read one step ahead**, so that the addresses of what is to be copied wait for nothing.
- **Keys are masked in two blocks at most**, the last one of the text and the last one of all; a sequence that fills its blocks
  has no such code.

A head size that is no power of two is computed as two parts, 72 as 64 + 8: the scores over 96 channels, the output over 80.
Padded to 128 that were 1.45 times as many products.

Pointers come first, then integers, then the output, and the scale of the scores is a constant of the compiled kernel: the order
and the kinds of parameters that a TensorRT plugin made of PTX can pass (:mod:`qdiff.attention.kernels.aot`).

``TRITON_INTERPRET=1``, set before triton is imported, runs everything here on tensors in host memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qdiff.attention.kernels.pack import Operands, Widths, cast, product, token_at
from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import PROBABILITY_SCALE, Numerics
from qdiff.errors import InputError

OFFSET = tl.constexpr(math.log2(PROBABILITY_SCALE))
PROGRAM = 64  # queries
TILE = 64


@triton.jit(do_not_specialize=["tokens", "text", "pitch"])
def sparse_attention_kernel(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    v_mean,
    order,
    ends,
    entries,
    tokens,
    text,
    pitch,
    out,
    SCALE: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST_QK: tl.constexpr,
    REST_PV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    CODED: tl.constexpr,
    PARTIAL: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Compute the attention of ``QUERIES`` queries of a block. The grid is ``(blocks of queries times BLOCK_Q /
    QUERIES, heads, batch)``.

    Pointers are those of :class:`qdiff.attention.kernels.pack.Operands`, of the order ``[heads, ordered]`` and of the lists, all
    int32 where integers; ``out [batch, heads, tokens, SIZE]``. ``SCALE`` contains log2 e. ``MAIN`` and the rests are
    :class:`qdiff.attention.kernels.pack.Widths`. Of key blocks ``TILE`` keys are taken at a time. ``PARTIAL``: there are
    places of keys without a token.

    ``ends`` and ``entries`` are what :meth:`qdiff.attention.lists.BlockLists.by_row` gives, or, with ``MATRIX``, the bounds
    ``[heads + 1]`` and blocks ``[rows, pitch]`` of :class:`qdiff.attention.lists.BlockLists` themselves, as an engine has them:
    what text adds to the lists follows from the numbers of tokens. There they may not hold ``NOTHING``; no bound and no number
    of a block, however wrong, makes an address outside the lists or the keys.
    """
    SHARE: tl.constexpr = BLOCK_Q // QUERIES
    row, head = tl.program_id(0) // SHARE, tl.program_id(1)
    rows = tl.num_programs(0) // SHARE
    plane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head
    text_columns = tl.cdiv(text, BLOCK_K)
    columns = text_columns + tl.cdiv(tokens - text, BLOCK_K)
    WIDTH: tl.constexpr = MAIN + REST_QK
    PV: tl.constexpr = MAIN + REST_PV
    channel, key = tl.arange(0, MAIN), tl.arange(0, TILE)
    query = tl.arange(0, QUERIES)

    q += (plane * tl.num_programs(0) + tl.program_id(0)) * (QUERIES * WIDTH)
    k += plane * columns * (BLOCK_K * WIDTH)
    v += plane * columns * (BLOCK_K * PV)
    queries = tl.load(q + query[:, None] * WIDTH + channel[None, :])
    if REST_QK:
        rest_qk = MAIN + tl.arange(0, REST_QK)
        queries_rest = tl.load(q + query[:, None] * WIDTH + rest_qk[None, :])
    if CODED:
        factor_q = tl.load(q_scale + plane * rows + row) * SCALE
        k_scale += plane * columns
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, MAIN], tl.float32)
    if REST_PV:
        rest_pv = MAIN + tl.arange(0, REST_PV)
        acc_rest = tl.zeros([QUERIES, REST_PV], tl.float32)

    PARTS: tl.constexpr = BLOCK_K // TILE
    if MATRIX:
        start = tl.minimum(tl.maximum(tl.load(ends + head), 0), pitch)
        end = tl.minimum(tl.maximum(tl.load(ends + head + 1), start), pitch)
        ahead = tl.where(
            row < tl.cdiv(text, BLOCK_Q), columns, text_columns
        )  # blocks that are read without being listed
        first, last = 0, tl.where(ahead == text_columns, text_columns + end - start, columns)
        entries += (row - tl.cdiv(text, BLOCK_Q)).to(tl.int64) * pitch + (start - text_columns)
    else:
        first = tl.load(ends + head * (rows + 1) + row)
        last = tl.load(ends + head * (rows + 1) + row + 1)
        ahead = 0
    block = _block(entries, first, last, ahead, text_columns, columns, MATRIX)
    for step in tl.range(first * PARTS, last * PARTS):
        following = (step + 1) // PARTS
        upcoming = _block(entries, following, last, ahead, text_columns, columns, MATRIX)
        part = (step % PARTS) * TILE
        keys = k + (block.to(tl.int64) * BLOCK_K + part) * WIDTH
        scores = product(queries, tl.load(keys + (key[None, :] * WIDTH + channel[:, None])))
        if REST_QK:
            scores = product(queries_rest, tl.load(keys + (key[None, :] * WIDTH + rest_qk[:, None])), scores)
        scores = scores.to(tl.float32)
        if PARTIAL:
            if (block == text_columns - 1) | (block == columns - 1):
                end = tl.where(block < text_columns, text, text_columns * BLOCK_K + tokens - text)
                scores = tl.where((key < end - block * BLOCK_K - part)[None, :], scores, float("-inf"))
        if CODED:
            factor = factor_q * tl.load(k_scale + block)
        else:
            factor = SCALE
        grown = tl.maximum(largest, tl.max(scores, 1) * factor)
        probabilities = tl.exp2(scores * factor - (grown - OFFSET)[:, None])
        fade = tl.exp2(largest - grown)
        total = total * fade + tl.sum(probabilities, 1)
        if CODED:
            probabilities = interleaved(probabilities)
        codes = cast(probabilities, v.dtype.element_ty)
        values = v + (block.to(tl.int64) * (BLOCK_K * PV) + part)
        acc = acc * fade[:, None] + product(codes, tl.load(values + (channel[None, :] * BLOCK_K + key[:, None])))
        if REST_PV:
            rest = tl.load(values + (rest_pv[None, :] * BLOCK_K + key[:, None]))
            acc_rest = acc_rest * fade[:, None] + product(codes, rest)
        largest = grown
        block = upcoming

    listed = first < last
    share = 1.0 / tl.where(listed, total, 1.0)
    place = tl.program_id(0) * QUERIES + query
    token = token_at(order, head, place, tokens, text, BLOCK_Q)
    to = out + (plane * tokens + token)[:, None] * SIZE
    _finish(acc * share[:, None], to, token, channel, plane, v_scale, v_mean, listed, SIZE, CODED)
    if REST_PV:
        _finish(acc_rest * share[:, None], to, token, rest_pv, plane, v_scale, v_mean, listed, SIZE, CODED)


@triton.jit
def interleaved(x):
    """Return ``[queries, keys]`` with the keys in the order of packed FP8 values,
    :func:`qdiff.attention.kernels.pack.place_of`.
    """
    split = tl.reshape(x, [x.shape[0], x.shape[1] // 16, 2, 4, 2])
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), [x.shape[0], x.shape[1]])


@triton.jit
def _block(entries, number, last, ahead, text_columns, columns, MATRIX: tl.constexpr):
    """Return the block of keys that comes at ``number``; any block from ``last`` on."""
    if MATRIX:
        listed = tl.load(entries + number, mask=(number >= ahead) & (number < last), other=0)
        block = tl.where(number < ahead, number, listed + text_columns)
        block = tl.minimum(tl.maximum(block, 0), columns - 1)
    else:
        block = tl.load(entries + number, mask=number < last, other=0)
    return block


@triton.jit
def _finish(result, to, token, channel, plane, v_scale, v_mean, listed, SIZE: tl.constexpr, CODED: tl.constexpr):
    """Scale ``result [queries, channels]``, add the mean of the values, and write the sum where the tokens are."""
    there = channel < SIZE
    if CODED:
        scale = tl.load(v_scale + plane * SIZE + channel, mask=there, other=0.0)
        mean = tl.load(v_mean + plane * SIZE + channel, mask=there, other=0.0)
        result = result * scale[None, :] + tl.where(listed, mean, 0.0)[None, :]
    tl.store(to + channel[None, :], result.to(to.dtype.element_ty), mask=(token >= 0)[:, None] & there[None, :])


@dataclass(frozen=True)
class Launch:
    """Constants of one compiled kernel. What is left open is such that every GPU has the shared memory for it.

    Args:
        size: of a head.
        numerics: what is computed with.
        block_q, block_k: of the tiling.
        partial: whether there are places of keys without a token.
        scale: of the scores; ``None``: ``size ** -0.5``.
        queries: of a program, a divisor of ``block_q``; ``None``: 64.
        tile: keys taken at a time, a divisor of ``block_k``; ``None``: 64, or the block if that is smaller.
        warps: of a program; ``None``: one for each 16 queries.
        stages: of the pipeline of loads; ``None``: 3, or 2 in BF16, whose tiles are twice as large.
        matrix: whether the lists are given as a graph has them, bounds and blocks, instead of row by row.

    Raises:
        InputError: what the kernel does not compute.
    """

    size: int
    numerics: Numerics
    block_q: int
    block_k: int
    partial: bool = True
    scale: float | None = None
    queries: int | None = None
    tile: int | None = None
    warps: int | None = None
    stages: int | None = None
    matrix: bool = False

    def __post_init__(self) -> None:
        if self.numerics.output is None:
            raise InputError(
                f"the attention kernel does not compute {self.numerics.name!r}", "bf16, int8_fp8 and fp8 it does"
            )
        if not 32 <= self.size <= 128:
            raise InputError(f"the attention kernel takes heads of 32 to 128 channels, not {self.size}")
        if self.block_q not in (64, 128) or self.block_k not in (32, 64, 128):
            raise InputError(
                f"the attention kernel has no blocks of {self.block_q} x {self.block_k}",
                "it takes 64 or 128 queries and 32, 64 or 128 keys",
            )
        if self.keys not in (32, 64, 128) or self.block_k % self.keys:
            raise InputError(
                f"a block of {self.block_k} keys has no tiles of {self.keys}", "take 32, 64 or 128, a divisor"
            )
        if self.rows not in (64, 128) or self.block_q % self.rows:
            raise InputError(f"a block of {self.block_q} queries has no parts of {self.rows}", "take 64 or 128")
        if self.scale is not None and not self.scale > 0:
            raise InputError(f"the attention kernel needs a scale of the scores above 0, not {self.scale}")

    @property
    def rows(self) -> int:
        """Return queries of a program."""
        return PROGRAM if self.queries is None else self.queries

    @property
    def keys(self) -> int:
        """Return keys taken at a time."""
        return min(TILE, self.block_k) if self.tile is None else self.tile

    @property
    def constants(self) -> dict[str, object]:
        """Return the kernel's compile-time arguments."""
        widths = Widths.of(self.size, self.numerics)
        scale = self.size**-0.5 if self.scale is None else self.scale
        return {
            "SCALE": scale * math.log2(math.e),
            "SIZE": self.size,
            "MAIN": widths.main,
            "REST_QK": widths.rest_qk,
            "REST_PV": widths.rest_pv,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "QUERIES": self.rows,
            "TILE": self.keys,
            "CODED": self.numerics.coded,
            "PARTIAL": self.partial,
            "MATRIX": self.matrix,
        }

    @property
    def options(self) -> dict[str, int]:
        """Return the compiler's options."""
        warps = self.warps or self.rows // 16
        stages = self.stages or (3 if self.numerics.coded else 2)
        return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def is_partial(tiling: Tiling) -> bool:
    """Return whether blocks of keys have places without a token."""
    return bool(tiling.text % tiling.block_k or tiling.ordered % tiling.block_k)


def attend_packed(
    operands: Operands, order: Tensor, rows: tuple[Tensor, Tensor], tiling: Tiling, launch: Launch, out: Tensor
) -> Tensor:
    """Write the attention alone, of operands that are packed already, into ``out [batch, heads, tokens, size]``, and
    return it.

    Args:
        operands: packed queries, keys and values.
        order: int32 ``[heads, ordered]``.
        rows: :meth:`qdiff.attention.lists.BlockLists.by_row`, or where ``launch`` says so ``bounds`` and ``blocks`` of
            :class:`qdiff.attention.lists.BlockLists`, both int32.
        tiling: how the sequence is cut into blocks.
        launch: constants of the kernel.
        out: which is overwritten.
    """
    batch, heads = out.shape[:2]
    ends, entries = rows
    nothing = operands.q  # a pointer that a kernel without scales does not read
    scales = operands.q_scale, operands.k_scale, operands.v_scale, operands.v_mean
    programs = (tiling.text_rows + tiling.rows) * (launch.block_q // launch.rows)
    sparse_attention_kernel[(programs, heads, batch)](
        operands.q,
        operands.k,
        operands.v,
        *(nothing if scale is None else scale for scale in scales),
        order,
        ends,
        entries,
        tiling.tokens,
        tiling.text,
        entries.shape[1] if launch.matrix else 0,
        out,
        **launch.constants,
        **launch.options,
    )
    return out
