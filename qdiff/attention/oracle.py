"""Attention with block lists in float64, written as the definition: every score is computed, and those off the lists are left
out. What the executors are held against; it skips nothing and needs ``tokens^2`` numbers for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.attention.lists import BlockLists, Tiling


def token_mask(order: Tensor, lists: BlockLists, tiling: Tiling) -> Tensor:
    """Return which token may read which, in the model's own order of tokens: bool ``[heads, tokens, tokens]``."""
    masks = lists.masks(tiling.columns)
    read = torch.ones(lists.heads, tiling.tokens, tiling.tokens, dtype=torch.bool)
    position = torch.argsort(order.long(), dim=1)  # where the tokens lie
    for head in range(lists.heads):
        pairs = masks[head][position[head] // tiling.block_q][:, position[head] // tiling.block_k]
        read[head, tiling.text :, tiling.text :] = pairs
    return read


def attend(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, lists: BlockLists, tiling: Tiling, scale: float | None = None
) -> Tensor:
    """Return ``softmax(q kᵀ scale) v`` over the tokens that each one may read, float64 ``[batch, heads, tokens,
    size]``. A token that reads none gets zeros.

    Args:
        q: ``[batch, heads, tokens, size]``.
        k: ``[batch, heads, tokens, size]``.
        v: ``[batch, heads, tokens, size]``.
        order: ``[heads, ordered]`` (:meth:`qdiff.attention.lists.Tiling.places`).
        lists: the blocks of keys that each block of queries reads.
        tiling: how the sequence is cut into blocks.
        scale: of the scores; ``None``: ``size ** -0.5``.
    """
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    probabilities = scores.masked_fill(~token_mask(order, lists, tiling), -torch.inf).softmax(dim=-1)
    return probabilities.nan_to_num(0.0) @ v
