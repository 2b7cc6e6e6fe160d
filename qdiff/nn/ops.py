"""The vocabulary of quantized graphs: torch custom ops ``qdiff::*``.

A quantized layer's forward is written in these ops and in plain torch. Each op has an implementation (what is evaluated
on CPU and CUDA), a fake (shapes, for tracing), and one translation for each export target in ``export/translations``.
So the graph that is exported is the module that was evaluated: parity is by construction, and checked all the same.

Three ops for activations, by who chooses the scale (a constant, each token, each block of 16 or 32 values), and one for weights.
What is exact plain arithmetic (smoothing, rotations, low-rank branches) needs no op.

Methods that learn (:mod:`qdiff.quantization.reconstruction`) train this same module, so the activations' ops have a
gradient: straight through the rounding (arXiv 1308.3432), and none for what one constant scale cuts off. Run-time scales
follow their values: nothing is cut but where a block scale saturates, and that is left out of account. The constant scale
has LSQ's gradient (arXiv 1902.08153, eq. 3), on any grid: with y = s Q(x / s), dy/ds is (y - x) / s within the range, the
end of the grid outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdiff.formats import dynamic, scales
from qdiff.formats.table import format_named
from qdiff.formats.weight import QuantizedWeight


@torch.library.custom_op("qdiff::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """Return ``x`` after static activation quantization: on the grid of ``format`` with one constant ``scale`` (a 0-dim
    tensor).
    """
    return scales.quantize_dequantize(x, scale, format_named(format))


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return torch.empty_like(x)


def _keep_range(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, scale, format = inputs
    lowest, highest = format_named(format).lowest, format_named(format).highest
    within = (x >= lowest * scale) & (x <= highest * scale)
    ctx.save_for_backward(within, *((x, scale, output) if scale.requires_grad else ()))


def _within_range(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
    within, *rest = ctx.saved_tensors
    if not rest:
        return gradient * within, None, None
    x, scale, output = rest
    slope = (output - x * within) / scale
    return gradient * within, (gradient * slope).sum(), None


quantize_dequantize.register_autograd(_within_range, setup_context=_keep_range)


@torch.library.custom_op("qdiff::token_quantize_dequantize", mutates_args=())
def token_quantize_dequantize(x: Tensor, format: str) -> Tensor:
    """Return ``x`` after dynamic activation quantization: one scale for each row of the last axis, from that row's amax
    at run time.
    """
    return dynamic.quantize_dequantize_tokens(x, format_named(format))


@token_quantize_dequantize.register_fake
def _(x: Tensor, format: str) -> Tensor:
    return torch.empty_like(x)


token_quantize_dequantize.register_autograd(lambda ctx, gradient: (gradient, None))


@torch.library.custom_op("qdiff::block_quantize_dequantize", mutates_args=())
def block_quantize_dequantize(x: Tensor, tensor_scale: Tensor | None, format: str) -> Tensor:
    """Return ``x`` after dynamic block quantization: one scale for each block of the last axis at run time, a multiple
    of the constant ``tensor_scale`` (0-dim float32) where the format has one (NVFP4), else ``None`` (MX formats).
    """
    return dynamic.quantize_dequantize_blocks(x, format_named(format), tensor_scale)


@block_quantize_dequantize.register_fake
def _(x: Tensor, tensor_scale: Tensor | None, format: str) -> Tensor:
    return torch.empty_like(x)


block_quantize_dequantize.register_autograd(lambda ctx, gradient: (gradient, None, None))


@torch.library.custom_op("qdiff::dequantize_weight", mutates_args=())
def dequantize_weight(
    codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    """Return a weight ``[out, in]`` in ``dtype`` from packed codes and scales
    (:class:`qdiff.formats.weight.QuantizedWeight`).
    """
    return QuantizedWeight.from_packed(format_named(format), codes, scale, tensor_scale).dequantize().to(dtype)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    columns = codes.shape[-1] * 8 // min(8, format_named(format).bits)
    return torch.empty((*codes.shape[:-1], columns), dtype=dtype, device=codes.device)


OPS = {
    "quantize_dequantize": quantize_dequantize,
    "token_quantize_dequantize": token_quantize_dequantize,
    "block_quantize_dequantize": block_quantize_dequantize,
    "dequantize_weight": dequantize_weight,
}
