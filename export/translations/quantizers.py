"""``qdiff::*`` quantizers as ONNX QuantizeLinear / DequantizeLinear.

Weights stay packed: the codes are an INT8 initializer behind a DequantizeLinear, which TensorRT, ONNX Runtime and OpenVINO
fold into their INT8 kernels. Zero points are absent (zero): TensorRT takes symmetric quantization only.
"""

from __future__ import annotations

from typing import Any

from qdiff.errors import InputError
from qdiff.export.translations import translates

_INT8 = 3  # onnx.TensorProto.INT8


@translates("qdiff::quantize_dequantize", "onnxruntime", "tensorrt")
def quantize_dequantize(x: Any, scale: Any, format: str) -> Any:
    """Q and DQ with one constant scale."""
    from onnxscript import opset23 as op

    if format != "int8":
        raise InputError(f"activations in {format} have no static Q/DQ form", "choose a recipe that the target can run")
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, output_dtype=_INT8), scale)


@translates("qdiff::dequantize_weight", "onnxruntime", "tensorrt")
def dequantize_weight(codes: Any, scale: Any, tensor_scale: Any, format: str, dtype: int) -> Any:
    """DQ along the output channels (axis 0)."""
    from onnxscript import opset23 as op

    if format != "int8":
        raise InputError(f"weights in {format} have no translation", "choose a recipe that the target can run")
    return op.DequantizeLinear(codes, scale, axis=0)
