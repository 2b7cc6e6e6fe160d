"""Gradients of block-sparse attention: a model is trained while its attentions follow lists
(:mod:`qdiff.quantization.distillation`).

Probabilities are computed again for a few rows at a time, as FlashAttention does (arXiv 2205.14135, section 3.1), from float
operands: what the numerics of the forward rounds is passed straight through. Where a row reads nothing, everything is zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qdiff.attention.gathered import TOGETHER
from qdiff.attention.lists import NOTHING, BlockLists, Tiling
from qdiff.attention.packing import at_places, from_places


def gradients(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, lists: BlockLists, tiling: Tiling, scale: float, of_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a loss by ``q``, ``k`` and ``v``, in their dtypes; computed in float32, or in float64 if
    they are.

    Args:
        q: ``[batch, heads, tokens, size]``.
        k: ``[batch, heads, tokens, size]``.
        v: ``[batch, heads, tokens, size]``.
        order: as of :func:`qdiff.attention.gathered.attend`.
        lists: as of :func:`qdiff.attention.gathered.attend`.
        tiling: as of :func:`qdiff.attention.gathered.attend`.
        scale: as of :func:`qdiff.attention.gathered.attend`.
        of_output: ``[batch, heads, tokens, size]``, the loss's gradient by the attention's output.
    """
    precision = torch.promote_types(q.dtype, torch.float32)
    rows, columns = tiling.places(order, tiling.block_q), tiling.places(order, tiling.block_k)
    empty = (columns[0] < 0).view(-1, tiling.block_k)
    queries, outputs = (_blocks(x, rows, tiling.block_q, precision) for x in (q, of_output))
    keys, values = (_blocks(x, columns, tiling.block_k, precision) for x in (k, v))
    by_query, by_key, by_value = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for head in range(lists.heads):
        for some, read in _reads(lists.of(head).to(q.device), tiling):
            chosen, shape = read.clamp_min(0).flatten(), (len(q), len(read), -1, q.shape[-1])
            hidden = (empty[chosen].view(*read.shape, -1) | (read == NOTHING)[..., None]).flatten(1)[:, None]
            key, value = (x[:, head, chosen].reshape(shape) for x in (keys, values))
            query, output = queries[:, head, some], outputs[:, head, some]
            scores = (query @ key.mT * scale).masked_fill(hidden, -torch.inf)
            probabilities = scores.softmax(dim=-1).nan_to_num(0.0)
            change = output @ value.mT
            change = probabilities * (change - (change * probabilities).sum(dim=-1, keepdim=True)) * scale
            by_query[:, head, some] = change @ key
            cells = (len(q), len(chosen), tiling.block_k, q.shape[-1])
            by_key[:, head].index_add_(1, chosen, (change.mT @ query).view(cells))
            by_value[:, head].index_add_(1, chosen, (probabilities.mT @ output).view(cells))
    return (
        from_places(by_query.flatten(2, 3), rows, tiling.tokens).to(q.dtype),
        from_places(by_key.flatten(2, 3), columns, tiling.tokens).to(k.dtype),
        from_places(by_value.flatten(2, 3), columns, tiling.tokens).to(v.dtype),
    )


def _blocks(x: Tensor, places: Tensor, block: int, precision: torch.dtype) -> Tensor:
    return at_places(x.to(precision), places).unflatten(2, (-1, block))


def _reads(lists: Tensor, tiling: Tiling) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of one head, text among them, and the blocks of keys ``[rows, widest]`` that they read."""
    text = torch.arange(tiling.text_columns, device=lists.device)
    everything = torch.arange(tiling.text_columns + tiling.columns, device=lists.device)
    others = lists.long().add(tiling.text_columns).masked_fill(lists == NOTHING, NOTHING)
    parts = [everything.expand(tiling.text_rows, -1), torch.cat([text.expand(len(lists), -1), others], dim=1)]
    first = 0
    for part in parts:
        for start in range(0, len(part) if part.shape[1] else 0, TOGETHER):
            some = part[start : start + TOGETHER]
            yield slice(first + start, first + start + len(some)), some
        first += len(part)
