"""What a layer costs in a format: bits, bytes, or milliseconds on a GPU.

Where the GPU is not there, milliseconds are reckoned: the larger of arithmetic at the published dense rate of the format and of
moving weights and activations at the published bandwidth (the roofline model, Williams et al. 2009). They leave launch times and
fusion out. That is good enough to rank layers, which is all that an allocation needs, and no promise about an engine. On an
engine that is there layers are measured instead (:mod:`qdiff.stages.layer_times`).
"""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.errors import InputError, unknown_name
from qdiff.formats.table import FORMATS
from qdiff.plan.plan import LayerPlan


@dataclass(frozen=True)
class Device:
    """Published dense rates of a GPU, multiply and add counted as two.

    Args:
        title: name and document.
        rates: 10^12 operations a second by kind of arithmetic; kinds that are not there run at ``bf16``'s.
        bandwidth: of its memory, 10^9 bytes a second.
    """

    title: str
    rates: dict[str, float]
    bandwidth: float


DEVICES = {
    "rtx-5090": Device(
        "GeForce RTX 5090 (NVIDIA, RTX Blackwell GPU architecture; FP8 and BF16 with FP32 accumulation)",
        {"bf16": 209.5, "fp8": 419.0, "int8": 838.0, "fp4": 1676.0},
        1792.0,
    ),
    "rtx-4090": Device(
        "GeForce RTX 4090 (NVIDIA, Ada GPU architecture; FP8 and BF16 with FP32 accumulation)",
        {"bf16": 165.2, "fp8": 330.3, "int8": 660.6},
        1008.0,
    ),
    "h100": Device(
        "H100 SXM (NVIDIA, H100 datasheet; half of the rates with sparsity)",
        {"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
        3350.0,
    ),
    "b200": Device(
        "B200 (NVIDIA, HGX B200: dense rates by GPU)", {"bf16": 2250.0, "fp8": 4500.0, "int8": 4500.0, "fp4": 9000.0}, 8000.0
    ),
}  # fmt: skip


MEASURED_ON = ("openvino", "onnxruntime", "tensorrt_rtx", "tensorrt")  # engines on which layers can be timed


def device_named(name: str) -> Device:
    """A GPU of the table.

    Raises:
        InputError: unknown; names the known ones.
    """
    if name not in DEVICES:
        raise unknown_name("device", name, list(DEVICES), InputError)
    return DEVICES[name]


def arithmetic(entry: LayerPlan) -> str:
    """The kind of arithmetic that a layer's product is done in: ``bf16`` where either side is not quantized."""
    names = {FORMATS[entry.weights].name, FORMATS[entry.activations].name}
    for kind, formats in (("fp4", {"nvfp4", "mxfp4"}), ("int8", {"int8"}), ("fp8", {"fp8"})):
        if names <= formats:
            return kind
    return "bf16"


def milliseconds(entry: LayerPlan, tokens: int, device: Device) -> float:
    """One call of a layer that reads ``tokens`` tokens (of a convolution: windows); see the module's docstring."""
    rows, columns = entry.matrix
    operations = 2 * rows * columns * tokens
    moved = entry.weight_bytes() + tokens * (columns * FORMATS[entry.activations].bits / 8 + 2 * rows)
    rate = device.rates.get(arithmetic(entry), device.rates["bf16"])
    return 1e3 * max(operations / (rate * 1e12), moved / (device.bandwidth * 1e9))
