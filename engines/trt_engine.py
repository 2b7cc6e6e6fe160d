"""The Engine that both TensorRTs share: ask for the hardware, build, write, load. The two differ in a few class attributes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from qdiff.engines.base import BuildOptions, Engine, Profile, Runner
from qdiff.engines.graph import external_files
from qdiff.engines.trt_build import build_plan, capability
from qdiff.engines.trt_run import TensorRTRunner
from qdiff.errors import IntegrityError, MissingDependencyError
from qdiff.files import disk_errors, read_json, write_json


class TensorRTEngine(Engine):
    """Base of the engines that make TensorRT plans."""

    target = "tensorrt"
    known_flags: ClassVar[Mapping[str, tuple[str, ...]]] = {"level": ("3", "0", "1", "2", "4", "5")}
    kernel_cache: ClassVar[str | None] = None  # file in the engine's folder that changes as the engine runs

    def _gpu(self) -> str | None:
        """Compute capability of the GPU that is here, e.g. ``"12.0"``, or ``None``."""
        import torch

        if not torch.cuda.is_available():
            return None
        major, minor = torch.cuda.get_device_capability()
        return f"{major}.{minor}"

    def missing(self) -> str | None:
        return self.missing_for_build() or (
            None if self._gpu() else f"engine {self.name!r} needs an NVIDIA GPU: none is here"
        )

    def missing_for_build(self) -> str | None:
        return super().missing()

    def _capability(self, options: BuildOptions) -> str:
        here = self._gpu()
        wanted = options.compute_capability or here
        if wanted is None:
            message = f"engine {self.name!r}: there is no GPU here to build for"
            raise MissingDependencyError(message, "name one, e.g. --compute-capability 8.9 (RTX 40) or 12.0 (RTX 50)")
        return wanted

    def device(self, options: BuildOptions) -> str:
        return f"sm_{self._capability(options).replace('.', '')}"

    def _target(self, trt: Any, wanted: str) -> str | None:
        """Return what the builder is told: the architecture by name; ``None`` when it can only build for the GPU
        here.
        """
        if hasattr(trt, "ComputeCapability"):
            capability(trt, wanted)
            return wanted
        if wanted != self._gpu():
            message = f"{self.library} builds only for the GPU that is here ({self._gpu() or 'none'}), not for {wanted}"
            raise MissingDependencyError(message, "build on the machine that will run the engine")
        return None

    def _plugins(self, trt: Any, onnx: Path, options: BuildOptions, wanted: str) -> tuple[str, ...]:
        """Register plugins for functions of the graph, and return the names of those functions. Here: none."""
        return ()

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> dict[str, Any]:
        trt = self.backend()
        level = int(self.flag(options, "level"))
        wanted = self._capability(options)
        target = self._target(trt, wanted)
        external_files(onnx)  # links and names that lead elsewhere are refused before the backend follows them
        plugins = self._plugins(trt, onnx, options, wanted)
        plan, facts = build_plan(trt, onnx, options.profiles, target, level, plugins)
        with disk_errors(str(folder)):
            (folder / "model.plan").write_bytes(memoryview(plan))
        profiles = [profile.to_json() for profile in options.profiles]
        write_json(folder / "engine.json", {"compute_capability": wanted, "profiles": profiles})
        return {"bytes": plan.nbytes, "compute_capability": wanted, **facts}

    def load(self, folder: Path, options: BuildOptions) -> Runner:
        made = read_json(folder / "engine.json", "the engine file")
        wanted, here = made["compute_capability"], self._gpu()
        trt = self.backend()
        if here is None:
            message = f"the engine is built; running it needs an NVIDIA GPU with compute capability {wanted}, and none is here"
            raise MissingDependencyError(
                message,
                "run it on a machine with that GPU, or build an engine for this one: qdiff build RUN --engine openvino",
            )
        if here != wanted:
            message = f"the engine is built for compute capability {wanted}, the GPU here has {here}"
            raise MissingDependencyError(message, f"build one for it: --compute-capability {here}")
        path = folder / "model.plan"
        if not path.is_file():
            raise IntegrityError(f"there is no model.plan in {folder}", "build the engine anew with --force")
        profiles = [Profile.from_json(profile) for profile in made["profiles"]]
        kernels = folder / self.kernel_cache if self.kernel_cache else None
        graphs = "cuda_graph" in self.known_flags and self.flag(options, "cuda_graph") == "on"
        return TensorRTRunner(trt, path.read_bytes(), profiles, kernels, graphs)
