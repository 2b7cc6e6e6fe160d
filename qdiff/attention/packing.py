"""Queries, keys and values in a head's order, cut into whole blocks, in the formats of a numerics: what executors compute with.

Shapes: ``batch, heads, places, size``. A place where no token lies holds zeros, and no query reads it as a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import Numerics
from qdiff.formats import scales as formats
from qdiff.formats.table import format_named


@dataclass(frozen=True)
class Packed:
    """The operands of one attention.

    Args:
        q, k, v: codes (int8 or float8_e4m3fn), or values where the numerics has no codes: ``[batch, heads, places, size]``, with
            places of queries and of keys.
        q_scale, k_scale: float32 ``[batch, heads, blocks]``: what codes of a block are multiplied with.
        v_scale: float32 ``[batch, heads, 1, size]``.
        v_mean: the same shape: what the output gets back.
        filled: bool ``[places of keys]``: where a token lies. The same for every head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    v_mean: Tensor | None
    filled: Tensor

    def values(self, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as float32, scales multiplied in."""
        q, k, v = self.q.float(), self.k.float(), self.v.float()
        if self.q_scale is None or self.k_scale is None or self.v_scale is None:
            return q, k, v
        q = q * self.q_scale.repeat_interleave(tiling.block_q, dim=2)[..., None]
        k = k * self.k_scale.repeat_interleave(tiling.block_k, dim=2)[..., None]
        return q, k, v * self.v_scale

    def score_scale(self, tiling: Tiling) -> Tensor:
        """Return what a product of codes stands for: float32 ``[batch, heads, places of queries, places of keys]``.

        Raises:
            ValueError: there are no codes.
        """
        if self.q_scale is None or self.k_scale is None:
            raise ValueError("operands without codes have no scales")
        rows = self.q_scale.repeat_interleave(tiling.block_q, dim=2)
        return rows[..., None] * self.k_scale.repeat_interleave(tiling.block_k, dim=2)[:, :, None]


def pack(q: Tensor, k: Tensor, v: Tensor, order: Tensor, tiling: Tiling, numerics: Numerics) -> Packed:
    """Put the tokens in order and quantize them; return the packed operands.

    Args:
        q: ``[batch, heads, tokens, size]``, any float dtype.
        k: ``[batch, heads, tokens, size]``, any float dtype.
        v: ``[batch, heads, tokens, size]``, any float dtype.
        order: as :meth:`qdiff.attention.lists.Tiling.places` takes it.
        tiling: how the sequence is cut into blocks.
        numerics: formats of the operands.
    """
    queries, keys = tiling.places(order, tiling.block_q), tiling.places(order, tiling.block_k)
    filled = keys[0] >= 0
    if not numerics.coded:
        dtype = q.dtype if numerics.scores is None else getattr(torch, numerics.scores)
        q, k, v = (at_places(x, places).to(dtype) for x, places in ((q, queries), (k, keys), (v, keys)))
        return Packed(q, k, v, None, None, None, None, filled)
    q, k, v = q.float(), k.float(), v.float()
    v_mean = v.mean(dim=2, keepdim=True)
    q_codes, q_scale = _by_block(at_places(q, queries), tiling.block_q, numerics.scores or "")
    k_codes, k_scale = _by_block(
        at_places(k - k.mean(dim=2, keepdim=True), keys), tiling.block_k, numerics.scores or ""
    )
    v_format = format_named(numerics.output or "")
    centred = at_places(v - v_mean, keys)
    v_scale = _scale(centred.abs().amax(dim=2, keepdim=True), v_format.element.largest)
    v_codes = formats.quantize(centred, v_scale, v_format)
    return Packed(q_codes, k_codes, v_codes, q_scale, k_scale, v_scale, v_mean, filled)


def _by_block(x: Tensor, block: int, format: str) -> tuple[Tensor, Tensor]:
    blocks = x.unflatten(2, (-1, block))
    scale = _scale(blocks.abs().amax(dim=(3, 4), keepdim=True), format_named(format).element.largest)
    return formats.quantize(blocks, scale, format_named(format)).flatten(2, 3), scale[..., 0, 0]


def _scale(amax: Tensor, largest: float) -> Tensor:
    return torch.where(amax > 0, amax / largest, 1.0)


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Return ``x [batch, heads, tokens, size]`` at ``places [heads, n]`` (-1: zeros): ``[batch, heads, n, size]``."""
    batch, heads, tokens, size = x.shape
    first = torch.arange(heads, device=x.device)[:, None] * tokens
    flat = x.reshape(batch, heads * tokens, size)
    placed = flat.index_select(1, (places.clamp_min(0) + first).flatten()).view(batch, heads, -1, size)
    empty = places[0] < 0
    return placed.masked_fill(empty[:, None], 0.0) if bool(empty.any()) else placed


def from_places(x: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Return the way back of :func:`at_places`: ``[batch, heads, tokens, size]``."""
    batch, heads, _, size = x.shape
    there = places[0] >= 0
    first = torch.arange(heads, device=x.device)[:, None] * tokens
    result = x.new_empty(batch, heads * tokens, size)
    result.index_copy_(1, (places[:, there] + first).flatten(), x[:, :, there].reshape(batch, -1, size))
    return result.view(batch, heads, tokens, size)
