"""The compute slot: bounded queue, places, cancelling, errors that do not kill it, a clean end."""

from __future__ import annotations

import threading

import pytest

from qdiff.app.jobs import BusyError, Job, Slot
from qdiff.errors import InputError, QdiffError
from tests.waiting import wait_until


def shown(error: BaseException) -> QdiffError:
    return error if isinstance(error, QdiffError) else QdiffError("broke")


@pytest.fixture
def ended() -> list:
    return []


@pytest.fixture
def slot(ended):
    slot = Slot(16, shown, lambda job, state: ended.append((job.client, state)))
    yield slot
    slot.close(5)


class Steps:
    """Work in steps that the test lets through one by one."""

    def __init__(self) -> None:
        self.gate, self.done = threading.Semaphore(0), 0

    def __call__(self, job: Job) -> str:
        for _ in range(1000):
            self.gate.acquire(timeout=10)
            self.done += 1
            job.checkpoint()
        return "finished"


def job(client: str, work=lambda job: "made", seconds: float = 60) -> Job:
    return Job(client, "generate", work, seconds)


def test_a_job_runs_and_gives_its_result(slot, ended):
    assert slot.submit(job("a")).wait(5).result == "made"
    assert ended == [("a", "done")]


def test_the_seventeenth_in_the_queue_is_told_so(slot):
    work = Steps()
    running = slot.submit(job("running", work))
    wait_until(lambda: slot.busy)
    waiting = [slot.submit(job(f"w{i}")) for i in range(16)]
    assert [one.update.place for one in waiting] == list(range(1, 17))
    with pytest.raises(BusyError, match="The queue is full: 16 are waiting"):
        slot.submit(job("one too many"))
    slot.cancel(running)
    work.gate.release()
    assert [one.wait(5).state for one in waiting] == ["done"] * 16, "those who were admitted are served"
    assert slot.submit(job("one too many")).wait(5).state == "done"


def test_places_move_up_and_a_waiting_job_leaves_at_once(slot):
    work = Steps()
    slot.submit(job("running", work))
    wait_until(lambda: slot.busy)
    first, second, third = (slot.submit(job(name)) for name in ("first", "second", "third"))
    slot.cancel(first)
    assert first.update.state == "cancelled" and (second.update.place, third.update.place) == (1, 2)
    assert slot.cancel_client("third") == 1 and slot.cancel_client("nobody") == 0
    slot.cancel_client("running")
    work.gate.release()
    assert second.wait(5).state == "done"


def test_a_cancelled_job_frees_the_slot_within_one_step(slot, ended):
    work = Steps()
    running = slot.submit(job("a", work))
    for _ in range(3):
        work.gate.release()
    wait_until(lambda: work.done >= 3)
    next_one = slot.submit(job("b"))
    slot.cancel(running)
    slot.cancel(running)
    work.gate.release()
    assert running.wait(5).state == "cancelled" and next_one.wait(5).state == "done"
    assert work.done == 4, "one step after the cancel"
    assert ended == [("a", "cancelled"), ("b", "done")]


def test_one_client_has_one_job(slot):
    work = Steps()
    running = slot.submit(job("a", work))
    with pytest.raises(BusyError, match="in work already"):
        slot.submit(job("a"))
    slot.cancel(running)
    work.gate.release()
    running.wait(5)
    assert slot.submit(job("a")).wait(5).state == "done"


@pytest.mark.parametrize("error", [ValueError("x"), InputError("y"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_an_error_ends_the_job_and_not_the_slot(slot, error):
    def work(job: Job) -> None:
        raise error

    update = slot.submit(job("a", work)).wait(5)
    assert update.state == "failed" and isinstance(update.error, QdiffError)
    assert slot.submit(job("a")).wait(5).state == "done"


def test_the_wall_clock_ends_a_job(slot):
    work = Steps()
    running = slot.submit(job("a", work, seconds=0.01))
    threading.Timer(0.1, work.gate.release).start()
    update = running.wait(5)
    assert update.state == "failed" and "took longer than" in str(update.error)


def test_who_watches_late_sees_the_end(slot):
    done = slot.submit(job("a"))
    done.wait(5)
    assert [update.state for update in done.updates()] == ["done"]


def test_closing_cancels_what_waits_and_refuses_what_comes(ended):
    slot, work = Slot(16, shown, lambda job, state: ended.append((job.client, state))), Steps()
    running = slot.submit(job("a", work))
    wait_until(lambda: slot.busy)
    waiting = slot.submit(job("b"))
    threading.Timer(0.1, work.gate.release).start()
    slot.close(5)
    assert waiting.update.state == running.update.state == "cancelled"
    with pytest.raises(BusyError, match="shutting down"):
        slot.submit(job("c"))
