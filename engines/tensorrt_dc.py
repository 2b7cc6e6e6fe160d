"""The data-centre TensorRT (A100, H100, B200): the same interface and the same code as TensorRT-RTX.

Its libraries are not on the public package index, so it is an extra of its own. It ranks above TensorRT-RTX: where someone
has installed it, they meant to use it.

Sparse attention in a graph becomes the Triton kernel in the engine (:mod:`.trt_plugin`); ``attention=plain`` leaves it to the
plain operators that the file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qdiff.engines.base import ENGINES, BuildOptions
from qdiff.engines.trt_engine import TensorRTEngine

if TYPE_CHECKING:
    from qdiff.plan.plan import Plan


@ENGINES.register("tensorrt")
class DataCentreTensorRTEngine(TensorRTEngine):
    """TensorRT on the GPU that is here (or, where the library can, on a named one)."""

    name = "tensorrt"
    title = "TensorRT (data-centre GPUs)"
    extra = "tensorrt"
    library = "tensorrt"
    rank = 50
    known_flags = {**TensorRTEngine.known_flags, "attention": ("kernel", "plain")}

    def _one_size(self, plan: Plan, flags: Mapping[str, str]) -> bool:
        """Return whether the plan's attention has numerics of the kernel that the engine takes in as a plugin, which is for
        one size (:mod:`.trt_plugin`).
        """
        from qdiff.attention.numerics import numerics_named

        if flags.get("attention") == "plain" or plan.attention is None:
            return False
        return numerics_named(plan.attention.numerics).coded

    def _plugins(self, trt: ModuleType, onnx: Path, options: BuildOptions, wanted: str) -> tuple[str, ...]:
        from qdiff.engines import trt_plugin  # it needs torch, which importing engines must not

        names = trt_plugin.taken_over(onnx) if self.flag(options, "attention") == "kernel" else ()
        if names:
            trt_plugin.require_static(options.profiles)
            trt_plugin.register(trt, names, int(wanted.replace(".", "")))
        return names
