"""Progress of long work in Python: a tqdm bar (also in notebooks), a callback, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from qdiff.events import Event, Listener, listened_to, listening

Progress = bool | Listener | None
"""``True``: a tqdm bar on stderr. ``False``: none. A function: it is called with every :class:`qdiff.events.Event`. ``None``: who
listens already, else a bar."""


class TqdmListener:
    """One tqdm bar for each task, closed when the task has ended."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: str | None = None

    def __call__(self, event: Event) -> None:
        """Move the bar of the event's task; another task gets a new bar."""
        from tqdm.auto import tqdm

        if self._task != event.task:
            self.close()
            self._bar, self._task = tqdm(total=event.total, desc=event.task, leave=False), event.task
        self._bar.update(event.done - self._bar.n)
        if event.finished:
            self.close()

    def close(self) -> None:
        """Close the bar that is shown, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._task = None


@contextlib.contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """Report the progress of the work inside the block as ``progress`` says."""
    if progress is None and listened_to():
        yield
    elif progress is False:
        with listening(None):
            yield
    elif progress is None or progress is True:
        bars = TqdmListener()
        try:
            with listening(bars):
                yield
        finally:
            bars.close()
    else:
        with listening(progress):
            yield
