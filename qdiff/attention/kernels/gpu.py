"""Sparse attention on a GPU: orders and quantizes, and starts the kernel that was measured to be the fastest there.

On a Hopper, constants are those of a sweep on an H200 at 64, 72 and 128 channels (docs/log, 2026-11-26); other sizes take
their neighbour's. With 8-bit operands programs have 64 queries, so that two of them share a multiprocessor and one multiplies
while the other takes its exponentials. With heads of 128 channels :mod:`qdiff.attention.kernels.hopper` is faster in BF16 and
INT8 / FP8 and takes this kernel's place. It is imported where it runs: Gluon is the younger part of Triton.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from qdiff.attention.kernels import sparse_attention
from qdiff.attention.kernels.pack import Operands, pack
from qdiff.attention.kernels.sparse_attention import Launch, is_partial
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import Numerics
from qdiff.errors import MissingDependencyError

HOPPER = (9, 0)


class Constants(TypedDict, total=False):
    """Constants of :class:`qdiff.attention.kernels.sparse_attention.Launch` that a caller may choose."""

    queries: int
    tile: int
    warps: int
    stages: int


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    lists: BlockLists,
    tiling: Tiling,
    numerics: Numerics,
    scale: float | None = None,
    **constants: Unpack[Constants],
) -> Tensor:
    """Return the attention in ``q``'s dtype, with the shapes and the meaning of :func:`qdiff.attention.oracle.attend`.

    Args:
        q: on a GPU, or in host memory in the interpreter.
        k: on a GPU, or in host memory in the interpreter.
        v: on a GPU, or in host memory in the interpreter.
        order: ``[heads, ordered]``.
        lists: the blocks of keys that each block of queries reads.
        tiling: how the sequence is cut into blocks.
        numerics: formats of the operands.
        scale: of the scores; ``None``: ``size ** -0.5``.
        constants: of :class:`qdiff.attention.kernels.sparse_attention.Launch`, in place of those that are known to be good.

    Raises:
        InputError: numerics ``float``, or sizes that the kernel does not have.
        MissingDependencyError: a GPU without the number formats.
    """
    return attend_rows(q, k, v, order, on_device(lists, tiling, q.device), tiling, numerics, scale, **constants)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    rows: tuple[Tensor, Tensor],
    tiling: Tiling,
    numerics: Numerics,
    scale: float | None = None,
    **constants: Unpack[Constants],
) -> Tensor:
    """Return what :func:`attend` returns, with the lists as :func:`on_device` gives them, which callers keep from call
    to call.
    """
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    if q.is_cuda and capability < ((8, 9) if numerics.coded else (8, 0)):
        name = torch.cuda.get_device_name(q.device)
        raise MissingDependencyError(f"{name} does not compute {numerics.name!r}", "take bf16, or another GPU")
    chosen = constants or tuned(q.shape[-1], numerics, tiling, capability)
    launch = Launch(q.shape[-1], numerics, tiling.block_q, tiling.block_k, is_partial(tiling), scale=scale, **chosen)
    order = order.to(q.device, torch.int32).contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        return attend_packed(pack(q, k, v, order, tiling, numerics), order, rows, tiling, launch, out)


def attend_packed(
    operands: Operands, order: Tensor, rows: tuple[Tensor, Tensor], tiling: Tiling, launch: Launch, out: Tensor
) -> Tensor:
    """Write the attention alone, of operands that are packed already, into ``out [batch, heads, tokens, size]``, and
    return it.

    Args:
        operands: packed queries, keys and values.
        order: int32 ``[heads, ordered]``.
        rows: as :func:`on_device` gives them.
        tiling: how the sequence is cut into blocks.
        launch: constants of the kernel.
        out: which is overwritten.
    """
    given = operands, order, rows, tiling, launch, out
    if out.is_cuda and torch.cuda.get_device_capability(out.device) == HOPPER and in_gluon(launch):
        from qdiff.attention.kernels import hopper

        return hopper.attend_packed(*given)
    return sparse_attention.attend_packed(*given)


def in_gluon(launch: Launch) -> bool:
    """Return whether :mod:`qdiff.attention.kernels.hopper` was measured to be faster with these constants."""
    rows = {"bf16": 128, "int8_fp8": sparse_attention.PROGRAM}.get(launch.numerics.name)
    return launch.size == launch.keys == 128 and launch.rows == rows and not launch.matrix


def tuned(size: int, numerics: Numerics, tiling: Tiling, capability: tuple[int, int]) -> Constants:
    """Return constants of a :class:`qdiff.attention.kernels.sparse_attention.Launch` for a Hopper; none for other GPUs,
    on which nothing was measured.
    """
    if capability != HOPPER:
        return {}
    if not numerics.coded:
        wide = size in (64, 128)
        queries = min(128, tiling.block_q) if size == 128 else sparse_attention.PROGRAM
        return {"queries": queries, "tile": min(128 if wide else 64, tiling.block_k), "stages": 2}
    return {"tile": min(128, tiling.block_k), "stages": 2 if size == 64 and tiling.block_k == 128 else 3}


def on_device(lists: BlockLists, tiling: Tiling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lists of :meth:`qdiff.attention.lists.BlockLists.by_row`, computed in host memory."""
    host = BlockLists(lists.blocks.cpu(), lists.bounds.cpu())
    offsets, entries = host.by_row(tiling)
    return offsets.to(device), entries.to(device)
