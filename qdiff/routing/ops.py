"""Ops of blocks with branches: torch custom ops ``qdiff::choose`` and ``qdiff::shaped_like``.

They belong to the vocabulary of quantized graphs (:mod:`qdiff.nn.ops` says how such an op is made and exported).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("qdiff::choose", mutates_args=())
def choose(which: Tensor, alternatives: list[Tensor]) -> Tensor:
    """Return one of several tensors of one shape: number ``which`` (0-dim int64), the last one for any other number. In
    a graph the others are not computed (:mod:`qdiff.export.branches`).
    """
    number = int(which)
    return alternatives[number if 0 <= number < len(alternatives) else -1].clone()


@choose.register_fake
def _(which: Tensor, alternatives: list[Tensor]) -> Tensor:
    return torch.empty_like(alternatives[0])


@torch.library.custom_op("qdiff::shaped_like", mutates_args=())
def shaped_like(x: Tensor, reference: Tensor) -> Tensor:
    """Return ``x`` in the shape of a tensor of as many elements. A reshape, but the tracer need not see that their
    sizes agree.
    """
    return x.reshape(reference.shape).clone()


@shaped_like.register_fake
def _(x: Tensor, reference: Tensor) -> Tensor:
    return torch.empty_like(reference, dtype=x.dtype)


OPS = {"choose": choose, "shaped_like": shaped_like}
