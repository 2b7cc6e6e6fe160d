"""ONNX Runtime: runs the exported graph as it is, on every CPU and on CUDA GPUs.

The engine is a reference: ``engine.json`` holds the way to the ONNX file and its hash. The alternatives were measured on a
20 M-parameter PixArt (INT8, 22 MB): a graph saved after optimisation loads in 0.05 s instead of 0.11 s and runs at the same
speed, but copies all weights; hard links cost nothing, but ``onnx.load`` refuses a weights file that has one.
When the graph is exported anew the hash no longer fits and the engine has to be built again, which takes seconds.

Its x86 kernels multiply unsigned by signed codes. It moves signed activations over by itself, but only where a zero point
is written out, which our graphs leave away (TensorRT wants symmetric quantization). So zero points of 0 are added when a
graph is loaded: 1.4 times as fast as FP32 instead of 0.75 times, and half the memory, with the same numbers (docs/log).

On processors without VNNI its AVX2 kernels add two such products in 16 bits, which overflow: pictures of 34 dB instead of 52. It
can make the weights unsigned as well (``session.x64quantprecision``), which is exact everywhere, and 3.1 to 3.4 times slower in
the product where signed weights are exact too. So it is asked to only where :func:`qdiff.engines.integer_products.exact` says
that signed ones overflow; ``unsigned_weights=on`` and ``off`` force either way. Zero points of weights are always written: the
graph is valid both ways.

Where only weights are quantized, ONNX Runtime by default rounds activations to INT8 as well (MatMulNBits, accuracy level 4:
error 0.02 instead of 0.0 on a unit MatMul). The plan did not say so, hence level 1; ``dynamic_quantization=on`` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.engines.base import ENGINES, BuildFacts, BuildOptions, Runner
from qdiff.engines.graph import external_files, graph_bytes, graph_digest
from qdiff.engines.inputs import TensorSpec, conform
from qdiff.engines.integer_products import IntegerEngine
from qdiff.engines.unpacked import take_out_unpacking
from qdiff.errors import InputError, IntegrityError, MissingDependencyError, command, option
from qdiff.files import read_json, write_json
from qdiff.graphs.walk import graphs, initializers

if TYPE_CHECKING:
    import numpy
    import onnx
    import onnxruntime
    from torch import Tensor

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}

# It moves quantizers over reshapes as INT8 nodes that the pass after it, which makes them unsigned, then contradicts
# ("output_dtype INT8 does not match y_zero_point type UINT8", ONNX Runtime 1.31).
_DISABLED_OPTIMIZERS = ["QDQPropagationTransformer"]


class OrtRunner(Runner):
    """A session. Tensors are shared with NumPy, not copied; from and to a GPU they are copied (a few MB a step).

    Args:
        given: what the session computes with and does not own.
    """

    def __init__(self, session: onnxruntime.InferenceSession, given: Sequence[onnxruntime.OrtValue] = ()) -> None:
        self._session, self._given = session, given
        for node in session.get_inputs():
            if node.type not in _DTYPES:
                raise InputError(
                    f"the graph's input {node.name!r} is a {node.type}", f"export with one of {', '.join(_DTYPES)}"
                )
        self.inputs = tuple(
            TensorSpec(node.name, _DTYPES[node.type], tuple(node.shape)) for node in session.get_inputs()
        )
        self._outputs = [node.name for node in session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch

        tensors = conform(inputs, self.inputs)
        home = next(iter(tensors.values())).device
        feed = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        return [torch.from_numpy(each).to(home, torch.float32) for each in self._session.run(self._outputs, feed)]

    def close(self) -> None:
        self._session, self._given = None, ()


@ENGINES.register("onnxruntime")
class OrtEngine(IntegerEngine):
    """ONNX Runtime on the CPU, or on CUDA where onnxruntime-gpu and a GPU are there."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    target = "onnxruntime"
    extra = "cpu"
    library = "onnxruntime"
    rank = 10
    overflow = "INT8 products with signed weights overflow on this processor: weights are unsigned"
    known_flags = {
        "provider": ("auto", "cpu", "cuda"),
        "dynamic_quantization": ("off", "on"),
        "memory": ("fast", "low"),  # low: weights stay as they are in the file, and are unpacked at every use
        "unsigned_weights": ("auto", "off", "on"),  # auto: where products with signed ones overflow
    }

    def device(self, options: BuildOptions) -> str:
        wanted = self.flag(options, "provider")
        if wanted == "cpu":
            return "cpu"
        import torch

        offered = "CUDAExecutionProvider" in self.backend().get_available_providers()
        if offered and torch.cuda.is_available():
            return "cuda"
        if wanted == "cuda":
            why = "an NVIDIA GPU" if offered else "the package onnxruntime-gpu"
            fix = "pip install 'qdiff-deploy[cuda]' on a machine with a GPU, or leave provider=cuda out"
            raise MissingDependencyError(f"provider=cuda needs {why}, which is not here", fix)
        return "cpu"

    def _unsigned_weights(self, options: BuildOptions) -> bool:
        return self._by_processor(options, "unsigned_weights", where_exact="off", where_not="on") == "on"

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> BuildFacts:
        runner = self._open(onnx, options)  # a graph that does not load is refused here, not at the first picture
        specs = [str(spec) for spec in runner.inputs]
        runner.close()
        way = os.path.relpath(onnx.resolve(), folder.resolve())
        write_json(folder / "engine.json", {"onnx": way, "sha256": graph_digest(onnx)})
        return {"bytes": graph_bytes(onnx), "inputs": specs, "device": self.device(options)}

    def reads(self, folder: Path) -> list[Path]:
        onnx, _ = self._graph(folder)
        return [onnx, *external_files(onnx)]

    def _graph(self, folder: Path) -> tuple[Path, str]:
        """Return the graph that an engine folder names, and the digest that it had."""
        reference = read_json(folder / "engine.json", "the engine file")
        return (folder / reference["onnx"]).resolve(), reference["sha256"]

    def load(self, folder: Path, options: BuildOptions) -> OrtRunner:
        onnx, digest = self._graph(folder)
        if graph_digest(onnx) != digest:
            message = f"{onnx} is not the graph that this engine was built from (its sha256 differs)"
            raise IntegrityError(
                message, f"build the engine anew: {command('build', 'RUN', engine='onnxruntime', force=True)}"
            )
        return self._open(onnx, options)

    def _open(self, onnx: Path, options: BuildOptions) -> OrtRunner:
        library = self.backend()
        device = self.device(options)
        external_files(onnx)  # links and names that lead elsewhere are refused before the backend follows them
        settings = library.SessionOptions()
        settings.log_severity_level = 3
        # Between two steps the scheduler and the text encoder want the cores that idle threads would keep spinning on.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if device == "cpu" and self._unsigned_weights(options):
            settings.add_session_config_entry("session.x64quantprecision", "1")
        if self.flag(options, "dynamic_quantization") == "off":
            settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if options.threads:
            settings.intra_op_num_threads = options.threads
        disabled = list(_DISABLED_OPTIMIZERS)
        if self.flag(options, "memory") == "low":
            disabled.append("ConstantFolding")
            settings.add_session_config_entry("session.disable_prepacking", "1")
            settings.enable_cpu_mem_arena = False
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        providers = [provider] if device == "cpu" else [provider, "CPUExecutionProvider"]
        given: list[onnxruntime.OrtValue] = []
        try:
            if device == "cpu":
                settings.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(onnx.parent)
                )
                if _pairs_of_fp8(onnx):
                    settings.add_session_config_entry("session.disable_quant_qdq", "1")
                graph, codes = _prepared(onnx)
                given = [library.OrtValue.ortvalue_from_numpy(values) for values in codes.values()]
                settings.add_external_initializers(list(codes), given)
                session = library.InferenceSession(graph, settings, providers=providers, disabled_optimizers=disabled)
            else:
                session = library.InferenceSession(str(onnx), settings, providers=providers)
        except Exception as error:  # the library has no base class of its own
            raise InputError(f"ONNX Runtime refuses {onnx}: {error}", "export again for target onnxruntime") from error
        if session.get_providers()[0] != provider:
            message = f"ONNX Runtime could not start {provider} (CUDA or cuDNN libraries are missing)"
            raise MissingDependencyError(
                message, f"install CUDA 13 and cuDNN 9, or use {option('flags', {'provider': 'cpu'})}"
            )
        return OrtRunner(session, given)


def _pairs_of_fp8(path: Path) -> bool:
    """Return whether two FP8 DequantizeLinear meet in a product: in attention of a file for TensorRT, which is only
    checked here. ONNX Runtime 1.31 puts its integer product in their place, which then does not take FP8; whether it
    does depends on what else it folds.
    """
    import onnx

    from qdiff.attention.nodes import AttentionNode
    from qdiff.attention.numerics import NUMERICS

    functions = onnx.load(str(path), load_external_data=False).functions
    found = (AttentionNode.named(function.name) for function in functions)
    return any(node is not None and node.pairs and NUMERICS[node.numerics].coded for node in found)


def _prepared(path: Path) -> tuple[bytes, dict[str, numpy.ndarray]]:
    """Return the graph as it is handed over, its weights in their file, and codes that the session has to be given."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    codes = take_out_unpacking(model, path.parent)
    _add_zero_points(model)
    _add_zero_points_of_weights(model)
    return bytes(model.SerializeToString()), codes


def _add_zero_points(model: onnx.ModelProto) -> None:
    """Give every INT8 activation quantizer a zero point of 0."""
    import numpy
    import onnx

    for number, graph in enumerate(graphs(model.graph)):
        zero = f"qdiff_zero_point_{number}"
        quantized = set()
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and len(node.input) == 2:
                dtype = next((a for a in node.attribute if a.name == "output_dtype"), None)
                if dtype is not None and dtype.i == onnx.TensorProto.INT8:
                    node.attribute.remove(dtype)
                    node.input.append(zero)
                    quantized.add(node.output[0])
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in quantized:
                node.input.append(zero)
        if quantized:
            graph.initializer.append(onnx.numpy_helper.from_array(numpy.zeros((), numpy.int8), zero))


def _add_zero_points_of_weights(model: onnx.ModelProto) -> None:
    """Give every INT8 weight zero points of 0, as many as it has scales."""
    import numpy
    import onnx

    stored = {tensor.name: tensor for tensor in initializers(model.graph)}
    for graph in graphs(model.graph):
        zeros: dict[str, onnx.TensorProto] = {}  # beside the node: in a branch the optimizer does not look outside
        for node in graph.node:
            codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 else None
            if codes is None or codes.data_type != onnx.TensorProto.INT8:
                continue
            facts = {attribute.name: attribute.i for attribute in node.attribute}
            axis, block = facts.get("axis", 1), facts.get("block_size", 0)
            scale = stored.get(node.input[1])
            if block:
                shape = [-(-size // block) if place == axis else size for place, size in enumerate(codes.dims)]
            else:
                shape = [codes.dims[axis]] if len(codes.dims) > axis and (scale is None or len(scale.dims)) else []
            zero = f"{codes.name}.zero_point"
            zeros[zero] = onnx.numpy_helper.from_array(numpy.zeros(shape, numpy.int8), zero)
            node.input.append(zero)
        graph.initializer.extend(zeros.values())
