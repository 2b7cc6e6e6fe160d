"""A backbone with branched blocks as a graph: routes and cached deltas go in, what blocks changed comes out.

============== ================================ ==========================================================
``routes``     ``[blocks]`` int64               number of a branch; anything else: reuse
``deltas``     ``[blocks, batch, cells, width]`` only with reuse: what each block added the last time (cells: its tokens)
``changes``    ``[blocks, batch]``              how much it changed its input
``drifts``     ``[blocks, batch]``              only with reuse: how much that differs from ``deltas``
``new_deltas`` as ``deltas``                    only with reuse: what it added now
============== ================================ ==========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.plan.routing_plan import CHANGES, DELTAS, DRIFTS, NEW_DELTAS, ROUTES
from qdiff.recording.inputs import Axis, InputSpec
from qdiff.routing.blocks import BranchState

CELLS = "cells"  # the axis of a block's tokens


@dataclass(frozen=True)
class Output:
    """Name and axes of something that a graph returns."""

    name: str
    axes: tuple[Axis, ...]


def names_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the inputs that a module takes in order, as :class:`qdiff.models.base.NamedInputs` says them."""
    names: Any = module.names
    return tuple(names)


class RoutesAsInputs(nn.Module):
    """A backbone that is given its routes, after its own inputs, instead of asking a router."""

    def __init__(self, module: nn.Module, branch_state: BranchState, width: int) -> None:
        super().__init__()
        self.module, self.branch_state, self.width = module, branch_state, width
        names = names_of(module)
        self.names = (*names, ROUTES, DELTAS) if branch_state.caching else (*names, ROUTES)
        self.exact: frozenset[str] = getattr(module, "exact", frozenset())

    def interface(
        self, example: Mapping[str, Tensor], cells: int, fixed: bool = False
    ) -> tuple[list[tuple[InputSpec, Tensor]], list[Output]]:
        """Return the inputs that are added, with examples, and the outputs.

        Args:
            example: one recorded call, whose blocks have ``cells`` tokens.
            cells: tokens of a block in ``example``.
            fixed: whether the graph takes that many alone, as sparse attention wants.
        """
        count = self.branch_state.blocks
        inputs = [(InputSpec(ROUTES, (count,), torch.int64, varies=True), torch.zeros(count, dtype=torch.int64))]
        outputs = [Output(CHANGES, (count, "batch"))]
        if self.branch_state.caching:
            batch = max(2, len(example["timestep"]))
            axes: tuple[Axis, ...] = (count, "batch", cells if fixed else CELLS, self.width)
            inputs.append((InputSpec(DELTAS, axes, varies=True), torch.zeros(count, batch, cells, self.width)))
            outputs += [Output(DRIFTS, (count, "batch")), Output(NEW_DELTAS, axes)]
        return inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the backbone's inputs in order, ``routes`` and with reuse ``deltas``."""
        branch_state, added = self.branch_state, 2 if self.branch_state.caching else 1
        branch_state.pinned, branch_state.routes = True, values[-added]
        branch_state.deltas = values[-1] if branch_state.caching else None
        try:
            prediction = self.module(*values[:-added])
            if not branch_state.caching:
                return prediction, branch_state.changes()
            return prediction, branch_state.changes(), branch_state.drifts(), branch_state.new_deltas()
        finally:
            branch_state.pinned, branch_state.deltas = False, None
            branch_state.clear()
