"""How fast engines are beside each other, on a machine that may have other work: they take turns, step by step.

Timed one after the other, an engine that had the machine alone looks several times as fast as one that shared it. Here every
round calls all of them at nearly the same moment, in rotating order, and only ratios within a round are used. The median of the
ratios does not move until half of the rounds are disturbed; how far they spread, and what other processes used of the cores
meanwhile, says whether the numbers can be believed.

A turn is two steps, of which the second is timed: in the first the threads of the one before still spin, and the caches hold
its weights. Which steps come second alternates from round to round. Steps run in order, because engines with routes or caches
depend on the step before; the first step of a trajectory, which computes what depends on the prompt alone, is never timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qdiff.files import Json

LEAST_ROUNDS, MOST_ROUNDS = 6, 60
WIDEST_QUARTILES = 0.25  # of the pairs' ratios around their median: more is no measurement
MOST_LOST = 1.25  # of times added up, over what they would be at their medians
FULL, OTHERS = 0.9, 0.1  # shares of the cores: of all work together, of other processes' alone

Step = Callable[[int], None]


@dataclass(frozen=True)
class Speed:
    """One engine's speed.

    ``seconds`` of a step; ``speedup`` over the reference, between ``low`` and ``high`` in the middle half of the pairs;
    ``reason`` why it is not reliable, or empty.
    """

    seconds: float
    speedup: float
    low: float
    high: float
    pairs: int
    reason: str = ""

    def to_json(self) -> dict[str, Json]:
        """Return the entries of a row of ``compare.json``."""
        return {
            "seconds_per_step": self.seconds,
            "speedup": self.speedup,
            "speedup_range": [self.low, self.high],
            "speed_pairs": self.pairs,
            "speed_reliable": not self.reason,
            "speed_reason": self.reason or None,
        }


class Load:
    """What the cores of this process do, from its making on. Where the system does not say, nothing is reported."""

    def __init__(self) -> None:
        self._start = self._read()

    def _read(self) -> tuple[float, float, float]:
        """Return seconds: wall, of this process, of everything on its cores (stolen time included)."""
        import psutil

        cores = psutil.cpu_times(percpu=True)
        own = psutil.Process().cpu_times()
        busy = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) for core in (cores[i] for i in _cores(cores)))
        # A guest's time is part of user time on Linux: counted once.
        busy -= sum(getattr(cores[i], "guest", 0.0) + getattr(cores[i], "guest_nice", 0.0) for i in _cores(cores))
        return time.perf_counter(), own.user + own.system, busy

    def reason(self) -> str:
        """Return why speeds measured meanwhile are not reliable; empty where nothing speaks against them."""
        wall, own, busy = (now - before for now, before in zip(self._read(), self._start, strict=True))
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        others = max(0.0, busy - own)
        if wall <= 0 or others < OTHERS * count * wall or busy < FULL * count * wall:
            return ""
        return f"other processes used {others / wall:.1f} of the {count} cores"


def _cores(every: Sequence[object]) -> list[int]:
    """Return indices of the cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(len(every)))
    return [core for core in os.sched_getaffinity(0) if core < len(every)]


def take_turns(
    engines: Mapping[str, Step],
    steps: int,
    *,
    budget: float = 4.0,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], Load] = Load,
) -> dict[str, Speed]:
    """Return speeds of ``engines``, the first of which is the reference.

    Args:
        engines: name -> function that computes one step, by its index, and returns when it is done.
        steps: of the trajectory that every round computes.
        budget: seconds after which no further round begins; at least ``LEAST_ROUNDS`` are made.
        clock: seconds.
        load: made when the measurement begins; its ``reason()`` is asked when it ends.
    """
    names = list(engines)
    for name in names:  # compiles, allocates, and computes what is computed once
        for step in range(steps):
            engines[name](step)
    watch, start = load(), clock()
    rounds: list[dict[str, dict[int, float]]] = []
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and clock() - start < budget):
        rounds.append(_one_round(engines, names, steps, len(rounds), clock))
    reason = watch.reason()
    return {name: _speed(name, names[0], rounds, reason) for name in names}


def _one_round(
    engines: Mapping[str, Step], names: list[str], steps: int, number: int, clock: Callable[[], float]
) -> dict[str, dict[int, float]]:
    """Return seconds of the timed steps by engine."""
    times: dict[str, dict[int, float]] = {name: {} for name in names}
    begin = -(number % 2)
    for turn, first in enumerate(range(begin, steps, 2)):
        shift = (number + turn) % len(names)
        for name in names[shift:] + names[:shift]:
            for step in range(max(first, 0), min(first + 2, steps)):
                start = clock()
                engines[name](step)
                if step > first or steps == 1:
                    times[name][step] = clock() - start
    if steps > 1:
        for timed in times.values():
            timed.pop(0, None)
    return times


def _speed(name: str, reference: str, rounds: list[dict[str, dict[int, float]]], load: str) -> Speed:
    own: dict[int, list[float]] = {}
    base: dict[int, list[float]] = {}
    for times in rounds:
        for step, seconds in times[name].items():
            own.setdefault(step, []).append(max(seconds, 1e-9))
            base.setdefault(step, []).append(max(times[reference][step], 1e-9))
    float_seconds = seconds = 0.0
    gains: list[float] = []  # speed-ups of single pairs, over the median of their step
    for step in own:
        ratios = [mine / other for mine, other in zip(own[step], base[step], strict=True)]
        usual, usual_base = statistics.median(ratios), statistics.median(base[step])
        float_seconds += usual_base
        seconds += usual_base * usual
        gains += [usual / ratio for ratio in ratios]
    speedup = float_seconds / seconds
    low, _, high = statistics.quantiles(gains, n=4, method="inclusive") if len(gains) > 1 else (1.0,) * 3
    reason = load
    if not reason and high - low > WIDEST_QUARTILES:
        reason = "its speed-up over float changed from pair to pair"
    if not reason and max(_lost(own), _lost(base)) > MOST_LOST:
        reason = "some rounds took much longer than others"
    return Speed(seconds / len(own), speedup, speedup * low, speedup * high, len(gains), reason)


def _lost(times: Mapping[int, list[float]]) -> float:
    """Return what the times add up to, over what they would at their step's median: a busy phase shows, a single long
    call hardly.
    """
    usual = sum(statistics.median(step) * len(step) for step in times.values())
    return sum(sum(step) for step in times.values()) / usual
