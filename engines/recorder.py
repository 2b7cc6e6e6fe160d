"""What a sampler gave its backbone, kept while it runs: speeds are measured on it (:mod:`qdiff.stages.speed`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qdiff.engines.base import Runner
from qdiff.engines.hoisted import same_bytes

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 512 * 2**20


class CallRecorder(Runner):
    """A runner that keeps the inputs of its first calls.

    Args:
        runner: that computes them.
        most: calls to keep; fewer where they would hold more than ``MOST_BYTES``.
    """

    def __init__(self, runner: Runner, most: int) -> None:
        self.runner, self.inputs, self.lasting = runner, runner.inputs, runner.lasting
        self.calls: list[dict[str, Tensor]] = []
        self._left, self._bytes = most, 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._left > 0:
            self._keep(inputs)
        return self.runner(inputs)

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.runner.outputs(inputs)

    def _keep(self, inputs: Mapping[str, Tensor]) -> None:
        """Keep one call; a tensor that is equal to that of one of the two calls before (two branches of guidance) is
        kept once.
        """
        call: dict[str, Tensor] = {}
        for name, tensor in inputs.items():
            equal = [old[name] for old in self.calls[-2:] if same_bytes(old[name], tensor)]
            call[name] = equal[0] if equal else tensor.detach().clone()
            self._bytes += 0 if equal else tensor.numel() * tensor.element_size()
        self._left = 0 if self._bytes > MOST_BYTES else self._left - 1
        self.calls.append(call)

    def close(self) -> None:
        self.runner.close()
