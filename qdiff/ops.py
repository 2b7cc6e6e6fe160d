"""The vocabulary of quantized graphs: torch custom ops ``qdiff::*``.

A quantized layer's forward is written in these ops and in plain torch. Each op has an implementation (what is evaluated
on CPU and CUDA), a fake (shapes, for tracing), and one translation for each export target in ``export/translations``.
So the graph that is exported is the module that was evaluated: parity is by construction, and checked all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff import numerics
from qdiff.formats import format_named


@torch.library.custom_op("qdiff::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """Static activation quantization: ``x`` on the grid of ``format`` with one constant ``scale`` (a 0-dim tensor)."""
    return numerics.quantize_dequantize(x, scale, format_named(format))


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qdiff::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, format: str) -> Tensor:
    """A weight from its packed codes: ``codes [out, ...]`` times ``scale [out]``, in the scale's dtype."""
    return numerics.dequantize(codes, scale.reshape(-1, *[1] * (codes.dim() - 1)), format_named(format))


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, format: str) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


OPS = {"quantize_dequantize": quantize_dequantize, "dequantize_weight": dequantize_weight}
