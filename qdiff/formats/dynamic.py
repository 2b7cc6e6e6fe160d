"""Quantization with scales chosen at run time: blocks of the last axis, or whole tokens.

This is what activations get. A static scale for a tensor needs none of it
(:func:`qdiff.formats.scales.quantize_dequantize`). What a token or a block becomes depends on nothing outside it, so a
result does not change with the rest of the batch.

NVFP4's second scale, the tensor's, is a constant, calibrated over all timesteps: TensorRT's dynamic quantizer takes it at
build time only. Where an activation then exceeds what was calibrated, its block scale saturates at 448 and it is cut.
"""

from __future__ import annotations

from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats.scales import Rounding, choose_scale, quantize_dequantize
from qdiff.formats.table import Format


def split(x: Tensor, format: Format) -> Tensor:
    """Return ``[..., n]`` as ``[..., blocks, block]``: a view with one scale for each row of the new last axis. Without
    blocks the whole last axis is one.

    Raises:
        InputError: ``n`` does not divide into blocks; there is no padding (:meth:`qdiff.formats.table.Format.check_columns`).
    """
    format.check_columns(x.shape[-1])
    return x.unflatten(-1, (-1, format.block or x.shape[-1]))


def effective(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Return what codes are multiplied with: the stored scale in float32, times the tensor's if there is one, as one
    rounded product.

    modelopt and ONNX (a DequantizeLinear of the scales before that of the codes) compute the same product first.
    """
    scale = scale.float()
    return scale if tensor_scale is None else scale * tensor_scale


def quantize_dequantize_blocks(
    x: Tensor, format: Format, tensor_scale: Tensor | None = None, rounding: Rounding = "floor"
) -> Tensor:
    """Return ``x [..., n]`` after dynamic block quantization: every block on the grid of ``format``, with the scale of
    its own amax.

    Args:
        x: any float dtype; computed in float32, returned in its dtype. NaN stays NaN.
        format: one with blocks.
        tensor_scale: 0-dim, constant (:func:`qdiff.formats.scales.choose_tensor_scale`), for formats that have one.
        rounding: of power-of-two scales, as :func:`qdiff.formats.scales.choose_scale` says.

    Raises:
        InputError: a format without blocks, ``n`` not divisible by the block, or the tensor scale missing.
    """
    if not format.block:
        raise InputError(f"{format.name} has no blocks", "use one with blocks, or quantize_dequantize_tokens")
    blocks = split(x.float(), format)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = effective(choose_scale(amax, format, tensor_scale, rounding), tensor_scale)
    return quantize_dequantize(blocks, scale, format).flatten(-2).to(x.dtype)


def quantize_dequantize_tokens(x: Tensor, format: Format) -> Tensor:
    """Return ``x`` after dynamic quantization with one scale for each token (each row of the last axis), on the float16
    grid.

    Args:
        x: ``[..., n]``, any float dtype; computed in float32, returned in its dtype. NaN stays NaN.
        format: one without blocks: int8, fp8, int4, …

    Raises:
        InputError: a format with blocks.
    """
    if format.block:
        raise InputError(f"{format.name} has blocks of {format.block}", "use quantize_dequantize_blocks")
    wide = x.float()
    scale = choose_scale(wide.abs().amax(dim=-1, keepdim=True), format)
    return quantize_dequantize(wide, scale, format).to(x.dtype)
