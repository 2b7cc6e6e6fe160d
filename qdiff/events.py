"""Progress and log lines: one source, several readers (terminal, plain log, web page).

Work that takes long reports through :func:`track` or :class:`Progress` and does not know who listens. Results never go
through here: stdout belongs to them, progress to stderr.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO, TypeVar

T = TypeVar("T")
log = logging.getLogger("qdiff")
ENOUGH = 2  # units from which on the time that is left can be estimated


@dataclass(frozen=True)
class Event:
    """One report of a piece of work. ``done``/``total`` count units; ``seconds`` have passed since its start."""

    task: str
    done: int
    total: int
    seconds: float
    finished: bool = False

    @property
    def remaining(self) -> float | None:
        """Return the estimated seconds left, from the mean time of the units done so far in this process; ``None`` before
        :data:`ENOUGH` are done: the first one warms caches and compiles, and says little about the others.
        """
        return self.seconds / self.done * (self.total - self.done) if self.done >= ENOUGH else None


class Listener(Protocol):
    """Who wants to know: called from the thread that works, so it must return at once."""

    def __call__(self, event: Event) -> None: ...


def duration(seconds: float) -> str:
    """Return a short duration for people: ``75.2`` gives ``1m15s``."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


class TerminalListener:
    """A bar that redraws itself on a terminal; one line every ten seconds into a file or a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        live = self._stream.isatty()
        now = time.monotonic()
        if not event.finished and now - self._last < (0.1 if live else 10.0):
            return
        self._last = now
        left = event.remaining
        if event.finished:
            text = f"{event.task}: {event.done}/{event.total} in {duration(event.seconds)}"
        else:
            text = f"{event.task}: {event.done}/{event.total}, "
            text += "estimating" if left is None else f"{duration(left)} left"
        if live:
            width = 24
            filled = width * event.done // max(event.total, 1)
            bar = "█" * filled + "░" * (width - filled)
            self._stream.write(f"\r\x1b[2K{bar} {text}" + ("\n" if event.finished else ""))
        elif event.finished and event.seconds < 2.0:
            return
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("qdiff_listener")


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send the events of the work inside the block to ``listener`` (``None``: nobody)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def listened_to() -> bool:
    """Return whether it was said already who listens to the work of this context, be it nobody."""
    return _listener in contextvars.copy_context()


class Progress:
    """Counts the units of one task and tells the listener. Units done by an earlier process are given as ``start``.

    >>> with Progress("calibrate", total=3) as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    """

    def __init__(self, task: str, total: int) -> None:
        self.task, self.total, self.done = task, total, 0
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None:
            self._tell(finished=True)

    def advance(self, units: int = 1) -> None:
        """Report that ``units`` more are done."""
        self.done += units
        self._tell()

    def _tell(self, finished: bool = False) -> None:
        listener = _listener.get(None)
        if listener is not None:
            listener(Event(self.task, self.done, self.total, time.monotonic() - self._start, finished))


def track(items: Iterable[T], task: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` and report each one done."""
    if total is None:
        items = list(items)
        total = len(items)
    with Progress(task, total) as progress:
        for item in items:
            yield item
            progress.advance()
