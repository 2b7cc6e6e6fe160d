"""The custom op ``qdiff::sparse_attention``: what modules are written with, and export translates.

The lists of all attentions of a model are one matrix (:mod:`qdiff.attention.lists`), so that a graph takes them as two inputs.
``first`` says where this attention's heads begin in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.attention import gathered
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import numerics_named


@torch.library.custom_op("qdiff::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    blocks: Tensor,
    bounds: Tensor,
    first: int,
    text: int,
    block_q: int,
    block_k: int,
    numerics: str,
    scale: float,
) -> Tensor:
    """Attention that reads, for every block of queries, the blocks of keys on its list.

    Args:
        q, k, v: ``[batch, heads, tokens, size]``.
        order: integers ``[heads, tokens - text]``, as :meth:`qdiff.attention.lists.Tiling.places` takes it.
        blocks, bounds: as in :class:`qdiff.attention.lists.BlockLists`.
        first: entry of ``bounds`` at which the first of these heads begins.
        text, block_q, block_k: as in :class:`qdiff.attention.lists.Tiling`.
        numerics: a name of :data:`qdiff.attention.numerics.NUMERICS`.
        scale: of the scores.

    Returns:
        ``[batch, heads, tokens, size]`` in ``q``'s dtype; a query that reads nothing gets zeros.

    Raises:
        InputError: lists that do not cut as said.
        UsageError: unknown numerics.
    """
    tiling = Tiling(q.shape[2], text, block_q, block_k)
    own = bounds[first : first + q.shape[1] + 1]
    lists = BlockLists(blocks[:, int(own[0]) : int(own[-1])], own - own[0])
    return gathered.attend(q, k, v, order, lists, tiling, numerics_named(numerics), scale)


@sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    blocks: Tensor,
    bounds: Tensor,
    first: int,
    text: int,
    block_q: int,
    block_k: int,
    numerics: str,
    scale: float,
) -> Tensor:
    return torch.empty_like(q)
