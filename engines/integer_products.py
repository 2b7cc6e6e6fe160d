"""Whether a CPU library multiplies INT8 exactly on this processor: one product is computed in the library itself and compared.

x86 processors without VNNI (Intel's before 2019, AMD's before Zen 4) have no instruction that adds four products of bytes in
32 bits. Kernels there add two of them in 16 bits (``vpmaddubsw``), which saturates where both are large: 255 x 127 x 2 is
64,770, and the largest 16-bit number is 32,767. Pictures of the bundled PixArt then have 34 to 44 dB instead of 52 (docs/log).

Which kernel runs is the library's choice. ``/proc/cpuinfo`` does not tell it: on a processor without AVX, ONNX Runtime is exact
and OpenVINO is not, and in an emulator the file is the host's. A list of instructions would be a second opinion, and a wrong
one gives wrong pictures. So nothing in qdiff reads the processor's name: :func:`exact` is the only place that decides, and
engines and ``qdiff doctor`` ask it (docs/decisions/0020-integer-products.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from qdiff.engines.base import BuildOptions, Engine

if TYPE_CHECKING:
    import numpy
    import onnx

COLUMNS, ROWS, CHANNELS = (
    256,
    64,
    16,
)  # of the product; input channels of the convolution are COLUMNS / 4, its windows 2 x 2
_SCALE = 2.0**-7  # of activations and weights: powers of two keep the expected numbers exact


def exact(library: str) -> bool:
    """Return whether products and convolutions of the largest INT8 codes come out exactly in ``library``; tried once a process.

    Args:
        library: ``"onnxruntime"`` or ``"openvino"``, as it is without settings of ours. It has to be installed.
    """
    return _exact(library)


class IntegerEngine(Engine):
    """Base of the engines of CPU libraries: what they do where INT8 products overflow."""

    overflow: ClassVar[str]  # what happens then, in a sentence for ``qdiff doctor``

    def integer_arithmetic(self) -> str | None:
        if self.missing() is not None:
            return None
        return "INT8 products are exact" if exact(self.library) else self.overflow

    def _by_processor(self, options: BuildOptions, flag: str, where_exact: str, where_not: str) -> str:
        """Return the value of a flag; where that is ``auto``, the one for this processor."""
        value = self.flag(options, flag)
        if value != "auto":
            return value
        return where_exact if exact(self.library) else where_not


@functools.cache
def _exact(library: str) -> bool:
    import numpy

    model, rows = probe()
    outputs = _LIBRARIES[library](model, rows)
    expected = expected_outputs()
    return all(numpy.array_equal(found, value) for found, value in zip(outputs, expected, strict=True))


def probe() -> tuple[bytes, dict[str, numpy.ndarray]]:
    """Return an ONNX graph of one MatMul and one Conv between quantizers, as our exports write them, and its inputs by name.

    The inputs are float32 ``x [ROWS, COLUMNS]`` and ``image [1, COLUMNS / 4, 4, 4]``, of the largest code everywhere. Weights are
    127 in even output channels and -127 in odd ones.
    """
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    signs = numpy.where(numpy.arange(CHANNELS) % 2 == 0, 127, -127).astype(numpy.int8)
    product = numpy.broadcast_to(signs, (COLUMNS, CHANNELS))
    windows = numpy.broadcast_to(signs[:, None, None, None], (CHANNELS, COLUMNS // 4, 2, 2))
    initializers = [
        numpy_helper.from_array(numpy.ascontiguousarray(values), name)
        for name, values in {
            "scale": numpy.float32(_SCALE).reshape(()),
            "scales": numpy.full(CHANNELS, _SCALE, numpy.float32),
            "zero": numpy.zeros((), numpy.int8),
            "zeros": numpy.zeros(CHANNELS, numpy.int8),
            "product": product,
            "windows": windows,
        }.items()
    ]

    def quantized(name: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}.codes"]),
            helper.make_node("DequantizeLinear", [f"{name}.codes", "scale", "zero"], [f"{name}.values"]),
        ]

    def weights(name: str, axis: int) -> onnx.NodeProto:
        return helper.make_node("DequantizeLinear", [name, "scales", "zeros"], [f"{name}.values"], axis=axis)

    nodes = [
        *quantized("x"),
        *quantized("image"),
        weights("product", 1),
        weights("windows", 0),
        helper.make_node("MatMul", ["x.values", "product.values"], ["y"]),
        helper.make_node("Conv", ["image.values", "windows.values"], ["map"]),
    ]
    shapes: dict[str, list[int | None]] = {
        "x": [None, COLUMNS],
        "image": [1, COLUMNS // 4, 4, 4],
        "y": [None, CHANNELS],
        "map": [1, CHANNELS, 3, 3],
    }
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        nodes, "probe", [values["x"], values["image"]], [values["y"], values["map"]], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    largest = 127 * _SCALE
    inputs = {
        "x": numpy.full((ROWS, COLUMNS), largest, numpy.float32),
        "image": numpy.full((1, COLUMNS // 4, 4, 4), largest, numpy.float32),
    }
    return model.SerializeToString(), inputs


def expected_outputs() -> list[numpy.ndarray]:
    """Return what the graph of :func:`probe` gives without an overflow, float32 ``y [ROWS, CHANNELS]`` and
    ``map [1, CHANNELS, 3, 3]``.
    """
    import numpy

    value = COLUMNS * 127 * 127 * _SCALE**2  # 22 bits: a float32 holds it
    row = numpy.where(numpy.arange(CHANNELS) % 2 == 0, value, -value).astype(numpy.float32)
    return [
        numpy.broadcast_to(row, (ROWS, CHANNELS)),
        numpy.broadcast_to(row[None, :, None, None], (1, CHANNELS, 3, 3)),
    ]


def _in_onnxruntime(model: bytes, inputs: dict[str, numpy.ndarray]) -> list[numpy.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return session.run(["y", "map"], inputs)


def _in_openvino(model: bytes, inputs: dict[str, numpy.ndarray]) -> list[numpy.ndarray]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    results = core.compile_model(core.read_model(model), "CPU", settings)(inputs)
    return [results["y"], results["map"]]


_LIBRARIES: dict[str, Callable[[bytes, dict[str, numpy.ndarray]], list[numpy.ndarray]]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}
