r"""``qdiff::*`` quantizers in ONNX, for each target.

Weights stay packed: the codes are an initializer of the format's own element type, behind a DequantizeLinear that engines fold
into their kernels. Zero points are absent (zero): TensorRT takes symmetric quantization only. Formats of 4 bits are traced as
the bytes they are packed in; :func:`qdiff.export.onnx_graph` gives their initializers type and shape. Those of 6 bits stay
bytes in the file, which a runtime unpacks when it loads it.

============ ==================================== ===============================================================
\             ``tensorrt``                         ``onnxruntime``
============ ==================================== ===============================================================
INT8         QuantizeLinear, DequantizeLinear     the same
FP8          the same in FLOAT8E4M3FN             weights the same; activations ``qdiff.QuantizeDequantize_fp8``, as ONNX
                                                  Runtime 1.31 makes an INT8 product of an FP8 pair and then refuses it
NVFP4        ``TRT_FP4DynamicQuantize``, two      ``qdiff.BlockQuantizeDequantize_nvfp4``, ``qdiff.Dequantize_nvfp4``
             DequantizeLinear for two scales
tokens, MX   refused                              functions of :mod:`qdiff.export.functions`
============ ==================================== ===============================================================

In a ``tensorrt`` graph NVFP4's block scale times the tensor's scale is rounded to float16 before it meets the codes (2^-11, where
a code's own step is 2^-2): that is where TensorRT looks for its FP4 products. Scales on the float16 grid lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from qdiff.export.function_text import DOMAIN
from qdiff.export.translations import Value, translates
from qdiff.formats.table import Format, format_named

TRT = "trt"
_FLOAT, _INT8, _FLOAT8E4M3FN = 1, 3, 17  # onnx.TensorProto's numbers
_TENSORS = [f"tensor({name})" for name in ("float", "float16", "int8", "uint8", "float8e4m3fn", "int32", "int64")]
_PAIRS = {"int8": _INT8, "fp8": _FLOAT8E4M3FN}  # formats with a QuantizeLinear / DequantizeLinear pair


def call(
    domain: str, name: str, inputs: Sequence[Value], outputs: Sequence[str] = ("tensor(float)",), **attributes: int
) -> Value:
    """Return a node of another domain than ONNX's own; ``outputs`` names its results' types where they are not the
    first input's.
    """
    from onnx.defs import OpSchema
    from onnxscript import values

    kind, formal = OpSchema.AttrType.INT, OpSchema.FormalParameter
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[formal(f"x{place}", f"T{place}") for place in range(len(inputs))],
        outputs=[formal(f"y{place}", "T0" if dtype == "same" else dtype) for place, dtype in enumerate(outputs)],
        attributes=[OpSchema.Attribute(attribute, kind) for attribute in attributes],
        type_constraints=[(f"T{place}", _TENSORS, "") for place in range(len(inputs))],
    )
    return values.Op(values.Opset(domain, 1), name, schema)(*inputs, **attributes)


@translates("qdiff::quantize_dequantize", "tensorrt")
def quantize_dequantize(x: Value, scale: Value, format: str) -> Value:
    """Return the output of Q and DQ nodes with one constant scale."""
    from onnxscript import opset23 as op

    return op.DequantizeLinear(op.QuantizeLinear(x, scale, output_dtype=_PAIRS[format]), scale)


@translates("qdiff::quantize_dequantize", "onnxruntime")
def quantize_dequantize_on_cpu(x: Value, scale: Value, format: str) -> Value:
    """Return the output of Q and DQ nodes in INT8; of a function in other formats."""
    if format == "int8":
        return quantize_dequantize(x, scale, format)
    return call(DOMAIN, f"QuantizeDequantize_{format}", [x, scale], ["same"])


@translates("qdiff::token_quantize_dequantize", "onnxruntime")
def token_quantize_dequantize(x: Value, format: str) -> Value:
    """Return ``x`` quantized with one scale for each token, from its amax."""
    return call(DOMAIN, f"TokenQuantizeDequantize_{format}", [x], ["same"])


@translates("qdiff::block_quantize_dequantize", "onnxruntime")
def block_quantize_dequantize(x: Value, tensor_scale: Value | None, format: str) -> Value:
    """Return one scale for each block, from its amax."""
    inputs = [x] if tensor_scale is None else [x, tensor_scale]
    return call(DOMAIN, f"BlockQuantizeDequantize_{format}", inputs, ["same"])


@translates("qdiff::block_quantize_dequantize", "tensorrt")
def block_quantize_dequantize_by_tensorrt(x: Value, tensor_scale: Value | None, format: str) -> Value:
    """Return the output of TensorRT's dynamic quantizer: FP4 codes and E4M3 block scales, which two DequantizeLinear
    undo.
    """
    from onnxscript import opset23 as op

    row = format_named(format)
    types = ["tensor(float4e2m1)", "tensor(float8e4m3fn)"]
    facts = {"axis": -1, "block_size": row.block, "scale_type": _FLOAT8E4M3FN}
    codes, scale = call(TRT, "TRT_FP4DynamicQuantize", [x, tensor_scale], types, **facts)
    product = op.CastLike(op.DequantizeLinear(scale, tensor_scale), x)
    return op.DequantizeLinear(codes, product, axis=-1, block_size=row.block)


@translates("qdiff::dequantize_weight", "onnxruntime")
def dequantize_weight_on_cpu(codes: Value, scale: Value, tensor_scale: Value | None, format: str, dtype: int) -> Value:
    """Return a weight ``[out, in]``."""
    row = format_named(format)
    scale = _block_scale(row, scale, tensor_scale)
    if row.bits < 8 and row.kind == "float":
        return call(DOMAIN, f"Dequantize_{format}", [codes, scale])
    if row.bits == 6:
        codes = call(DOMAIN, f"Unpack_{row.element.name}", [codes], ["tensor(int8)"])
    return _dequantize(row, codes, scale)


@translates("qdiff::dequantize_weight", "tensorrt")
def dequantize_weight(codes: Value, scale: Value, tensor_scale: Value | None, format: str, dtype: int) -> Value:
    """Return a weight ``[out, in]``."""
    from onnxscript import opset23 as op

    row = format_named(format)
    scale = _block_scale(row, scale, tensor_scale)
    return _dequantize(row, codes, scale if tensor_scale is None else op.Cast(scale, to=dtype))


def _block_scale(row: Format, scale: Value, tensor_scale: Value | None) -> Value:
    """Return what codes are multiplied with: stored scales are numbers, or E4M3 under the tensor's scale, or E8M0 as
    bytes.
    """
    from onnxscript import opset23 as op

    if tensor_scale is not None:
        return op.DequantizeLinear(scale, tensor_scale)
    return call(DOMAIN, "PowerOfTwo", [scale]) if row.scale == "e8m0" else scale


def _dequantize(row: Format, codes: Value, scale: Value) -> Value:
    from onnxscript import opset23 as op

    if row.block:
        return op.DequantizeLinear(codes, scale, axis=1, block_size=row.block)
    return op.DequantizeLinear(codes, scale, axis=0)
