"""Which lists are in force at which timestep.

Masks differ little between prompts and much along the noise schedule, so there is one set for each group of timesteps, told by
the share of the noise schedule that is left and never by a step's number: any scheduler and any number of steps find their
lists. In the noisiest group everything is read: what a clip becomes is decided there.

Engines take the lists as two inputs. To change groups is to bind other tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.attention.lists import BlockLists
from qdiff.errors import InputError
from qdiff.plan.attention_plan import BLOCKS, BOUNDS

TIMESTEPS = 1000.0  # of the noise schedule: what timesteps of all families are counted in


@dataclass
class Schedule:
    """Lists by group.

    Args:
        edges: falling shares of the noise schedule.
        lists: for all heads of all sparse attentions: one for timesteps from ``edges[0]`` on (everything is read), then one for
            each group below an edge.
    """

    edges: list[float]
    lists: list[BlockLists]

    def group(self, timestep: float) -> int:
        """Return the number of the group: 0 is the noisiest."""
        return sum(timestep < edge * TIMESTEPS for edge in self.edges)

    def at(self, timestep: float) -> BlockLists:
        """Return the lists in force."""
        return self.lists[self.group(timestep)]

    def inputs(self, timestep: float) -> dict[str, Tensor]:
        """Return the lists in force as a graph's inputs."""
        lists = self.at(timestep)
        return {BLOCKS: lists.blocks, BOUNDS: lists.bounds}

    def widest(self) -> BlockLists:
        """Return the lists by which every block reads every block: the largest inputs that there are."""
        return self.lists[0]


def edges_of(timesteps: list[float], dense: float, groups: int) -> list[float]:
    """Return edges that put equally many of the recorded timesteps below ``dense`` into each of ``groups``.

    Args:
        timesteps: falling.
        dense: share of the noise schedule from which on everything is read.
        groups: how many.
    """
    below = [timestep / TIMESTEPS for timestep in timesteps if timestep < dense * TIMESTEPS]
    size = max(1, math.ceil(len(below) / groups))
    middles = [(below[i - 1] + below[i]) / 2 for i in range(size, len(below), size)]
    return [dense, *middles]


class ScheduleState:
    """Where the lists in force hang, for the attentions of one backbone to read.

    A backbone that runs in torch sets it from its schedule at the start of a forward (:func:`qdiff.attention.sparse.install`);
    a backbone that is traced for export is given lists as inputs, and ``pinned`` keeps them.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pinned: tuple[Tensor, Tensor] | None = None
        self.now = self._of(0.0)

    def set(self, timestep: float) -> None:
        """Take the lists of a timestep for the calls that follow."""
        self.now = self._of(timestep)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return ``blocks`` and ``bounds`` (:class:`qdiff.attention.lists.BlockLists`)."""
        return self.now if self.pinned is None else self.pinned

    def _of(self, timestep: float) -> tuple[Tensor, Tensor]:
        lists = self.schedule.at(timestep)
        return lists.blocks, lists.bounds


def one_timestep(timestep: Tensor | float) -> float:
    """Return the timestep of a whole call.

    Raises:
        InputError: a batch with several: its samples would want different lists.
    """
    values = torch.as_tensor(timestep).reshape(-1)
    if bool((values != values[0]).any()):
        raise InputError(
            f"one call has several timesteps ({values.unique().tolist()[:4]})",
            "sparse attention has one set of lists for a call; call the backbone once for each timestep",
        )
    return float(values[0])
