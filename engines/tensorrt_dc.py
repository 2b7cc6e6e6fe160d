"""The data-centre TensorRT (A100, H100, B200): the same interface and the same code as TensorRT-RTX.

Its libraries are not on the public package index, so it is an extra of its own. It ranks above TensorRT-RTX: where someone
has installed it, they meant to use it.

Sparse attention in a graph becomes the Triton kernel in the engine (:mod:`.trt_plugin`); ``attention=plain`` leaves it to the
plain operators that the file has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdiff.engines.base import ENGINES, BuildOptions
from qdiff.engines.trt_engine import TensorRTEngine


@ENGINES.register("tensorrt")
class DataCentreTensorRTEngine(TensorRTEngine):
    """TensorRT on the GPU that is here (or, where the library can, on a named one)."""

    name = "tensorrt"
    title = "TensorRT (data-centre GPUs)"
    extra = "tensorrt"
    library = "tensorrt"
    rank = 50
    known_flags = {**TensorRTEngine.known_flags, "attention": ("kernel", "plain")}

    def _plugins(self, trt: Any, onnx: Path, options: BuildOptions, wanted: str) -> tuple[str, ...]:
        from qdiff.engines import trt_plugin  # it needs torch, which importing engines must not

        names = trt_plugin.taken_over(onnx) if self.flag(options, "attention") == "kernel" else ()
        if names:
            trt_plugin.require_static(options.profiles)
            trt_plugin.register(trt, names, int(wanted.replace(".", "")))
        return names
