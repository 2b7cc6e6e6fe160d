"""TensorRT-RTX: the engine for GeForce and RTX PRO GPUs. One wheel from the public index, builds without a GPU.

The plan holds portable code; the kernels for the very GPU are compiled when it first runs, and kept in ``kernels.cache``
(signed by the user, see :mod:`.signing`) so that the second start is fast.
"""

from __future__ import annotations

from qdiff.engines.base import ENGINES
from qdiff.engines.trt_engine import TensorRTEngine


@ENGINES.register("tensorrt_rtx")
class TensorRTRTXEngine(TensorRTEngine):
    """TensorRT for RTX (Turing to Blackwell, compute capability 7.5 to 12.1)."""

    name = "tensorrt_rtx"
    title = "TensorRT-RTX (GeForce and RTX PRO GPUs)"
    extra = "rtx"
    library = "tensorrt_rtx"
    rank = 40
    known_flags = {**TensorRTEngine.known_flags, "cuda_graph": ("off", "on")}
    kernel_cache = "kernels.cache"
