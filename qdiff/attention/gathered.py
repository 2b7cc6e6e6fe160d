"""Block-sparse attention in plain torch: the blocks of a few rows are gathered, then multiplied as one batch.

A CPU gains from skipping only if what is left stays one large product. Gathering for a whole head at once writes more memory
than the caches hold, and fresh memory costs more than the products; one workspace for :data:`TOGETHER` rows, used again and
again, does neither. Putting tokens in order and back costs as much as a third of that again; the same in ONNX Runtime is faster
(docs/log, ``python -m bench.attention``). On a GPU it is launches that cost, so there all samples are computed at once.

The same function computes all numerics: codes are multiplied back to numbers first, so a CPU gains nothing from them, but the
result is what the codes give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.attention.lists import NOTHING, BlockLists, Tiling
from qdiff.attention.numerics import PROBABILITY_SCALE, Numerics
from qdiff.attention.packing import from_places, pack
from qdiff.formats import scales as formats
from qdiff.formats.table import format_named

TOGETHER = 8


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    lists: BlockLists,
    tiling: Tiling,
    numerics: Numerics,
    scale: float | None = None,
) -> Tensor:
    """Return shapes and meaning as :func:`qdiff.attention.oracle.attend`, in ``q``'s dtype; computed in float32."""
    packed = pack(q, k, v, order, tiling, numerics)
    queries, keys, values = packed.values(tiling)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = torch.empty_like(queries)
    samples = at_once(queries)
    space = _Workspace(lists, tiling, queries[:samples])
    for first in range(0, len(q), samples):
        some = slice(first, first + samples)
        for head in range(lists.heads):
            operands = queries[some, head], keys[some, head], values[some, head]
            _head(*operands, scale, lists.of(head), tiling, numerics, packed.filled, space, result[some, head])
    if packed.v_mean is not None:
        result += packed.v_mean
        if NOTHING in lists.blocks or bool((lists.bounds.diff() == 0).any()):
            _blank_rows(result, lists, tiling)
    return from_places(result, tiling.places(order, tiling.block_q), tiling.tokens).to(q.dtype)


def at_once(x: Tensor) -> int:
    """Return how many samples of ``x`` are computed at once."""
    return 1 if x.device.type == "cpu" else max(1, len(x))


@dataclass(frozen=True)
class Follow:
    """:func:`attend` with its lists, as a function of queries, keys and values."""

    order: Tensor
    lists: BlockLists
    tiling: Tiling
    numerics: Numerics

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.order, self.lists, self.tiling, self.numerics)


class _Workspace:
    """Memory for the gathered keys and values and the scores of :data:`TOGETHER` rows of the widest head, for some samples."""

    def __init__(self, lists: BlockLists, tiling: Tiling, queries: Tensor) -> None:
        width = len(queries) * (int(lists.bounds.diff().max()) + tiling.text_columns)
        self.keys = queries.new_empty(TOGETHER * width * tiling.block_k * queries.shape[-1])
        self.values = torch.empty_like(self.keys)
        self.scores = queries.new_empty(TOGETHER * tiling.block_q * width * tiling.block_k)


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    blocks: Tensor,
    tiling: Tiling,
    numerics: Numerics,
    filled: Tensor,
    space: _Workspace,
    result: Tensor,
) -> None:
    """Write into ``result`` the attention of one head: ``q [samples, places of queries, size]``, ``k``, ``v [samples,
    places of keys, size]``.
    """
    samples, size, text = len(q), q.shape[2], tiling.text_columns
    first = tiling.text_rows * tiling.block_q
    if first:
        _products(q[:, :first], k, v, scale, numerics, ~filled[None, None], None, result[:, :first])
    prefix = torch.arange(text, device=blocks.device).expand(len(blocks), -1)
    lists = torch.cat([prefix, blocks.long().add(text).masked_fill(blocks == NOTHING, NOTHING)], dim=1)
    if lists.shape[1] == 0:
        result[:, first:] = 0
        return
    rows_q, rows_out = (x[:, first:].unflatten(1, (-1, tiling.block_q)) for x in (q, result))
    cells_k, cells_v = (x.unflatten(1, (-1, tiling.block_k)) for x in (k, v))
    partial = not bool(filled.all()) or NOTHING in blocks
    empty = ~filled.view(-1, tiling.block_k)
    for start in range(0, len(lists), TOGETHER):
        these = lists[start : start + TOGETHER]
        chosen = these.clamp_min(0).flatten()
        shape = (samples, len(chosen), tiling.block_k, size)
        read_k, read_v = (
            torch.index_select(cells, 1, chosen, out=memory[: math.prod(shape)].view(shape)).view(
                samples * len(these), -1, size
            )
            for cells, memory in ((cells_k, space.keys), (cells_v, space.values))
        )
        hidden = None
        if partial:
            hidden = (empty[chosen].view(*these.shape, -1) | (these == NOTHING)[..., None]).flatten(1)[:, None]
            hidden = hidden.repeat(samples, 1, 1)
        rows = slice(start, start + TOGETHER)
        asked, out = rows_q[:, rows].flatten(0, 1), rows_out[:, rows]
        flat = out.flatten(0, 1)  # of one sample no copy
        _products(asked, read_k, read_v, scale, numerics, hidden, space.scores, flat)
        if samples > 1:
            out.copy_(flat.view_as(out))


def _products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    numerics: Numerics,
    hidden: Tensor | None,
    memory: Tensor | None,
    result: Tensor,
) -> None:
    """Write ``softmax(q kᵀ scale) v`` into ``result`` for ``[rows, queries, size]`` and ``[rows, keys, size]``.

    Args:
        q: ``[rows, queries, size]``.
        k: ``[rows, keys, size]``.
        v: ``[rows, keys, size]``.
        scale: of the scores.
        numerics: formats of the operands.
        hidden: bool ``[rows, 1, keys]``: keys that are left out.
        memory: room for the scores.
        result: ``[rows, queries, size]``, which is overwritten.
    """
    shape = (len(q), q.shape[1], k.shape[1])
    scores = q.new_empty(shape) if memory is None else memory[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=scale, out=scores)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    if numerics.output is None and hidden is None:
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(scores, v, out=result)
        return
    scores -= scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    scores.exp_()
    total = scores.sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    torch.bmm(rounded(scores, numerics), v, out=result)
    result /= total


def rounded(probabilities: Tensor, numerics: Numerics) -> Tensor:
    """Return the unnormalised probabilities, at most 1, in the format of the numerics."""
    if numerics.output is None:
        return probabilities
    if not numerics.coded:
        return probabilities.to(getattr(torch, numerics.output)).to(probabilities.dtype)
    step = torch.tensor(1 / PROBABILITY_SCALE, device=probabilities.device)
    return formats.quantize_dequantize(probabilities, step, format_named(numerics.output))


def _blank_rows(result: Tensor, lists: BlockLists, tiling: Tiling) -> None:
    """Set rows that read nothing to zero: they do not get the mean of the values either."""
    if tiling.text:
        return  # everything reads the text
    blank = ~lists.masks(tiling.columns).any(dim=2).repeat_interleave(tiling.block_q, dim=1)
    result.masked_fill_(blank[..., None], 0.0)
