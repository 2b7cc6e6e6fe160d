"""Means of keys and values, and the range of the values, in one pass over both, for :mod:`qdiff.attention.kernels.pack`.

Many programs add up a span of tokens each, a second kernel adds those up. The largest magnitude of the values without their
mean is found without writing those: rounding is monotonic, so it is at the largest or at the smallest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdiff.attention.numerics import Numerics
from qdiff.formats.table import format_named

SPAN, LINES = 128, 16  # tokens that one program adds up, and how many at a time
JOINED = 64  # spans that are added up at a time


@triton.jit
def _cells(x, token, tokens, channel, stride_token, SIZE: tl.constexpr, other):
    there = (token < tokens)[:, None] & (channel < SIZE)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride_token + channel[None, :], mask=there, other=other).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["tokens"])
def moments_kernel(
    k,
    v,
    parts,
    tokens,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    LINES: tl.constexpr,
):
    """Write the sum of the keys, and sum, largest and smallest of the values, of ``SPAN`` tokens; the grid is ``(spans,
    heads, batch)``.

    ``k`` and ``v [batch, heads, tokens, SIZE]`` with any strides but the last to float32 ``parts [batch, heads, spans, 4,
    CHANNELS]``.
    """
    span, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    k += sample * k_batch + head.to(tl.int64) * k_head
    v += sample * v_batch + head.to(tl.int64) * v_head
    k_sum = tl.zeros([LINES, CHANNELS], tl.float32)
    v_sum = tl.zeros([LINES, CHANNELS], tl.float32)
    high = tl.full([LINES, CHANNELS], float("-inf"), tl.float32)
    low = tl.full([LINES, CHANNELS], float("inf"), tl.float32)
    for start in tl.range(0, SPAN, LINES):
        token = span * SPAN + start + tl.arange(0, LINES)
        k_sum += _cells(k, token, tokens, channel, k_token, SIZE, 0.0)
        values = _cells(v, token, tokens, channel, v_token, SIZE, 0.0)
        v_sum += values
        there = (token < tokens)[:, None]
        high = tl.maximum(high, tl.where(there, values, float("-inf")))
        low = tl.minimum(low, tl.where(there, values, float("inf")))
    parts += ((sample * tl.num_programs(1) + head) * tl.num_programs(0) + span) * (4 * CHANNELS) + channel
    tl.store(parts, tl.sum(k_sum, 0))
    tl.store(parts + CHANNELS, tl.sum(v_sum, 0))
    tl.store(parts + 2 * CHANNELS, tl.max(high, 0))
    tl.store(parts + 3 * CHANNELS, tl.min(low, 0))


@triton.jit(do_not_specialize=["tokens", "spans"])
def join_moments_kernel(
    parts,
    k_mean,
    v_mean,
    v_scale,
    tokens,
    spans,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Join the parts of :func:`moments_kernel`; the grid is ``(heads times batch,)``. Results are float32 ``[batch,
    heads, SIZE]``; ``LARGEST`` is the largest number of the values' format.
    """
    plane = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    k_sum = tl.zeros([LINES, CHANNELS], tl.float32)
    v_sum = tl.zeros([LINES, CHANNELS], tl.float32)
    high = tl.full([LINES, CHANNELS], float("-inf"), tl.float32)
    low = tl.full([LINES, CHANNELS], float("inf"), tl.float32)
    for start in tl.range(0, spans, LINES):
        span = start + tl.arange(0, LINES)
        there = (span < spans)[:, None]
        at = parts + ((plane * spans + span) * (4 * CHANNELS))[:, None] + channel[None, :]
        k_sum += tl.load(at, mask=there, other=0.0)
        v_sum += tl.load(at + CHANNELS, mask=there, other=0.0)
        high = tl.maximum(high, tl.load(at + 2 * CHANNELS, mask=there, other=float("-inf")))
        low = tl.minimum(low, tl.load(at + 3 * CHANNELS, mask=there, other=float("inf")))
    count = tokens.to(tl.float32)
    mean = tl.div_rn(tl.sum(v_sum, 0), count)
    amax = tl.maximum(tl.max(high, 0) - mean, mean - tl.min(low, 0))
    to, stored = plane * SIZE + channel, channel < SIZE
    tl.store(k_mean + to, tl.div_rn(tl.sum(k_sum, 0), count), mask=stored)
    tl.store(v_mean + to, mean, mask=stored)
    tl.store(v_scale + to, tl.where(amax > 0, tl.div_rn(amax, LARGEST), 1.0), mask=stored)


@dataclass(frozen=True)
class Moments:
    """What of keys and values has to be known before a code is written, each float32 ``[batch, heads, size]``."""

    k_mean: Tensor
    v_mean: Tensor
    v_scale: Tensor


def moments_of(k: Tensor, v: Tensor, numerics: Numerics) -> Moments:
    """Return one pass over ``k`` and ``v [batch, heads, tokens, size]``, of any float dtype and any strides of the
    first three axes.
    """
    batch, heads, tokens, size = k.shape
    channels, spans = triton.next_power_of_2(size), -(-tokens // SPAN)
    parts = k.new_empty(batch, heads, spans, 4, channels, dtype=torch.float32)
    made = Moments(*k.new_empty(3, batch, heads, size, dtype=torch.float32))
    sizes = {"SIZE": size, "CHANNELS": channels}
    grid = (spans, heads, batch)
    moments_kernel[grid](k, v, parts, tokens, *k.stride()[:3], *v.stride()[:3], SPAN=SPAN, LINES=LINES, **sizes)
    largest = float(format_named(numerics.output or "").element.largest)
    join_moments_kernel[(batch * heads,)](
        parts,
        made.k_mean,
        made.v_mean,
        made.v_scale,
        tokens,
        spans,
        LINES=JOINED,
        LARGEST=largest,
        num_warps=8,
        **sizes,
    )
    return made
