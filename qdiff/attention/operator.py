"""The custom op ``qdiff::sparse_attention``: what modules are written with, and export translates.

The lists of all attentions of a model are one matrix (:mod:`qdiff.attention.lists`), so that a graph takes them as two inputs.
``first`` says where this attention's heads begin in it.

In host memory :mod:`qdiff.attention.gathered` computes it, on a GPU a Triton kernel, which has no numerics ``float``: those go
through torch there too. The kernel's own form of the lists is made at the first call and kept as long as the lists are the
same tensors with the same content. Gradients: :mod:`qdiff.attention.gradient`.
"""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qdiff.attention import gathered
from qdiff.attention.gradient import gradients
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import numerics_named
from qdiff.errors import InputError, MissingDependencyError


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
    """Return the attention that reads, for every block of queries, the blocks of keys on its list.

    Args:
        q: ``[batch, heads, tokens, size]``.
        k: ``[batch, heads, tokens, size]``.
        v: ``[batch, heads, tokens, size]``.
        order: integers ``[heads, tokens - text]``, as :meth:`qdiff.attention.lists.Tiling.places` takes it.
        blocks: as in :class:`qdiff.attention.lists.BlockLists`.
        bounds: as in :class:`qdiff.attention.lists.BlockLists`.
        first: entry of ``bounds`` at which the first of these heads begins.
        text: as in :class:`qdiff.attention.lists.Tiling`.
        block_q: as in :class:`qdiff.attention.lists.Tiling`.
        block_k: as in :class:`qdiff.attention.lists.Tiling`.
        numerics: a name of :data:`qdiff.attention.numerics.NUMERICS`.
        scale: of the scores.

    Returns:
        ``[batch, heads, tokens, size]`` in ``q``'s dtype; a query that reads nothing gets zeros.

    Raises:
        InputError: lists that do not cut as said, or another number of tokens than the order has.
        UsageError: unknown numerics.
    """
    tiling = _tiling(q, order, text, block_q, block_k)
    lists = _lists(blocks, bounds, first, q.shape[1])
    return gathered.attend(q, k, v, order, lists, tiling, numerics_named(numerics), scale)


@sparse_attention.register_kernel("cuda")
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
    tiling, row = _tiling(q, order, text, block_q, block_k), numerics_named(numerics)
    if row.output is None:
        lists = _lists(_on_device(blocks, q.device), bounds, first, q.shape[1])
        return gathered.attend(q, k, v, order, lists, tiling, row, scale)
    rows = _rows(blocks, bounds, first, q.shape[1], tiling, q.device)
    return _gpu().attend_rows(q, k, v, order, rows, tiling, row, scale)


def _tiling(q: Tensor, order: Tensor, text: int, block_q: int, block_k: int) -> Tiling:
    if q.shape[2] != text + order.shape[1]:
        raise InputError(
            f"sparse attention was calibrated for {text + order.shape[1]:,} tokens and is given {q.shape[2]:,}",
            "leave the size as it was calibrated, or calibrate with --height, --width or --frames",
        )
    return Tiling(q.shape[2], text, block_q, block_k)


def _lists(blocks: Tensor, bounds: Tensor, first: int, heads: int) -> BlockLists:
    own = bounds[first : first + heads + 1]
    return BlockLists(blocks[:, int(own[0]) : int(own[-1])], own - own[0])


def _gpu() -> ModuleType:
    """Import and return :mod:`qdiff.attention.kernels.gpu`, only where a GPU asks for it.

    Raises:
        MissingDependencyError: there is no triton.
    """
    try:
        from qdiff.attention.kernels import gpu
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        message = "block-sparse attention on a GPU needs triton"
        raise MissingDependencyError(message, "pip install 'qdiff-deploy[kernel]'") from None
    return gpu


# By the tensor of the blocks, as long as it lives: its version, and what was made of that version.
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _on_device(blocks: Tensor, device: torch.device) -> Tensor:
    """Return the blocks there, copied once and kept as :func:`_rows` keeps its own."""
    if blocks.is_inference() or blocks.device == device:
        return blocks.to(device)
    version, kept = _KEPT.get(blocks, (None, {}))
    if version != blocks._version:
        kept = {}
        _KEPT[blocks] = blocks._version, kept
    if device not in kept:
        kept[device] = blocks.to(device)
    copy: Tensor = kept[device]
    return copy


def _rows(
    blocks: Tensor, bounds: Tensor, first: int, heads: int, tiling: Tiling, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the lists as the kernel reads them, kept from call to call. What was made in inference mode cannot be told
    from its own later content, and is not kept.
    """
    if blocks.is_inference() or bounds.is_inference():
        return _gpu().on_device(_lists(blocks, bounds, first, heads), tiling, device)
    version, kept = _KEPT.get(blocks, (None, {}))
    if version != blocks._version:
        kept = {}
        _KEPT[blocks] = blocks._version, kept
    key = id(bounds), bounds._version, first, heads, tiling, device
    known, rows = kept.get(key, (None, None))
    if known is None or known() is not bounds:
        rows = _gpu().on_device(_lists(blocks, bounds, first, heads), tiling, device)
        kept[key] = weakref.ref(bounds), rows
    return rows


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.first, ctx.text, ctx.block_q, ctx.block_k, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, order, blocks, bounds = ctx.saved_tensors
    tiling = _tiling(q, order, ctx.text, ctx.block_q, ctx.block_k)
    lists = _lists(blocks, bounds, ctx.first, q.shape[1])
    found = gradients(q, k, v, order, lists, tiling, ctx.scale, of_output)
    return (*found, *[None] * 9)


sparse_attention.register_autograd(_backward, setup_context=_keep)
