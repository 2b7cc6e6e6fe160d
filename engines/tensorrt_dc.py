"""The data-centre TensorRT (A100, H100, B200): the same interface and the same code as TensorRT-RTX.

Its libraries are not on the public package index, so it is an extra of its own. It ranks above TensorRT-RTX: where someone
has installed it, they meant to use it.
"""

from __future__ import annotations

from qdiff.engines.base import ENGINES
from qdiff.engines.trt_engine import TensorRTEngine


@ENGINES.register("tensorrt")
class DataCentreTensorRTEngine(TensorRTEngine):
    """TensorRT on the GPU that is here (or, where the library can, on a named one)."""

    name = "tensorrt"
    title = "TensorRT (data-centre GPUs)"
    extra = "tensorrt"
    library = "tensorrt"
    rank = 50
