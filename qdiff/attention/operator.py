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
from typing import NamedTuple, Protocol, get_type_hints

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qdiff.attention import gathered
from qdiff.attention.gradient import gradients
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import numerics_named
from qdiff.errors import InputError, MissingDependencyError, option


class AttentionCall(NamedTuple):
    """One call of the op: its arguments, in the order of the op's schema, which is made from these fields.

    Args:
        q: ``[batch, heads, tokens, size]``.
        k: ``[batch, heads, tokens, size]``.
        v: ``[batch, heads, tokens, size]``.
        order: integers ``[heads, tokens - text]``, as :meth:`qdiff.attention.lists.Tiling.places` takes it.
        blocks: of all heads of the model, as in :class:`qdiff.attention.lists.BlockLists`.
        bounds: of all heads of the model, as in :class:`qdiff.attention.lists.BlockLists`.
        first: entry of ``bounds`` at which the first of these heads begins.
        text: as in :class:`qdiff.attention.lists.Tiling`.
        block_q: as in :class:`qdiff.attention.lists.Tiling`.
        block_k: as in :class:`qdiff.attention.lists.Tiling`.
        numerics: a name of :data:`qdiff.attention.numerics.NUMERICS`.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    order: Tensor
    blocks: Tensor
    bounds: Tensor
    first: int
    text: int
    block_q: int
    block_k: int
    numerics: str
    scale: float

    def tiling(self) -> Tiling:
        """Return how the tokens are cut.

        Raises:
            InputError: another number of tokens than the order has.
        """
        tokens = self.text + self.order.shape[1]
        if self.q.shape[2] != tokens:
            raise InputError(
                f"sparse attention was calibrated for {tokens:,} tokens and is given {self.q.shape[2]:,}",
                "leave the size as it was calibrated, or calibrate "
                f"with {option('height')}, {option('width')} or {option('frames')}",
            )
        return Tiling(tokens, self.text, self.block_q, self.block_k)

    def lists(self) -> BlockLists:
        """Return the lists of these heads."""
        own = self.bounds[self.first : self.first + self.q.shape[1] + 1]
        return BlockLists(self.blocks[:, int(own[0]) : int(own[-1])], own - own[0])

    def gathered(self) -> Tensor:
        """Return what :mod:`qdiff.attention.gathered` computes."""
        tiling, lists, numerics = self.tiling(), self.lists(), numerics_named(self.numerics)
        return gathered.attend(self.q, self.k, self.v, self.order, lists, tiling, numerics, self.scale)


_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", str: "str", float: "float"}
_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(AttentionCall).items())


@torch.library.custom_op("qdiff::sparse_attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def sparse_attention(*arguments: object) -> Tensor:
    """Return the attention that reads, for every block of queries, the blocks of keys on its list.

    Args:
        arguments: those of :class:`AttentionCall`.

    Returns:
        ``[batch, heads, tokens, size]`` in ``q``'s dtype; a query that reads nothing gets zeros.

    Raises:
        InputError: lists that do not cut as said, or another number of tokens than the order has.
        UsageError: unknown numerics.
    """
    return AttentionCall._make(arguments).gathered()


@sparse_attention.register_kernel("cuda")
def _(*arguments: object) -> Tensor:
    call = AttentionCall._make(arguments)
    tiling, row = call.tiling(), numerics_named(call.numerics)
    if row.output is None:
        return call._replace(blocks=_on_device(call.blocks, call.q.device)).gathered()
    return _gpu().attend_rows(call.q, call.k, call.v, call.order, _rows(call, tiling), tiling, row, call.scale)


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


def _rows(call: AttentionCall, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return the lists as the kernel reads them, kept from call to call. What was made in inference mode cannot be told
    from its own later content, and is not kept.
    """
    blocks, bounds, device = call.blocks, call.bounds, call.q.device
    if blocks.is_inference() or bounds.is_inference():
        return _gpu().on_device(call.lists(), tiling, device)
    version, kept = _KEPT.get(blocks, (None, {}))
    if version != blocks._version:
        kept = {}
        _KEPT[blocks] = blocks._version, kept
    key = id(bounds), bounds._version, call.first, call.q.shape[1], tiling, device
    known, rows = kept.get(key, (None, None))
    if known is None or known() is not bounds:
        rows = _gpu().on_device(call.lists(), tiling, device)
        kept[key] = weakref.ref(bounds), rows
    return rows


@sparse_attention.register_fake
def _(*arguments: object) -> Tensor:
    return torch.empty_like(AttentionCall._make(arguments).q)


class _Context(Protocol):
    """What autograd hands from the forward to the backward pass: the call's tensors, and its other arguments."""

    saved_tensors: tuple[Tensor, ...]
    numbers: tuple[object, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _keep(ctx: _Context, inputs: tuple[object, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[len(tensors) :]


def _backward(ctx: _Context, of_output: Tensor) -> tuple[Tensor | None, ...]:
    call = AttentionCall._make((*ctx.saved_tensors, *ctx.numbers))
    q, k, v, order = call.q, call.k, call.v, call.order
    found = gradients(q, k, v, order, call.lists(), call.tiling(), call.scale, of_output)
    return (*found, *[None] * (len(call) - len(found)))


sparse_attention.register_autograd(_backward, setup_context=_keep)
