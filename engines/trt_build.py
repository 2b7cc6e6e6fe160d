"""From an ONNX graph to a TensorRT plan: what TensorRT-RTX and the data-centre TensorRT have in common.

Their Python interfaces are the same one, so the library is an argument (``trt``). The network is strongly typed: every
tensor has the element type that the graph says, Q/DQ pairs mean what they say, and no tactic search may raise or lower a
precision behind the plan's back. TensorRT-RTX compiles for a *named* architecture without any GPU in the machine.

Timing caches are not kept: they are no-ops in TensorRT-RTX, which chooses its kernels on the user's GPU (:mod:`.trt_run`
keeps *that* cache). Plug-ins are not serialised into plans: a plan with host code would be a program. (An ahead-of-time quick
plugin is none: what is in the plan is its kernel.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from qdiff.engines.base import BuildFacts, Profile
from qdiff.engines.graph import inlined
from qdiff.errors import InputError, QdiffError, UsageError, option
from qdiff.events import Progress, log

if TYPE_CHECKING:
    import tensorrt

_NOISE = (
    "catchCudaError",
    "CUDA driver version",
    "CUDA GPU properties",
)  # said on machines without a GPU, never the cause


class Logger(Protocol):
    """A logger of TensorRT that remembers the errors."""

    errors: list[str]

    def cause(self) -> str:
        """Return the errors worth reading, one a line."""
        ...


def make_logger(trt: Any) -> Logger:
    """Return a TensorRT logger that keeps error texts in ``errors`` and sends warnings to qdiff's log."""

    class ErrorLogger(trt.ILogger):  # the base class exists once the library is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: tensorrt.ILogger.Severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                log.debug("TensorRT: %s", message)

        def cause(self) -> str:
            useful = [text for text in self.errors if not any(word in text for word in _NOISE)] or self.errors
            return "\n  ".join(dict.fromkeys(useful)) or "TensorRT gave no reason"

    return ErrorLogger()


def _monitor(trt: Any) -> tensorrt.IProgressMonitor:
    """Report TensorRT's outermost phases as progress. Its calls come from the thread that builds."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: dict[str, Progress] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.open[phase_name] = Progress("build", max(num_steps, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.open:
                self.open[phase_name].advance()
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.open:
                self.open.pop(phase_name).__exit__(None, None, None)

    return Monitor()


def capability(trt: ModuleType, text: str) -> tensorrt.ComputeCapability:
    """Return TensorRT's constant for a compute capability: ``"12.0"`` gives ``trt.ComputeCapability.SM120``.

    Raises:
        UsageError: this library builds no engines for that architecture (the message lists those that it does).
    """
    known = {}
    for name, member in trt.ComputeCapability.__members__.items():
        if name.startswith("SM"):
            known[f"{name[2:-1]}.{name[-1]}"] = member
    if text not in known:
        raise UsageError(
            f"{trt.__name__} {trt.__version__} builds no engines for compute capability {text!r}",
            f"it builds for {', '.join(known)}; data-centre GPUs (9.0, 10.0) need the engine 'tensorrt'",
        )
    return known[text]


def _parse(
    trt: ModuleType, builder: tensorrt.Builder, logger: Logger, onnx: Path, plugins: Collection[str]
) -> tensorrt.INetworkDefinition:
    wanted = ["STRONGLY_TYPED", *(["PREFER_AOT_PYTHON_PLUGINS"] if plugins else [])]
    known = trt.NetworkDefinitionCreationFlag.__members__  # later releases have no other kind than strongly typed
    flags = sum(1 << int(known[name]) for name in wanted if name in known)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    # Functions are written out: their nodes have no names, and the parser's own are equal in every call of one.
    with inlined(onnx, plugins) as graph:
        parsed = parser.parse_from_file(str(graph.resolve()))
    if parsed:
        return network
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        lines.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
    text = "\n  ".join(dict.fromkeys(lines)) or logger.cause()
    raise InputError(f"TensorRT cannot read {onnx}:\n  {text}", "export again for target tensorrt")


def _add_profiles(
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    profiles: Sequence[Profile],
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    if dynamic and not profiles:
        raise UsageError(
            f"the graph's inputs {', '.join(dynamic)} have dynamic sizes",
            f"name a profile: {option('profiles', ['512'])}",
        )
    for profile in profiles:
        lacking = [name for name in dynamic if name not in profile.ranges]
        if lacking:
            raise UsageError(
                f"profile {profile.name!r} gives no shape for {', '.join(lacking)}", "add it to the profile"
            )
        made = builder.create_optimization_profile()
        for tensor in inputs:
            if tensor.is_shape_tensor and tensor.name in profile.values:
                made.set_shape_input(tensor.name, *(list(numbers) for numbers in profile.values[tensor.name]))
            elif tensor.name in profile.ranges:
                shapes = profile.ranges[tensor.name]
                try:
                    made.set_shape(tensor.name, *shapes)
                except ValueError as error:
                    raise UsageError(f"profile {profile.name!r}, input {tensor.name!r}: {shapes}: {error}") from error
        if config.add_optimization_profile(made) < 0:
            raise UsageError(f"profile {profile.name!r} does not fit the graph's inputs: {profile.to_json()['ranges']}")


def _fix_sizes(network: tensorrt.INetworkDefinition, profile: Profile) -> None:
    """Give the network's inputs the sizes of a profile without ranges: there is nothing dynamic left."""
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tuple(tensor.shape) and tensor.name in profile.ranges:
            tensor.shape = profile.ranges[tensor.name][1]


def build_plan(
    trt: ModuleType,
    onnx: Path,
    profiles: Sequence[Profile],
    target: str | None,
    level: int,
    plugins: Collection[str] = (),
) -> tuple[tensorrt.IHostMemory, BuildFacts]:
    """Parse and compile.

    Args:
        trt: the library.
        onnx: the graph; its external weights are read from beside it.
        profiles: one optimisation profile each.
        target: compute capability such as ``"12.0"``; ``None``: the GPU that is there.
        level: TensorRT's builder optimisation level, 0 to 5.
        plugins: functions of the graph that registered plugins compute (:mod:`.trt_plugin`). Then ``profiles`` is one without
            ranges, and the network has its sizes.

    Returns:
        The serialised plan (an object with a buffer) and facts: layer counts by kind and by element type.

    Raises:
        InputError: the parser or the builder refuses the graph.
        UsageError: profiles that do not fit the graph, or an architecture that the library does not know.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, onnx, plugins)
    if plugins:
        _fix_sizes(network, profiles[0])
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for profilers; costs no speed
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability(trt, target), 0)
    _add_profiles(builder, config, network, () if plugins else profiles)
    config.progress_monitor = _monitor(trt)
    logger.errors.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(logger.cause(), onnx, target)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = Counter(layer.type.name.lower() for layer in layers)
    types = Counter(layer.get_output(0).dtype.name.lower() for layer in layers if layer.num_outputs)
    return plan, {"layers": dict(kinds.most_common()), "tensors": dict(types.most_common())}


def _refused(cause: str, onnx: Path, target: str | None) -> QdiffError:
    place = f" for compute capability {target}" if target else ""
    fix = "FP4 needs 12.0 or 10.0, FP8 needs 8.9 or newer; else choose another recipe and export again"
    return InputError(f"TensorRT cannot build {onnx}{place}:\n  {cause}", fix)
