"""An engine in parts: what follows from the prompt or from the timestep alone is computed once, not at every step
(:mod:`qdiff.export.hoist`). Whoever calls the runner names the backbone's own inputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qdiff.engines.base import Runner
from qdiff.engines.inputs import TensorSpec, conform

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 64 * 1024  # bytes of inputs from which on few results are kept
FEW, MANY = 2, 256  # results that are kept: of prompts (two branches of guidance that come one by one), of timesteps


class CachedPart:
    """A part whose results are kept by the values of its inputs, not by who they are: buffers are used again.

    Args:
        runner: of the part's graph.
        outputs: names of what it returns, in order.
        wanted: what the step's graph says about them.
    """

    def __init__(self, runner: Runner, outputs: Sequence[str], wanted: Mapping[str, TensorSpec]) -> None:
        self.runner = runner
        self.inputs = [spec.name for spec in runner.inputs]
        self.calls = 0
        self._wanted = [wanted[name] for name in outputs]
        self._kept: OrderedDict[Hashable, tuple[dict[str, Tensor], dict[str, Tensor]]] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part's outputs by name, in the element types that the step takes."""
        given = {name: inputs[name] for name in self.inputs}
        small = sum(x.numel() * x.element_size() for x in given.values()) < LARGE
        key = self._key(given) if small else self._equal(given)
        if key is not None and key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        self.calls += 1
        outputs = self.runner.outputs(given)
        named = {spec.name: output for spec, output in zip(self._wanted, outputs, strict=True)}
        results = conform(named, self._wanted)
        before = {} if small else {name: x.clone() for name, x in given.items()}
        self._kept[key if small else self.calls] = before, results
        while len(self._kept) > (MANY if small else FEW):
            self._kept.popitem(last=False)
        return results

    def _key(self, given: Mapping[str, Tensor]) -> Hashable:
        """Return the small inputs themselves as the key."""
        return tuple((str(x.device), tuple(x.shape), x.cpu().numpy().tobytes()) for x in given.values())

    def _equal(self, given: Mapping[str, Tensor]) -> Hashable | None:
        """Return the key of results of inputs that are equal to these."""
        for key, (before, _) in self._kept.items():
            if all(name in before and same_bytes(before[name], x) for name, x in given.items()):
                return key
        return None


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bytes. On a CPU numpy compares them, in this thread: torch's threads
    would still spin when the engine's want the cores, which cost a small U-Net a seventh of its step.
    """
    import numpy as np
    import torch

    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type != "cpu":
        return torch.equal(a, b)
    # One axis of stride 1: a scalar that was expanded to a batch of one has stride 0, and counts as contiguous.
    flat = (x.contiguous().as_strided((x.numel(),), (1,)) for x in (a, b))
    mine, yours = (x.view(torch.uint8).numpy() for x in flat)
    return np.array_equal(mine, yours)


class HoistedRunner(Runner):
    """Calls the parts that are asked for something new, then the step.

    Args:
        step: runner of the step's graph.
        parts: a runner for each part, with the names of its outputs.
    """

    def __init__(self, step: Runner, parts: Sequence[tuple[Runner, Sequence[str]]]) -> None:
        self.step = step
        specs = {spec.name: spec for spec in step.inputs}
        self.parts = [CachedPart(runner, outputs, specs) for runner, outputs in parts]
        carried = {name for _, outputs in parts for name in outputs}
        own = {spec.name: spec for runner, _ in parts for spec in runner.inputs if spec.name not in carried}
        self.inputs = tuple(({name: spec for name, spec in specs.items() if name not in carried} | own).values())
        self._names = [name for name in specs if name not in carried]
        step.keep(carried)

    def keep(self, names: Iterable[str]) -> None:
        super().keep(names)
        self.step.keep(names)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        given = conform(inputs, self.inputs)
        carried = {name: tensor for part in self.parts for name, tensor in part(given).items()}
        # A tensor that lasts is told by being the same object: the step conforms its inputs itself.
        own = {name: (inputs if name in self.lasting else given)[name] for name in self._names}
        return self.step.outputs({**own, **carried})

    def close(self) -> None:
        for part in self.parts:
            part.runner.close()
        self.step.close()
