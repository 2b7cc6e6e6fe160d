"""Which formats a layer has in a graph, told by the graph's own nodes and element types.

A layer is found by its codes. From there the way to its product gives the weight's format: the codes' element type, the block,
and in what the scales are stored. From the product back gives the activation's: what quantizer, if any, its other operand comes
from. Names and comments of the exporter are not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.errors import IntegrityError
from qdiff.export.function_text import DOMAIN
from qdiff.formats.table import FORMATS, format_named
from qdiff.graphs.walk import initializers, nodes

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_THROUGH = {"Transpose", "Reshape", "Cast", "CastLike", "Identity"}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_ELEMENTS = {
    "INT8": "int8",
    "INT4": "int4",
    "FLOAT8E4M3FN": "e4m3",
    "FLOAT8E5M2": "e5m2",
    "FLOAT4E2M1": "e2m1",
}


@dataclass(frozen=True)
class Realised:
    """Formats of one layer as found in the graph; ``None`` for activations and an output that are not quantized."""

    weights: str
    activations: str | None = None
    per_token: bool = False
    output: str | None = None

    def __str__(self) -> str:
        tokens = " per token" if self.per_token else ""
        output = f" -> {self.output}" if self.output else ""
        return f"{self.weights} x {self.activations or 'float'}{tokens}{output}"


class Graph:
    """A graph and those inside it, without their weights' bytes, with producers and consumers. Names are told apart over all."""

    def __init__(self, path: Path) -> None:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in initializers(model.graph)}
        self.constants: dict[str, TensorProto] = {
            node.output[0]: attribute.t
            for node in nodes(model.graph)
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.producer: dict[str, NodeProto] = {name: node for node in nodes(model.graph) for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in nodes(model.graph):
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def quantized_layer(self, name: str) -> Realised:
        """Return what the layer ``name`` of a plan is in this graph.

        Raises:
            IntegrityError: it is not there, or its weight does not go into a product.
        """
        codes = next((tensor for key, tensor in self.initializers.items() if key.endswith(f"{name}.codes")), None)
        if codes is None:
            raise IntegrityError(
                f"the graph holds no codes of layer {name}", "a constant was folded; this is a bug of the export"
            )
        ways = self._ways(name, codes.name, "", _type(codes.data_type))
        if not ways:
            raise IntegrityError(f"the weight of layer {name} is not used in the graph")
        if len(set(ways)) > 1:
            raise IntegrityError(
                f"layer {name} is called {len(ways)} times, in different precisions: {'; '.join(map(str, ways))}"
            )
        return ways[0]

    def _ways(self, name: str, value: str, weights: str, element: str) -> list[Realised]:
        """Return what becomes of a weight in every product that it goes into: a layer may be called several times."""
        found = []
        for node in self.consumers.get(value, []):
            if node.op_type in _PRODUCTS:
                other = next(name for name in node.input if name != value)
                found.append(Realised(weights, *self._activation(other), self._output(node)))
                continue
            form, kind = weights, element
            function = node.domain == DOMAIN and node.op_type.startswith("Dequantize_")
            if function or node.op_type == "DequantizeLinear":
                form = self._weight_format(element, node)
            elif node.domain == DOMAIN and node.op_type.startswith("Unpack_"):
                kind = node.op_type.partition("_")[2]
            elif node.op_type not in _THROUGH:
                raise IntegrityError(f"the weight of layer {name} goes into {node.op_type}, not into a product")
            found += self._ways(name, node.output[0], form, kind)
        return found

    def _weight_format(self, element: str, node: NodeProto) -> str:
        """Return the row whose element, block and scale are those of a weight; else a description of what is there."""
        block = _attribute(node, "block_size", 0)
        if node.domain == DOMAIN:
            row = format_named(node.op_type.partition("_")[2])
            looked_up = {4: "UINT4", 6: "UINT8"}.get(row.bits)
            element, block = row.element.name if element == looked_up else element, row.block
        else:
            element = _ELEMENTS.get(element, element)
        scale = self._scale(node.input[1])
        for row in FORMATS.values():
            if (row.element.name, row.block, row.scale) == (element, block, scale):
                return row.name
        return f"{element} in blocks of {block} with {scale} scales"

    def _scale(self, value: str) -> str:
        """Return how the scales behind ``value`` are stored, in the words of
        :attr:`qdiff.formats.table.Format.scale`.
        """
        node = self.producer.get(value)
        while node is not None and node.op_type in _THROUGH:
            value = node.input[0]
            node = self.producer.get(value)
        if node is not None and node.op_type == "DequantizeLinear":
            stored = _type(self.initializers[node.input[0]].data_type)
            return "e4m3" if stored == "FLOAT8E4M3FN" else stored
        if node is not None and node.domain == DOMAIN and node.op_type == "PowerOfTwo":
            return "e8m0"
        return "float16"  # a number on its grid, in float16 or float32

    def _output(self, product: NodeProto) -> str | None:
        """Return the format of the quantizer right behind a product, its bias and its division by the timestep's
        factor; the input quantizer of a layer that reads this one is not meant.
        """
        value = product.output[0]
        while True:
            users = self.consumers.get(value, [])
            quantizers = [node for node in users if node.op_type == "QuantizeLinear"]
            own = next((node for node in quantizers if not self._feeds_a_layer(node)), None)
            if own is not None:
                return self._pair(own)
            users = [node for node in users if node not in quantizers]
            if len(users) != 1:
                return None
            node = users[0]
            bias = node.op_type == "Add" and any(name in self.initializers for name in node.input)
            if not bias and node.op_type != "Div":
                return None
            value = node.output[0]

    def _feeds_a_layer(self, quantizer: NodeProto) -> bool:
        """Return whether what a quantizer makes goes into a product with a weight."""
        reached = [*quantizer.output]
        while reached:
            value = reached.pop()
            for node in self.consumers.get(value, []):
                if node.op_type in _PRODUCTS:
                    if any(self._is_a_weight(other) for other in node.input if other != value):
                        return True
                elif node.op_type in {*_THROUGH, "DequantizeLinear"}:
                    reached += node.output
        return False

    def _is_a_weight(self, value: str) -> bool:
        """Return whether a product's operand comes from codes."""
        node = self.producer.get(value)
        while node is not None and (node.op_type in _THROUGH or node.op_type.startswith(("Dequantize", "Unpack"))):
            value = node.input[0]
            node = self.producer.get(value)
        return value in self.initializers and value.endswith(".codes")

    def _pair(self, quantizer: NodeProto) -> str:
        """Return the format of a QuantizeLinear with one scale."""
        dtype = _attribute(quantizer, "output_dtype", 0)
        if not dtype and len(quantizer.input) > 2:
            dtype = self.initializers[quantizer.input[2]].data_type
        element = _ELEMENTS.get(_type(dtype), _type(dtype))
        rows = (row.name for row in FORMATS.values() if (row.element.name, row.block) == (element, 0))
        return next(rows, element)

    def _activation(self, value: str) -> tuple[str | None, bool]:
        """Return the format of the quantizer that a product's operand comes from, and whether its scales are per token."""
        node = self.producer.get(value)
        while node is not None and node.op_type in _THROUGH and not node.domain:
            node = self.producer.get(node.input[0])
        if node is None:
            return None, False
        kind, _, format = node.op_type.partition("_")
        if node.domain == DOMAIN and kind.endswith("QuantizeDequantize"):
            return format, kind.startswith("Token")
        quantizer = self.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is None:
            return None, False
        if quantizer.op_type == "TRT_FP4DynamicQuantize":
            return "nvfp4", False
        return (self._pair(quantizer), False) if quantizer.op_type == "QuantizeLinear" else (None, False)


def _type(number: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(number))


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
