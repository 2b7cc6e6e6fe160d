"""TensorRT-RTX: the engine for GeForce and RTX PRO GPUs. One wheel from the public index, builds without a GPU.

The plan holds portable code; the kernels for the very GPU are compiled when it first runs, and kept in ``kernels.cache``
(signed by the user, see :mod:`.signing`) so that the second start is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.engines.base import ENGINES
from qdiff.engines.trt_engine import TensorRTEngine
from qdiff.errors import UsageError, option

if TYPE_CHECKING:
    from qdiff.plan.plan import Plan


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

    def refuses(self, plan: Plan) -> UsageError | None:
        if plan.attention is None or not plan.structure.branches:
            return None
        return UsageError(
            "TensorRT-RTX 1.7 crashes on sparse attention inside an If, so it builds no blocks with branches that follow lists",
            f"quantize without {option('density')} or without routing, or build for onnxruntime or openvino",
        )
