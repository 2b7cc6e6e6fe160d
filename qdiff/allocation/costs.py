"""Estimate what a layer costs in a format: bits, bytes, or milliseconds on a GPU.

Where the GPU is not there, milliseconds are reckoned: the larger of arithmetic at the published dense rate of the format and of
moving weights and activations at the published bandwidth (the roofline model, Williams et al. 2009). They leave launch times and
fusion out. That is good enough to rank layers, which is all that an allocation needs, and no promise about an engine. On an
engine that is there layers are measured instead (:mod:`qdiff.stages.layer_times`).
"""

from __future__ import annotations

from qdiff.formats.table import FORMATS
from qdiff.plan.devices import Device
from qdiff.plan.plan import LayerPlan


def arithmetic(entry: LayerPlan) -> str:
    """Return the kind of arithmetic that a layer's product is done in: ``bf16`` where either side is not quantized."""
    names = {FORMATS[entry.weights].name, FORMATS[entry.activations].name}
    for kind, formats in (("fp4", {"nvfp4", "mxfp4"}), ("int8", {"int8"}), ("fp8", {"fp8"})):
        if names <= formats:
            return kind
    return "bf16"


def milliseconds(entry: LayerPlan, tokens: int, device: Device) -> float:
    """Return one call of a layer that reads ``tokens`` tokens (of a convolution: windows); see the module's
    docstring.
    """
    rows, columns = entry.matrix
    operations = 2 * rows * columns * tokens
    moved = entry.weight_bytes() + tokens * (columns * FORMATS[entry.activations].bits / 8 + 2 * rows)
    rate = device.rates.get(arithmetic(entry), device.rates["bf16"])
    return 1e3 * max(operations / (rate * 1e12), moved / (device.bandwidth * 1e9))
