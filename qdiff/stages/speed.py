"""Speeds of engines beside the float model: on the calls that the sampler made, each engine in turn
(:mod:`qdiff.evaluation.timing`).

Pictures are made by one engine after the other, so their seconds say what the machine did meanwhile as much as what the engine
can. The calls of the first batch of pictures are kept, and repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil

from qdiff import device
from qdiff.evaluation.timing import LEAST_ROUNDS, Speed, take_turns
from qdiff.events import log
from qdiff.resources import release_memory
from qdiff.runs.run import Run
from qdiff.stages.build import load_runner

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.engines import Runner
    from qdiff.models.model import Model

SECONDS = 4.0  # for all rounds, where so much time is enough for the least number of them
FEWEST_STEPS = 3
SPARE = 1.5  # memory that loaded engines may need over what was seen when each made its pictures

Call = dict[str, "Tensor"]


def measure_speeds(
    run: Run, model: Model, engines: Sequence[str], calls: Sequence[Call], together: int, seen: Mapping[str, Any]
) -> dict[str, Speed]:
    """Return speeds of ``float`` and of ``engines``, by name.

    Args:
        run: with built engines.
        model: with its float backbone.
        engines: names.
        calls: of the backbone, in the sampler's order.
        together: how many of them are one step.
        seen: what each made before (:class:`qdiff.stages.generate.Pictures`): it tells how long a step takes and what memory an
            engine adds.
    """
    steps = [calls[start : start + together] for start in range(0, len(calls), together)]
    per_step = sum(seen[name].seconds_per_step for name in ("float", *engines))
    if not _follows_steps(run):
        fitting = int(SECONDS / max(1e-9, per_step * (LEAST_ROUNDS + 1)))
        steps = steps[: max(FEWEST_STEPS, fitting)]
    release_memory()
    groups = [list(engines)]
    if sum(seen[name].added_bytes for name in engines) * SPARE > psutil.virtual_memory().available:
        groups = [[name] for name in engines]
        if len(groups) > 1:
            log.info("speed: memory does not hold all engines at once, so each is timed beside float alone")
    log.info("speed: %d steps, float and %s in turn", len(steps), ", ".join(engines))
    speeds: dict[str, Speed] = {}
    for group in groups:
        runners: dict[str, Runner] = {}
        try:
            for name in ("float", *group):
                runners[name] = load_runner(run, name, model)
            timed = take_turns(
                {name: _step(runner, steps) for name, runner in runners.items()}, len(steps), budget=SECONDS
            )
        finally:
            for runner in runners.values():
                runner.close()
        speeds = timed | speeds  # float's is that of the first group
    return speeds


def _follows_steps(run: Run) -> bool:
    """Return whether steps take different times: then all of a trajectory are timed, else as many as a few seconds
    hold.
    """
    from qdiff.plan.plan import Plan

    plan = Plan.load(run.file("plan.json"))
    return plan.routing is not None or plan.attention is not None


def _step(runner: Runner, steps: Sequence[Sequence[Call]]) -> Callable[[int], None]:
    def compute(index: int) -> None:
        for call in steps[index]:
            device.finish(runner(call).device)

    return compute
