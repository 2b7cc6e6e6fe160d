"""How long single layers take in an engine that is here: each in a graph of its own, exported and built like a whole backbone.

What a call of the engine costs besides (copies, dispatch) is measured with a graph that does nothing, and taken off. Fusion with
neighbours is not seen, so the times of layers rank formats and add up to a little more than they cost inside a backbone.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, MissingDependencyError
from qdiff.events import log
from qdiff.nn.quant_linear import QuantLinear, TimestepIndex
from qdiff.plan.plan import LayerPlan

if TYPE_CHECKING:
    from qdiff.engines import Runner

CALLS, WARM = 21, 3
MOST_SECONDS = 3.0  # for the calls of one layer


class LayerTimes:
    """Measures layers; equal ones once.

    Args:
        engine: name of one that runs graphs.
        threads: of the engine; ``None``: its own choice.

    Raises:
        UsageError: unknown engine.
        MissingDependencyError: it cannot run here.
        InputError: it runs torch modules.
    """

    def __init__(self, engine: str, threads: int | None = None) -> None:
        from qdiff.engines import BuildOptions, choose_engine

        self.engine = choose_engine(engine)
        if self.engine.target is None:
            raise InputError(f"mixed.device: {engine!r} runs torch modules, no graphs", "use openvino or onnxruntime")
        missing = self.engine.missing()
        if missing is not None:
            raise MissingDependencyError(
                f"mixed.device: layers cannot be timed on {engine!r} here: {missing}",
                "name an engine that runs here, or a GPU with published rates",
            )
        from qdiff.export.translations import TARGETS

        self.target = TARGETS[self.engine.target]
        self.options = BuildOptions(threads=threads)
        self._known: dict[Hashable, float] = {}
        self._idle = self._measure(nn.Identity(), [1, 1])

    def __call__(self, module: nn.Module, entry: LayerPlan, shape: Sequence[int]) -> float:
        """Return milliseconds of one call.

        Args:
            module: a quantized layer, or one that is kept in 16 bit.
            entry: what it is in a plan.
            shape: of its input, with the batch.

        Raises:
            InputError: formats that the engine cannot run.
        """
        if entry.quantized and not self.target.takes(entry.weights, entry.activations, entry.per_token):
            raise InputError(
                f"mixed.device: {self.engine.name} cannot run layer {entry.name} as {entry.weights} x {entry.activations}",
                "choose other recipes for mixed.recipes, or another device",
            )
        key = (type(module), _shape_of(module), tuple(shape))
        if key not in self._known:
            self._known[key] = max(self._measure(module, list(shape)) - self._idle, 0.0)
            log.info("time: %s, %s x %s: %.3f ms", entry.name, entry.weights, entry.activations, self._known[key])
        return self._known[key]

    def _measure(self, module: nn.Module, shape: list[int]) -> float:
        from qdiff.export.codes import bytes_as_codes
        from qdiff.export.onnx_graph import InComputeDtype, write_graph

        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wrapped = InComputeDtype(_OneInput(copy.deepcopy(module).cpu()), getattr(torch, self.target.compute)).eval()
        bytes_as_codes(wrapped)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            write_graph(wrapped, (example,), None, self.target, ["x"], ["y"]).save(str(path), external_data=True)
            built = Path(folder, "engine")
            built.mkdir()
            self.engine.build(path, built, self.options)
            runner = self.engine.load(built, self.options)
            try:
                return _median(runner, example)
            finally:
                runner.close()


def _median(runner: Runner, example: Tensor) -> float:
    """Return milliseconds of one call."""
    seconds: list[float] = []
    began = time.perf_counter()
    for call in range(WARM + CALLS):
        start = time.perf_counter()
        runner({"x": example})
        if call >= WARM:
            seconds.append(time.perf_counter() - start)
        if seconds and time.perf_counter() - began > MOST_SECONDS:
            break
    return 1e3 * statistics.median(seconds)


class _OneInput(nn.Module):
    """A layer with the names that a graph needs, at the first of its calibrated timesteps."""

    names = ("x",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        if isinstance(module, QuantLinear):
            module.timestep_index = _FirstTimestep()

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives."""
        found: Tensor = self.module(x)
        return found


class _FirstTimestep(TimestepIndex):
    def gather(self, table: Tensor) -> Tensor:
        return table[:1]


def _shape_of(module: nn.Module) -> Hashable:
    """Return everything about a layer but its numbers."""
    form: Any = getattr(module, "form", None) or getattr(module, "window", None)
    return form, tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items())
