"""The Engine that both TensorRTs share: ask for the hardware, build, write, load. The two differ in a few class attributes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from qdiff.engines.base import BuildFacts, BuildOptions, Engine, Profile, Runner
from qdiff.engines.graph import external_files
from qdiff.engines.trt_build import build_plan, capability
from qdiff.engines.trt_run import TensorRTRunner
from qdiff.errors import IntegrityError, MissingDependencyError, UsageError, command, option
from qdiff.files import disk_errors, read_json, write_json

if TYPE_CHECKING:
    from qdiff.engines.plan_profiles import CalibratedSizes
    from qdiff.plan.plan import Plan

# Where no GPU is there and none is named, engines are built for the newest consumer GPUs.
DEFAULT_COMPUTE_CAPABILITY = "12.0"


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
            raise MissingDependencyError(
                message, f"name one, e.g. {option('compute_capability', '8.9')} (RTX 40) or 12.0 (RTX 50)"
            )
        return wanted

    def device(self, options: BuildOptions) -> str:
        return f"sm_{self._capability(options).replace('.', '')}"

    def default_compute_capability(self) -> str | None:
        return DEFAULT_COMPUTE_CAPABILITY if self.missing() is not None else None

    def profile_for(self, plan: Plan, text: str, sizes: CalibratedSizes, flags: Mapping[str, str]) -> Profile:
        from qdiff.engines.plan_profiles import DEFAULT_BATCH, plan_profile
        from qdiff.models import FAMILIES

        one_batch, one_size = _switches_blocks(plan), self._one_size(plan, flags)
        # Where a call computes one branch of guidance, or routes go by sample, the usual batch is 1 and not 2.
        alone = FAMILIES[plan.family].branches_apart or (plan.routing is not None and plan.routing.by_sample)
        batch = f"batch={1 if alone else 2}" if one_batch or one_size else DEFAULT_BATCH
        profile = plan_profile(plan, text, sizes, batch, one_size)
        if one_batch:
            _require_one_batch(profile)
        return profile

    def _one_size(self, plan: Plan, flags: Mapping[str, str]) -> bool:
        """Return whether an engine for ``plan`` is for one size of every input."""
        return False

    def _target(self, trt: ModuleType, wanted: str) -> str | None:
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

    def _plugins(self, trt: ModuleType, onnx: Path, options: BuildOptions, wanted: str) -> tuple[str, ...]:
        """Register plugins for functions of the graph, and return the names of those functions. Here: none."""
        return ()

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> BuildFacts:
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
                "run it on a machine with that GPU, or build an engine for this one: "
                + command("build", "RUN", engine="openvino"),
            )
        if here != wanted:
            message = f"the engine is built for compute capability {wanted}, the GPU here has {here}"
            raise MissingDependencyError(message, f"build one for it: {option('compute_capability', here)}")
        path = folder / "model.plan"
        if not path.is_file():
            raise IntegrityError(
                f"there is no model.plan in {folder}", f"build the engine anew with {option('force', True)}"
            )
        profiles = [Profile.from_json(profile) for profile in made["profiles"]]
        kernels = folder / self.kernel_cache if self.kernel_cache else None
        graphs = "cuda_graph" in self.known_flags and self.flag(options, "cuda_graph") == "on"
        return TensorRTRunner(trt, path.read_bytes(), profiles, kernels, graphs)


def _switches_blocks(plan: Plan) -> bool:
    """Return whether some block has a branch with scales for blocks of values (NVFP4) beside another."""
    from qdiff.formats.table import FORMATS

    several = tuple(f"{name}.branches." for name, count in plan.structure.branches.items() if count > 1)
    return any(layer.name.startswith(several) and FORMATS[layer.activations].block for layer in plan.layers)


def _require_one_batch(profile: Profile) -> None:
    """Refuse a profile with a range of batches.

    TensorRT-RTX 1.7 compiles no NVFP4 product inside an ``If`` whose batch is a range ("Unsupported op"); other axes may be
    one.
    """
    low, _, high = profile.ranges["timestep"]
    if low != high:
        raise UsageError(
            f"profile {profile.name!r}: where blocks switch to NVFP4, TensorRT-RTX builds for one batch size, not for "
            f"{low[0]} to {high[0]}",
            f"give one, such as {option('profiles', ['batch=1'])}, or several profiles of one each",
        )
