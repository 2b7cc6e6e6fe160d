"""What an exported graph really holds: read from the file, not from what we meant to write.

- the file is valid ONNX (checker, with its external data);
- every layer of the plan has the precision that was asked: INT8 codes behind a DequantizeLinear, and activations that come
  from a QuantizeLinear / DequantizeLinear pair;
- no float copy of a quantized weight is left anywhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import IntegrityError
from qdiff.plan import Plan

if TYPE_CHECKING:
    import onnx

_THROUGH = {"Transpose", "Reshape", "Cast", "Identity"}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}


@dataclass(frozen=True)
class Realised:
    """Formats of one layer as found in the graph, e.g. ``("int8", "int8", None)``; ``output`` is ``None`` for a float output."""

    weights: str
    activations: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.weights} x {self.activations}" + (f" -> {self.output}" if self.output else "")


def check_file(path: Path) -> None:
    """Runs the ONNX checker on the file and its external data.

    Raises:
        IntegrityError: with the checker's first line.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise IntegrityError(
            f"{path} is not valid ONNX: {str(error).splitlines()[0]}", "export again with --force"
        ) from None


def file_bytes(path: Path) -> int:
    """Bytes of the graph and of the external data beside it."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(path.name))


def realised_precision(path: Path, plan: Plan) -> dict[str, Realised]:
    """The precision of every layer of the plan as the graph has it.

    Raises:
        IntegrityError: a layer is not in the graph, or a float copy of a quantized weight is.
    """
    graph = _Graph(path)
    found: dict[str, Realised] = {}
    for layer in plan.layers:
        if layer.quantized:
            found[layer.name] = graph.quantized_layer(layer.name)
        else:
            found[layer.name] = Realised(layer.weights, layer.activations)
    _no_float_copies(graph, plan)
    return found


def downgraded(plan: Plan, realised: dict[str, Realised], outputs: frozenset[str]) -> list[str]:
    """Layers whose realised precision is not the one that was asked, as sentences.

    Args:
        outputs: formats of outputs that the target runs; others are expected to be float.
    """
    lost = []
    for layer in plan.layers:
        asked = Realised(layer.weights, layer.activations, layer.output if layer.output in outputs else None)
        got = realised[layer.name]
        if got != asked:
            lost.append(f"{layer.name}: asked {asked}, the graph has {got}")
    return lost


class _Graph:
    """A graph without its weights' bytes, with producers and consumers."""

    def __init__(self, path: Path) -> None:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        self.initializers: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants: dict[str, Any] = {
            node.output[0]: attribute.t
            for node in model.graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.producer: dict[str, onnx.NodeProto] = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def quantized_layer(self, name: str) -> Realised:
        import onnx

        codes = next((tensor for key, tensor in self.initializers.items() if key.endswith(f"{name}.codes")), None)
        if codes is None:
            raise IntegrityError(
                f"the graph holds no codes of layer {name}", "a constant was folded; this is a bug of the export"
            )
        weights = onnx.TensorProto.DataType.Name(codes.data_type).lower()
        value, node = codes.name, None
        while True:
            users = self.consumers.get(value, [])
            if len(users) != 1:
                raise IntegrityError(f"the weight of layer {name} is used {len(users)} times in the graph")
            node = users[0]
            if node.op_type in _PRODUCTS:
                break
            if node.op_type != "DequantizeLinear" and node.op_type not in _THROUGH:
                raise IntegrityError(f"the weight of layer {name} goes into {node.op_type}, not into a product")
            value = node.output[0]
        other = next(name for name in node.input if name != value)
        return Realised(weights, self._activation(other), self._output(node))

    def _output(self, product: Any) -> str | None:
        """Format of the quantizer right behind a product, its bias and its division by the timestep's factor."""
        value = product.output[0]
        while True:
            users = self.consumers.get(value, [])
            quantizer = next((node for node in users if node.op_type == "QuantizeLinear"), None)
            if quantizer is not None:
                return self._code_type(quantizer)
            if len(users) != 1:
                return None
            node = users[0]
            bias = node.op_type == "Add" and any(name in self.initializers for name in node.input)
            if not bias and node.op_type != "Div":
                return None
            value = node.output[0]

    def _code_type(self, quantizer: Any) -> str:
        import onnx

        dtype = next((a.i for a in quantizer.attribute if a.name == "output_dtype"), 0)
        if not dtype and len(quantizer.input) > 2:
            dtype = self.initializers[quantizer.input[2]].data_type
        return onnx.TensorProto.DataType.Name(dtype).lower()

    def _activation(self, value: str) -> str:
        node = self.producer.get(value)
        while node is not None and node.op_type in _THROUGH:
            node = self.producer.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return "float32"
        quantizer = self.producer.get(node.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return "float32"
        return self._code_type(quantizer)


def _no_float_copies(graph: _Graph, plan: Plan) -> None:
    import onnx

    # By shape, because a copy has no telling name: as many float weights of a shape as kept layers have it, none more.
    allowed = Counter(tuple(sorted(layer.shape)) for layer in plan.layers if not layer.quantized)
    suspicious = {tuple(sorted(layer.shape)) for layer in plan.quantized}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    found: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in {**graph.initializers, **graph.constants}.items():
        shape = tuple(sorted(tensor.dims))
        if tensor.data_type in floats and shape in suspicious:
            found.setdefault(shape, []).append(name)
    for shape, names in found.items():
        if len(names) > allowed[shape]:
            raise IntegrityError(
                f"the graph holds {len(names)} float weights of the shape {list(shape)}, the plan keeps {allowed[shape]}: "
                f"a float copy of a quantized weight is among {', '.join(names[:5])}"
            )
