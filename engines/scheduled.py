"""An engine whose attention follows block lists: at every step it is given those of the timestep.

The lists are inputs of the graph (:mod:`qdiff.attention.schedule`). Nobody outside has to know: whoever calls the runner names
the backbone's own inputs, and the lists follow from the value of ``timestep``. No engine is built or loaded to change them.

An engine may be for one width of lists (:mod:`.trt_plugin`); shorter ones are then padded, once for each group of timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qdiff.attention.schedule import Schedule, one_timestep
from qdiff.engines.base import Runner
from qdiff.plan.attention_plan import BLOCKS, BOUNDS

if TYPE_CHECKING:
    from torch import Tensor


class ScheduledRunner(Runner):
    """A runner with the lists added.

    Args:
        runner: of a graph that takes lists.
        schedule: of the plan that the graph was made from.
    """

    def __init__(self, runner: Runner, schedule: Schedule) -> None:
        self.runner, self.schedule = runner, schedule
        self.inputs = tuple(spec for spec in runner.inputs if spec.name not in (BLOCKS, BOUNDS))
        self._shape = next((spec.shape for spec in runner.inputs if spec.name == BLOCKS), (None, None))
        self._padded: dict[int, dict[str, Tensor]] = {}
        runner.keep((BLOCKS, BOUNDS))  # a group's lists are the same tensors at all of its steps

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.runner(self._with_lists(inputs))

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.runner.outputs(self._with_lists(inputs))

    def _with_lists(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        timestep = one_timestep(inputs["timestep"])
        if not isinstance(self._shape[1], int):
            return {**inputs, **self.schedule.inputs(timestep)}
        group = self.schedule.group(timestep)
        if group not in self._padded:
            self._padded[group] = _padded(self.schedule.inputs(timestep), self._shape[1])
        return {**inputs, **self._padded[group]}

    def close(self) -> None:
        self.runner.close()


def _padded(lists: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return the lists for an engine of one size: after the last bound come blocks that nobody reads."""
    import torch

    blocks = lists[BLOCKS]
    return {**lists, BLOCKS: torch.nn.functional.pad(blocks, (0, max(0, width - blocks.shape[1])))}
