"""What :func:`qdiff.attention.packing.pack` makes, on a GPU and laid out for the attention kernel.

One pass writes queries or keys: a program takes the tokens of one block wherever they lie, subtracts the mean, and has the
block's scale before anything is written. Another writes the values, transposed. Before them one pass finds the means of keys and
values and the range of the values (:mod:`qdiff.attention.kernels.moments`), so queries are read once, keys and values twice.
Codes and scales are packing's, bit for bit where the means are: division rounds as IEEE's, and both round to the nearest, ties
to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdiff.attention.kernels.moments import Moments, moments_of
from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import Numerics
from qdiff.attention.packing import Packed
from qdiff.formats.table import format_named

PART = 64  # places of values, at most, that one program transposes
WARPS = 8  # of a program that packs a block of queries or keys
# The interpreter's casts to FP8 and BF16 cut or lose a carry into the exponent, and its products take BF16 for integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TINY = tl.constexpr(2.0**-100)
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding it to a float32 of less than 2^22 leaves no bits for a fraction


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 to a number format, to nearest, ties to even. What E4M3 does not hold (beyond +-448) must not be
    there.
    """
    if dtype == tl.int8:
        result = (x + TO_INTEGER - TO_INTEGER).to(tl.int8)
    elif INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        size = tl.abs(x)
        step = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 0.015625) * 0.125
        size = (size / step + TO_INTEGER - TO_INTEGER) * step
        result = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True).to(dtype)
    elif INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True).to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def inverse_of(x):
    """Return ``1 / x`` for :func:`divided`; 0 where that is near the end of float32's range, and what is divided comes
    to nothing.
    """
    return tl.where(x > TINY, tl.div_rn(1.0, x), 0.0)


@triton.jit
def divided(x, by, inverse):
    """Return ``x / by``, rounded as IEEE's division, in three operations, given :func:`inverse_of` (Markstein,
    Computation of elementary functions on the IBM RISC System/6000 processor, 1990, theorem 8). The interpreter's
    ``fma`` rounds twice.
    """
    if INTERPRETED:
        result = tl.where(inverse > 0, tl.div_rn(x, by + 0 * x), 0.0)
    else:
        quotient = x * inverse
        result = tl.fma(tl.fma(-quotient, by, x), inverse, quotient)
    return result


@triton.jit
def product(a, b, acc=None):
    """Return ``a @ b``, added to ``acc`` where there is one. Without it, FP8 products have an accumulator of their own:
    for other GPUs than a Hopper the compiler would fuse what is added to it afterwards.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == tl.float8e4nv and acc is None:
        result = tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    elif a.dtype == tl.int8:
        result = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        result = tl.dot(a, b, acc)
    return result


@triton.jit
def token_at(order, head, place, tokens, text, BLOCK: tl.constexpr):
    """Return the token that lies at ``place``, -1 where none does: :meth:`qdiff.attention.lists.Tiling.places`, one
    entry at a time.
    """
    rank = place - tl.cdiv(text, BLOCK) * BLOCK
    ordered = (rank >= 0) & (rank < tokens - text)
    token = tl.load(order + head.to(tl.int64) * (tokens - text) + rank, mask=ordered, other=0) + text
    return tl.where(ordered, token, tl.where(place < text, place, -1))


@triton.jit
def place_of(column, CODED: tl.constexpr):
    """Return the place of the keys that lies in a column of the packed values. FP8 ones are put so that a thread's
    probabilities, columns ``8 b + 2 t + e`` of 16 as a tensor core returns scores, are what it hands in: columns ``4 t
    + 2 b + e``.
    """
    if CODED:
        column = (column & -16) + (column & 2) * 4 + ((column >> 2) & 3) * 2 + (column & 1)
    return column


@triton.jit
def _tokens(x, token, channel, stride_token, SIZE: tl.constexpr):
    """Return rows of ``x`` as float32 ``[tokens, channels]``, zeros where no token lies."""
    there = (token >= 0)[:, None] & (channel < SIZE)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride_token + channel[None, :], mask=there, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["tokens", "text"])
def pack_rows_kernel(
    x,
    mean,
    order,
    tokens,
    text,
    stride_batch,
    stride_head,
    stride_token,
    codes,
    scales,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Pack one block of queries or keys; the grid is ``(blocks, heads, batch)``.

    ``x [batch, heads, tokens, SIZE]`` with any strides but the last, ``mean`` float32 ``[batch, heads, SIZE]`` (``None`` where
    not ``CENTRED``) to ``codes [batch, heads, places, WIDTH]`` and ``scales [batch, heads, blocks]``. ``LARGEST`` is that of the
    format; 0: there are no scales. ``CHANNELS`` is a power of two that holds ``WIDTH``.
    """
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    plane = sample * tl.num_programs(1) + head
    channel, place = tl.arange(0, CHANNELS), block * BLOCK + tl.arange(0, BLOCK)
    token = token_at(order, head, place, tokens, text, BLOCK)
    values = _tokens(x + sample * stride_batch + head.to(tl.int64) * stride_head, token, channel, stride_token, SIZE)
    if CENTRED:
        centre = tl.load(mean + plane * SIZE + channel, mask=channel < SIZE, other=0.0)
        values = tl.where((token >= 0)[:, None], values - centre[None, :], 0.0)
    if LARGEST > 0:
        amax = tl.max(tl.max(tl.abs(values), 1), 0)
        scale = tl.where(amax > 0, tl.div_rn(amax, LARGEST), 1.0)
        tl.store(scales + plane * tl.num_programs(0) + block, scale)
        values = divided(values, scale, inverse_of(scale))
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    result = cast(values, codes.dtype.element_ty)
    codes += plane * tl.num_programs(0) * (BLOCK * WIDTH)
    tl.store(codes + place.to(tl.int64)[:, None] * WIDTH + channel[None, :], result, mask=(channel < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "text"])
def pack_columns_kernel(
    x,
    mean,
    scales,
    order,
    tokens,
    text,
    stride_batch,
    stride_head,
    stride_token,
    codes,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    CODED: tl.constexpr,
):
    """Pack ``PART`` places of the values, transposed and put in the order of :func:`place_of`; the grid is ``(places /
    PART, heads, batch)``.

    ``x`` as in :func:`pack_rows_kernel`, ``mean`` and ``scales`` float32 ``[batch, heads, SIZE]`` (``None`` if not ``CODED``) to
    ``codes [batch, heads, blocks, WIDTH, BLOCK]``. ``BLOCK`` is that of the keys.
    """
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    plane = sample * tl.num_programs(1) + head
    channel, column = tl.arange(0, CHANNELS), tl.program_id(0) * PART + tl.arange(0, PART)
    token = token_at(order, head, place_of(column, CODED), tokens, text, BLOCK)
    values = _tokens(x + sample * stride_batch + head.to(tl.int64) * stride_head, token, channel, stride_token, SIZE)
    if CODED:
        centre = tl.load(mean + plane * SIZE + channel, mask=channel < SIZE, other=0.0)
        scale = tl.load(scales + plane * SIZE + channel, mask=channel < SIZE, other=1.0)
        values = tl.where((token >= 0)[:, None], values - centre[None, :], 0.0)
        values = divided(values, scale[None, :], inverse_of(scale)[None, :])
        values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    result = cast(values, codes.dtype.element_ty)
    codes += (plane * (tl.num_programs(0) * PART) + tl.program_id(0) * PART // BLOCK * BLOCK) * WIDTH
    to = codes + channel[:, None] * BLOCK + (column % BLOCK)[None, :]
    tl.store(to, tl.trans(result), mask=(channel < WIDTH)[:, None])


@dataclass(frozen=True)
class Widths:
    """The channels of a head as powers of two: those that are computed first, and the rest, padded to what a tensor core takes.

    Args:
        main: channels of the first part.
        rest_qk, rest_pv: channels of the second part in the scores and in the output; 0: there is none.
    """

    main: int
    rest_qk: int
    rest_pv: int

    @classmethod
    def of(cls, size: int, numerics: Numerics) -> Widths:
        """Return the widths for a head of ``size`` channels: two parts as long as they are shorter than one."""
        main = 1 << (size.bit_length() - 1)
        rest = size - main
        if rest == 0:
            return cls(main, 0, 0)
        padded = triton.next_power_of_2(rest)
        rest_qk, rest_pv = max(padded, 32 if numerics.coded else 16), max(padded, 16)
        return cls(main, rest_qk, rest_pv) if rest_qk < main else cls(2 * main, 0, 0)

    @property
    def qk(self) -> int:
        """Return channels of packed queries and keys."""
        return self.main + self.rest_qk

    @property
    def pv(self) -> int:
        """Return channels of packed values."""
        return self.main + self.rest_pv

    def channels(self, size: int) -> dict[str, int]:
        """Return compile-time arguments of both kernels that pack heads of ``size`` channels."""
        return {"SIZE": size, "CHANNELS": max(map(triton.next_power_of_2, (self.qk, self.pv)))}


@dataclass(frozen=True)
class Operands:
    """:class:`qdiff.attention.packing.Packed` as the kernel reads it.

    Args:
        q, k: ``[batch, heads, places, width]``, channels padded with zeros (:class:`Widths`).
        v: ``[batch, heads, blocks, width, block_k]``: every block transposed; FP8 ones in the order of :func:`place_of`.
        q_scale, k_scale: float32 ``[batch, heads, blocks]``.
        v_scale, v_mean: float32 ``[batch, heads, size]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    v_mean: Tensor | None = None

    @classmethod
    def of(cls, packed: Packed, tiling: Tiling, numerics: Numerics) -> Operands:
        """Return the same operands, laid out anew."""
        size = packed.k.shape[-1]
        widths = Widths.of(size, numerics)
        q, k, v = (
            torch.nn.functional.pad(x.view(torch.uint8) if x.itemsize == 1 else x, (0, width - size)).view(x.dtype)
            for x, width in ((packed.q, widths.qk), (packed.k, widths.qk), (packed.v, widths.pv))
        )
        v = v.unflatten(2, (-1, tiling.block_k)).mT
        if packed.v_scale is None or packed.v_mean is None:
            return cls(q.contiguous(), k.contiguous(), v.contiguous())
        v = v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4).contiguous()  # place_of
        scales = packed.q_scale, packed.k_scale, packed.v_scale[:, :, 0], packed.v_mean[:, :, 0]
        return cls(q.contiguous(), k.contiguous(), v, *scales)


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    tiling: Tiling,
    numerics: Numerics,
    moments: Moments | None = None,
) -> Operands:
    """Put the tokens in order and quantize them, as :func:`qdiff.attention.packing.pack` does.

    Args:
        q: ``[batch, heads, tokens, size]``, any float dtype and any strides of the first three axes.
        k: ``[batch, heads, tokens, size]``, any float dtype and any strides of the first three axes.
        v: ``[batch, heads, tokens, size]``, any float dtype and any strides of the first three axes.
        order: int32 ``[heads, ordered]``, contiguous, on the same device.
        tiling: how the sequence is cut into blocks.
        numerics: formats of the operands.
        moments: of ``k`` and ``v``, if they are known.
    """
    size = q.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    widths = Widths.of(size, numerics)
    constants = widths.channels(size)
    if not numerics.coded:
        dtype = getattr(torch, numerics.scores or "")
        q_codes, _ = _rows(q, None, order, tiling, tiling.block_q, dtype, 0.0, widths.qk, constants)
        k_codes, _ = _rows(k, None, order, tiling, tiling.block_k, dtype, 0.0, widths.qk, constants)
        return Operands(q_codes, k_codes, _columns(v, None, None, order, tiling, dtype, widths.pv, constants))
    element = format_named(numerics.scores or "").element
    dtype, largest = getattr(torch, element.storage), float(element.largest)
    known = moments_of(k, v, numerics) if moments is None else moments
    v_type = getattr(torch, format_named(numerics.output or "").element.storage)
    q_codes, q_scale = _rows(q, None, order, tiling, tiling.block_q, dtype, largest, widths.qk, constants)
    k_codes, k_scale = _rows(k, known.k_mean, order, tiling, tiling.block_k, dtype, largest, widths.qk, constants)
    v_codes = _columns(v, known.v_mean, known.v_scale, order, tiling, v_type, widths.pv, constants)
    return Operands(q_codes, k_codes, v_codes, q_scale, k_scale, known.v_scale, known.v_mean)


def _rows(
    x: Tensor,
    mean: Tensor | None,
    order: Tensor,
    tiling: Tiling,
    block: int,
    dtype: torch.dtype,
    largest: float,
    width: int,
    constants: dict[str, int],
) -> tuple[Tensor, Tensor]:
    batch, heads = x.shape[:2]
    blocks = -(-tiling.text // block) - (-tiling.ordered // block)
    codes = x.new_empty(batch, heads, blocks * block, width, dtype=dtype)
    scales = x.new_empty(batch, heads, blocks, dtype=torch.float32)
    pack_rows_kernel[(blocks, heads, batch)](
        x,
        mean,
        order,
        tiling.tokens,
        tiling.text,
        *x.stride()[:3],
        codes,
        scales,
        WIDTH=width,
        BLOCK=block,
        LARGEST=largest,
        CENTRED=mean is not None,
        num_warps=WARPS,
        enable_fp_fusion=False,
        **constants,
    )
    return codes, scales


def _columns(
    x: Tensor,
    mean: Tensor | None,
    scales: Tensor | None,
    order: Tensor,
    tiling: Tiling,
    dtype: torch.dtype,
    width: int,
    constants: dict[str, int],
) -> Tensor:
    batch, heads = x.shape[:2]
    blocks, part = tiling.text_columns + tiling.columns, min(PART, tiling.block_k)
    codes = x.new_empty(batch, heads, blocks, width, tiling.block_k, dtype=dtype)
    pack_columns_kernel[(blocks * tiling.block_k // part, heads, batch)](
        x,
        mean,
        scales,
        order,
        tiling.tokens,
        tiling.text,
        *x.stride()[:3],
        codes,
        WIDTH=width,
        BLOCK=tiling.block_k,
        PART=part,
        CODED=mean is not None,
        enable_fp_fusion=False,
        **constants,
    )
    return codes
