"""Packed weights in the file: initializers of the right element type, in the layout that runtimes look for.

torch has no tensors of INT4, and ONNX's exporter writes what it gets. So codes of 4 bits are traced as bytes (two codes each,
the layout of ONNX as of ours: :mod:`qdiff.formats.packing`) and get their type and shape here, without being unpacked.

Codes of 6 bits, for which no runtime has a type, stay bytes, which the graph unpacks in nodes that a runtime folds when it
loads the file. ONNX Runtime has no FP4; its graphs hold the same bits as UINT4, which ``qdiff.Dequantize_nvfp4`` looks up. E8M0
scales are bytes for every target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qdiff.errors import InputError
from qdiff.export.translations import Target
from qdiff.formats.table import Format, format_named
from qdiff.nn.quant_linear import QuantConv2d, QuantLinear

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir


def bytes_as_codes(module: nn.Module) -> None:
    """View E8M0 scales as bytes, in place; the module is for tracing only afterwards."""
    for layer in module.modules():
        if isinstance(layer, QuantLinear) and layer.scale.dtype == torch.float8_e8m0fnu:
            layer.scale = layer.scale.view(torch.uint8)


def store_codes(graph: onnx_ir.Graph, module: nn.Module, target: Target) -> None:
    """Give the initializers of all quantized layers their element types, and store weights the way products want them.

    Args:
        graph: of ``onnx_ir``, as the exporter wrote it.
        module: what was traced.
        target: whose runtime reads the graph.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLinear):
            codes = graph.initializers.get(f"{name}.codes")
            if codes is None:  # the exporter merges equal initializers of up to 1,024 elements
                raise InputError(
                    f"layer {name} has the very codes of another layer, and the exporter kept one of them",
                    "leave such tiny layers alone (recipe: ignore)",
                )
            format = format_named(layer.config.weights)
            if format.bits == 4:
                packed = _tensor(codes).numpy()
                _set(codes, packed, (packed.shape[0], 2 * packed.shape[1]), _element_type(format, target))
            if isinstance(layer, QuantConv2d):
                _as_kernels(graph, codes, format)
            else:
                _transpose(graph, codes, format)


def _element_type(format: Format, target: Target) -> onnx_ir.DataType:
    import onnx_ir

    if format.kind == "integer":
        return onnx_ir.DataType.INT4
    return onnx_ir.DataType.FLOAT4E2M1 if target.name == "tensorrt" else onnx_ir.DataType.UINT4


def _tensor(value: onnx_ir.Value) -> onnx_ir.TensorProtocol:
    """Return the data of an initializer."""
    assert value.const_value is not None
    return value.const_value


def _shape(value: onnx_ir.Value) -> onnx_ir.Shape:
    """Return the sizes of a value that has them; what the exporter writes has."""
    assert value.shape is not None
    return value.shape


def _set(value: onnx_ir.Value, packed: np.ndarray, shape: tuple[int, int], dtype: onnx_ir.DataType) -> None:
    """Make packed bytes the initializer's data; ONNX packs a tensor as one row."""
    import onnx_ir

    value.const_value = onnx_ir.PackedTensor(packed.reshape(-1), dtype, shape=shape, name=value.name)
    value.shape, value.type = onnx_ir.Shape(shape), onnx_ir.TensorType(dtype)


def _transpose(graph: onnx_ir.Graph, codes: onnx_ir.Value, format: Format) -> None:
    """Store a weight as ``[in, out]``, so that DequantizeLinear feeds its MatMul without a Transpose between.

    A linear layer is traced as MatMul(x, Transpose(DequantizeLinear(codes [out, in]))). ONNX Runtime folds that into a float
    weight: no INT8 product, no product with packed INT4, and three times the memory and more. What goes through a function or two
    DequantizeLinear (FP4, MX) is left: nothing on a CPU fuses it, and TensorRT takes either.
    """
    import onnx_ir

    (dequantize,) = (use.node for use in codes.uses())
    unpacked = dequantize.outputs[0] if dequantize.op_type.startswith("Unpack_") else None
    if unpacked is not None:
        (dequantize,) = (use.node for use in unpacked.uses())
    users = [use.node for use in dequantize.outputs[0].uses()]
    simple = dequantize.op_type == "DequantizeLinear" and format.scale == "float16"
    if not simple or any(user.op_type != "Transpose" for user in users):
        return
    if unpacked is not None:
        turn = onnx_ir.node("Transpose", [unpacked], {"perm": [1, 0]}, name=f"{codes.name}.transposed")
        turn.outputs[0].shape = onnx_ir.Shape([*reversed(_shape(dequantize.outputs[0]))])
        turn.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT8)
        graph.insert_before(dequantize, turn)
        dequantize.replace_input_with(0, turn.outputs[0])
    elif format.bits == 4:
        rows, columns = _shape(codes).numpy()
        data = _tensor(codes)
        _set(codes, _transposed(data.tobytes(), rows, columns), (columns, rows), data.dtype)
    else:
        _transpose_value(codes)
    if format.block:
        scale = dequantize.inputs[1]
        assert scale is not None
        if len(scale.uses()) > 1:  # equal scales of small layers are one initializer
            scale = onnx_ir.Value(name=f"{codes.name}.scale", const_value=scale.const_value, type=scale.type)
            graph.register_initializer(scale)
            dequantize.replace_input_with(1, scale)
        _transpose_value(scale)
    dequantize.attributes["axis"] = onnx_ir.AttrInt64("axis", 0 if format.block else 1)
    read = dequantize.inputs[0]
    assert read is not None
    dequantize.outputs[0].shape = onnx_ir.Shape(_shape(read))
    for user in users:
        user.outputs[0].replace_all_uses_with(dequantize.outputs[0])
        graph.remove(user, safe=True)


def _as_kernels(graph: onnx_ir.Graph, codes: onnx_ir.Value, format: Format) -> None:
    """Store a convolution's weight as ``[out, in, height, width]``, so that DequantizeLinear feeds its Conv without a
    Reshape between: runtimes look for the pair. Packed and blocked codes stay a matrix, whose blocks run over channels
    and taps.
    """
    import onnx_ir

    if format.bits < 8 or format.block:
        return
    (dequantize,) = (use.node for use in codes.uses())
    users = [use.node for use in dequantize.outputs[0].uses()]
    if dequantize.op_type != "DequantizeLinear" or any(user.op_type != "Reshape" for user in users):
        return
    shape = _shape(users[0].outputs[0]).numpy()
    codes.const_value = onnx_ir.tensor(_tensor(codes).numpy().reshape(shape), name=codes.name)
    codes.shape = dequantize.outputs[0].shape = onnx_ir.Shape(shape)
    for user in users:
        user.outputs[0].replace_all_uses_with(dequantize.outputs[0])
        graph.remove(user, safe=True)


def _transpose_value(value: onnx_ir.Value) -> None:
    import numpy
    import onnx_ir

    transposed = numpy.ascontiguousarray(_tensor(value).numpy().T)
    value.const_value = onnx_ir.tensor(transposed, name=value.name)
    value.shape = onnx_ir.Shape(transposed.shape)


def _transposed(data: bytes, rows: int, columns: int) -> np.ndarray:
    """Return codes of 4 bits ``[rows, columns]`` to those of ``[columns, rows]``, both packed."""
    import numpy

    packed = numpy.frombuffer(data, numpy.uint8).reshape(rows, columns // 2)
    turned = numpy.empty((columns, rows), numpy.uint8)
    turned[0::2], turned[1::2] = (packed & 15).T, (packed >> 4).T
    flat = turned.reshape(-1)
    return flat[0::2] | flat[1::2] << 4
