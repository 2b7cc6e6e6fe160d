"""Speeds that are taken in turn: right on a machine that is busy for a while, and said to be unreliable where they are."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from qdiff.evaluation.timing import Load, take_turns


class Machine:
    """A clock that only work moves, and how much slower work is at a given time."""

    def __init__(self, slower=lambda engine, now: 1.0):
        self.now, self.slower, self.calls = 0.0, slower, []

    def engine(self, name, seconds):
        def step(index):
            self.calls.append((name, index))
            self.now += seconds(index) * self.slower(name, self.now)

        return step

    def reason(self):
        return ""

    def speeds(self, engines, steps, **settings):
        made = {name: self.engine(name, seconds) for name, seconds in engines.items()}
        return take_turns(made, steps, clock=lambda: self.now, load=lambda: self, **settings)


FLOAT_AND_FAST = {"float": lambda step: 0.1, "fast": lambda step: 0.025}


def test_a_quiet_machine():
    found = Machine().speeds({**FLOAT_AND_FAST, "slow": lambda step: 0.2}, 7)
    assert found["fast"].speedup == pytest.approx(4) and found["slow"].speedup == pytest.approx(0.5)
    assert found["fast"].seconds == pytest.approx(0.025) and found["float"].speedup == pytest.approx(1)
    assert not any(speed.reason for speed in found.values()) and found["fast"].pairs >= 18
    assert found["fast"].to_json()["speed_reliable"] is True


@pytest.mark.parametrize("victim", ["fast", "float", None])
def test_a_busy_phase_moves_no_ratio_and_is_told(victim):
    """A third of the time one engine, or all, take five times as long. One after the other, that gives 20 x or 0.8 x."""

    def slower(engine, now):
        return 5.0 if 2.0 < now % 6.0 < 4.0 and victim in (engine, None) else 1.0

    found = Machine(slower).speeds(FLOAT_AND_FAST, 6, budget=12.0)["fast"]
    assert found.speedup == pytest.approx(4, rel=0.03)
    assert found.reason and found.to_json()["speed_reliable"] is False


def test_a_machine_that_is_busy_throughout():
    machine = Machine()
    machine.reason = lambda: "other processes used 1.0 of the 2 cores"
    assert machine.speeds(FLOAT_AND_FAST, 4)["fast"].reason.startswith("other processes")


def test_steps_of_different_length_are_no_noise():
    """An engine that leaves out blocks at every second step: its gain is that of a whole trajectory."""
    found = Machine().speeds({"float": lambda step: 0.1, "reuse": lambda step: 0.05 if step % 2 else 0.01}, 9)["reuse"]
    assert found.speedup == pytest.approx(0.1 / 0.03) and not found.reason


def test_every_engine_computes_whole_trajectories_in_order():
    machine = Machine()
    machine.speeds({**FLOAT_AND_FAST, "other": lambda step: 0.05}, 5, budget=0)
    for name in ("float", "fast", "other"):
        own = [step for engine, step in machine.calls if engine == name]
        assert len(own) % 5 == 0 and own == list(range(5)) * (len(own) // 5)
    firsts = {machine.calls[start][0] for start in range(15, len(machine.calls) - 5, 15)}
    assert firsts == {"float", "fast", "other"}, "the order rotates"


def test_one_step():
    assert Machine().speeds(FLOAT_AND_FAST, 1)["fast"].speedup == pytest.approx(4)


def _burn(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_the_load_of_other_processes_is_seen():
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_burn, args=(20,)) for _ in range(len(os.sched_getaffinity(0)) + 1)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(20):
            load = Load()
            _burn(0.5)
            if load.reason():
                break
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    assert "other processes used" in load.reason()
