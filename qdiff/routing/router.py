"""Who sets the routes: a state machine over the calls of one backbone.

State belongs to a *branch of guidance of one picture*: calls with the same condition (text states, masks) whose timesteps fall.
It is found by the condition's value and begins anew when the timestep does not fall, so pictures that take turns, guidance with
one call or two a step, and cancelled pictures need no help from the pipeline. A graph has one route for a whole call, so where
routes depend on samples (:attr:`qdiff.plan.routing_plan.RoutingPlan.by_sample`) a batch is cut into calls of one sample each
(:meth:`Router.one_by_one`): pictures do not depend on their batch mates. The number of the sample in its batch is a part of the
condition, as several have the same negative prompt. Where routes follow the timestep alone, a batch is one call.

The rules, for every block:

1. Without a call before, or with another shape than it, a block with a predictor takes the careful branch.
2. A block is reused, at most ``in_a_row`` times, where the error that is expected of it stays within the tolerance:
   ``gain (sum of drifts)^2`` with its last drift for every call that it is left out of. The first call after that takes the
   careful branch, which clears the noise out of the delta.
3. ``predicted``: careful where the error of the prediction that the cheap branch would cause, ``gain (slope change +
   intercept)^2`` with the change of the call before, is above the threshold. ``static``, ``table``: what the table says for the
   nearest timestep.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qdiff.plan.routing_plan import REUSE, RoutedBlock, RoutingPlan

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.recording.inputs import InputSpec

REMEMBERED = 4  # pictures and branches of guidance whose state is kept: deltas are large


@dataclass
class State:
    """What is known of the calls with one condition."""

    timestep: float
    shape: tuple[int, ...]
    changes: list[list[float]]  # [blocks][batch]
    drifts: list[float]  # the largest of the batch
    left_out: list[int]
    drifted: list[float]
    deltas: Tensor | None = None
    history: list[tuple[float, list[int]]] = field(default_factory=list)


@dataclass
class Router:
    """See the module's docstring.

    Args:
        plan: whose rules are followed.
        varying: inputs that change from step to step; the others are the condition.

    ``sample`` is the number of the sample in its batch that is called for. ``counts`` are block evaluations so far by route. With
    ``record`` the ``history`` of all calls is kept; a ``script`` (routes by timestep) is followed instead of the rules.
    """

    plan: RoutingPlan
    varying: frozenset[str]
    counts: dict[int, int] = field(default_factory=dict)
    history: list[tuple[float, list[int]]] = field(default_factory=list)
    record: bool = False
    script: Mapping[float, list[int]] | None = None
    disturbed: int | None = (
        None  # index of a timestep at which blocks are to err, see :func:`qdiff.allocation.routed.influence`
    )

    def __post_init__(self) -> None:
        self.sample, self._remembered = 0, REMEMBERED
        self._states: OrderedDict[int, State] = OrderedDict()
        self._call: tuple[int, float, tuple[int, ...], State | None, list[int]] | None = None

    def route(self, timestep: float, inputs: Mapping[str, Tensor]) -> tuple[list[int], Tensor | None]:
        """Return routes of the next call and, with reuse, the deltas ``[blocks, batch, tokens, width]`` of the call
        before (``None`` where there is none).

        Args:
            timestep: of the call.
            inputs: of the backbone, by name.
        """
        shape = tuple(size for name in sorted(self.varying & inputs.keys()) for size in inputs[name].shape)
        key = self._key(inputs)
        state = self._states.get(key)
        if state is not None and (timestep >= state.timestep or shape != state.shape):
            state = None
        routes = [self._route(index, block, timestep, state) for index, block in enumerate(self.plan.blocks)]
        routes = routes if self.script is None else self.script[timestep]
        self._call = key, timestep, shape, state, routes
        return routes, None if state is None else state.deltas

    def observe(self, changes: Tensor, drifts: Tensor | None = None, deltas: Tensor | None = None) -> None:
        """Take over what the call reported: ``changes [blocks, batch]``, and with reuse ``drifts`` and new deltas."""
        if self._call is None:
            raise RuntimeError("the router was told of a call that it gave no routes for")
        key, timestep, shape, before, routes = self._call
        self._call = None
        new = State(
            timestep,
            shape,
            changes.tolist(),
            [float("inf")] * len(routes) if drifts is None else drifts.amax(dim=1).tolist(),
            [0] * len(routes),
            [0.0] * len(routes),
            deltas,
        )
        for index, route in enumerate(routes):
            self.counts[route] = self.counts.get(route, 0) + 1
            if route == REUSE and before is not None:
                new.changes[index], new.drifts[index] = before.changes[index], before.drifts[index]
                new.left_out[index] = before.left_out[index] + 1
                new.drifted[index] = before.drifted[index] + before.drifts[index]
        if self.record:
            self.history.append((timestep, routes))
        new.history = [*(before.history if before is not None else []), (timestep, routes)]
        self._states[key] = new
        self._states.move_to_end(key)
        while len(self._states) > self._remembered:
            self._states.popitem(last=False)

    def latest(self) -> list[tuple[float, list[int]]]:
        """Return timesteps and routes of the picture, or of its branch of guidance, that was called for last."""
        return next(reversed(self._states.values())).history if self._states else []

    def forget(self) -> None:
        """Drop all state and all counts."""
        self._states.clear()
        self.counts.clear()
        self.history.clear()
        self._call = None

    @property
    def skipped(self) -> float:
        """Return the share of block evaluations that were left out."""
        return self.counts.get(REUSE, 0) / max(1, sum(self.counts.values()))

    def _route(self, index: int, block: RoutedBlock, timestep: float, state: State | None) -> int:
        reuse, place = self.plan.reuse, nearest(self.plan.timesteps, timestep)
        if state is not None and reuse is not None:
            left_out, drift = state.left_out[index], state.drifts[index]
            expected = block.reuse_gains[place] * (state.drifted[index] + drift) ** 2
            if left_out < reuse.in_a_row and expected <= reuse.tolerance:
                return REUSE
            if left_out and block.switches:
                return 0
        if len(block.branches) == 1:
            return 0
        if block.predictor is None:
            return block.table[place]
        if state is None or self.plan.threshold is None:
            return 0
        errors = [block.predictor.error(change, place) for change in state.changes[index]]
        return 0 if sum(errors) / len(errors) > self.plan.threshold else 1

    def one_by_one(
        self, call: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], specs: Sequence[InputSpec]
    ) -> Tensor:
        """Return the predictions ``[batch, ...]`` of calls for every sample alone.

        Args:
            call: gives the prediction for one sample's inputs; it asks :meth:`route`.
            inputs: of the whole batch, by name.
            specs: of the inputs.
        """
        import torch

        from qdiff.recording.inputs import samples_of

        count = len(inputs["timestep"])
        self._remembered = max(self._remembered, count * REMEMBERED)
        predictions = []
        try:
            for self.sample in range(count):
                predictions.append(call(samples_of(specs, inputs, slice(self.sample, self.sample + 1))))
        finally:
            self.sample = 0
        return torch.cat(predictions)

    def _key(self, inputs: Mapping[str, Tensor]) -> int:
        digest = self.sample
        for name in sorted(inputs):
            if name not in self.varying:
                digest = zlib.crc32(inputs[name].detach().cpu().contiguous().view(-1).numpy().tobytes(), digest)
        return digest


def nearest(timesteps: list[float], timestep: float) -> int:
    """Return the index of the nearest calibrated timestep."""
    return min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - timestep))
