"""One compute slot and the queue in front of it.

Diffusion is bound by memory bandwidth and cores: two pictures at once take as long as one after the other, and hold twice
the memory. So there is one thread that works, and a bounded first-in-first-out queue. Why not Gradio's queue: it admits
before the limits are known, counts events and not work, and does not exist for a caller without Gradio.

A job's state is a single value that is overwritten (:class:`Update`), not a stream: who reads slowly sees fewer previews and
never delays the work. Stopping is co-operative, at the next denoising step.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypedDict, TypeVar, Unpack

from qdiff.errors import InputError, QdiffError
from qdiff.events import duration

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("qdiff.app")
T = TypeVar("T")
Result = TypeVar("Result", covariant=True)
State = Literal["queued", "running", "done", "failed", "cancelled"]


class BusyError(QdiffError):
    """The request is fine, and there is no room for it now."""

    exit_code = 6


class Stopped(Exception):
    """Raised inside a job's work at a step boundary: it was cancelled, took too long, or the service goes away."""


@dataclass(frozen=True)
class Update(Generic[Result]):
    """Holds what is known about a job. ``place`` counts from 1 in the queue; ``seconds_left`` is an estimate or ``None``;
    ``preview`` is a small picture; ``result`` is there when the job is done.
    """

    state: State
    place: int = 0
    task: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    preview: Image | None = None
    result: Result | None = None
    error: QdiffError | None = None

    @property
    def final(self) -> bool:
        """Return whether nothing follows."""
        return self.state in ("done", "failed", "cancelled")


class UpdateChanges(TypedDict, Generic[T], total=False):
    """Fields of :class:`Update` that change."""

    state: State
    place: int
    task: str
    step: int
    steps: int
    seconds_left: float | None
    preview: Image | None
    result: T | None
    error: QdiffError | None


@dataclass(eq=False)
class Job(Generic[T]):
    """One admitted request. Made by :meth:`Slot.submit`; ``work(job)`` runs in the slot's thread and returns the result."""

    client: str
    kind: str
    work: Callable[[AnyJob], T]
    most_seconds: float
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._update: Update[T] = Update("queued")
        self._version = 0
        self._stop: str | None = None

    @property
    def update(self) -> Update[T]:
        """Return the newest state."""
        return self._update

    def publish(self, **changes: Unpack[UpdateChanges[T]]) -> None:
        """Overwrite parts of the state and wake who waits for it."""
        with self._changed:
            if not self._update.final:
                self._update = replace(self._update, **changes)
                self._version += 1
                self._changed.notify_all()

    def updates(self, every: float = 0.0) -> Iterator[Update[T]]:
        """Yield the state whenever it changed, at most once in ``every`` seconds, until a final one, which always
        comes.
        """
        seen = -1
        while True:
            with self._changed:
                if self._version == seen:
                    self._changed.wait(timeout=10.0)
                seen, update = self._version, self._update
            yield update
            if update.final:
                return
            if every:
                time.sleep(every)

    def wait(self, timeout: float | None = None) -> Update[T]:
        """Wait for the final state (or for ``timeout`` seconds) and return the state."""
        with self._changed:
            self._changed.wait_for(lambda: self._update.final, timeout)
            return self._update

    def stop(self, why: str = "cancelled") -> None:
        """Ask the work to end at the next step; the first reason counts."""
        self._stop = self._stop or why

    def checkpoint(self) -> None:
        """Raise if the job is to stop; the work calls this between steps.

        Raises:
            Stopped: it was cancelled.
            InputError: it took longer than it may.
        """
        if self._stop is not None:
            raise Stopped(self._stop)
        if self.started is not None and time.monotonic() - self.started > self.most_seconds:
            raise InputError(
                f"This took longer than {duration(self.most_seconds)} and was stopped.",
                "Take fewer steps, a smaller size, or a faster engine.",
            )


AnyJob = Job[Any]
"""A job, whatever it returns."""


class Slot:
    """The thread that computes. ``waiting`` is how many jobs may queue behind the running one.

    Args:
        on_end: called after every job, in the slot's thread, before its final state is published.
        guard: turns any exception of the work into the error that may be shown.
    """

    def __init__(
        self, waiting: int, guard: Callable[[BaseException], QdiffError], on_end: Callable[[AnyJob, State], None]
    ) -> None:
        self.most_waiting = waiting
        self._guard, self._on_end = guard, on_end
        self._lock = threading.Condition()
        self._queue: deque[AnyJob] = deque()
        self._running: AnyJob | None = None
        self._closed = False
        self._recent: deque[float] = deque(maxlen=8)  # seconds of the last jobs: what a waiting one is told
        self._thread = threading.Thread(target=self._loop, name="qdiff-slot", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T]) -> Job[T]:
        """Admit a job, or say why not.

        Raises:
            BusyError: the queue is full, this client has a job already, or the service is closing.
        """
        with self._lock:
            if self._closed:
                raise BusyError("The service is shutting down.", "Try again when it is back.")
            if any(other.client == job.client for other in self._all()):
                raise BusyError("You have a request in work already.", "Wait for it, or cancel it first.")
            if len(self._queue) >= self.most_waiting:
                wait = duration(self.mean_seconds * (len(self._queue) + 1))
                raise BusyError(f"The queue is full: {len(self._queue)} are waiting.", f"Try again in about {wait}.")
            self._queue.append(job)
            self._tell_places()
            self._lock.notify_all()
        return job

    def cancel(self, job: AnyJob, why: str = "cancelled") -> None:
        """End a waiting job at once, a running one at its next step. Twice is once."""
        with self._lock:
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
                self._tell_places()
            else:
                job.stop(why)
        if waiting:
            self._end(job, "cancelled")

    def cancel_client(self, client: str) -> int:
        """Cancel whatever this client has; return how many jobs that were."""
        with self._lock:
            jobs = [job for job in self._all() if job.client == client]
        for job in jobs:
            self.cancel(job)
        return len(jobs)

    def close(self, grace: float) -> None:
        """Refuse new jobs, cancels waiting ones, let the running one come to its next step, and end the thread."""
        with self._lock:
            self._closed = True
            jobs = list(self._all())
            self._lock.notify_all()
        for job in jobs:
            self.cancel(job, "the service is shutting down")
        self._thread.join(grace)

    @property
    def waiting(self) -> int:
        """Return jobs in the queue."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Return whether a job runs."""
        return self._running is not None

    @property
    def mean_seconds(self) -> float:
        """Return the mean seconds of the last jobs; one second before there was any."""
        return sum(self._recent) / len(self._recent) if self._recent else 1.0

    def _all(self) -> Iterator[AnyJob]:
        return itertools.chain([self._running] if self._running else [], list(self._queue))

    def _tell_places(self) -> None:
        for place, job in enumerate(self._queue, 1):
            left = self.mean_seconds * (place - (0 if self._running else 1))
            job.publish(place=place, seconds_left=left if self._recent else None)

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._running = self._queue.popleft()
                job.started = time.monotonic()
                self._tell_places()
            state, result, error = self._run(job)
            with self._lock:
                self._running = None
                if state == "done":
                    self._recent.append(time.monotonic() - job.started)
            self._end(job, state, error=error, result=result)

    def _run(self, job: Job[T]) -> tuple[State, T | None, QdiffError | None]:
        job.publish(state="running", place=0, seconds_left=None)
        try:
            job.checkpoint()
            return "done", job.work(job), None
        except Stopped:
            return "cancelled", None, None
        except BaseException as error:  # the thread must outlive whatever a job does
            return "failed", None, self._guard(error)

    def _end(self, job: Job[T], state: State, result: T | None = None, error: QdiffError | None = None) -> None:
        job.ended = time.monotonic()
        job.work = _no_work  # what the work holds (settings, callbacks) need not live as long as who watches the job
        try:
            self._on_end(job, state)
        except Exception:
            log.exception("counting a job failed")
        job.publish(state=state, place=0, preview=None, seconds_left=None, result=result, error=error)


def _no_work(job: AnyJob) -> NoReturn:
    raise RuntimeError("this job has ended")
