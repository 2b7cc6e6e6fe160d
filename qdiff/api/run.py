"""What all functions of the API share: opening a run, and where and how visibly they work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdiff.api.arguments import checked
from qdiff.api.progress import Progress, reporting
from qdiff.runs.run import Run

RunOrPath = Run | Path | str


@checked
def open_run(run: RunOrPath) -> Run:
    """Return the run of a folder that has to be there; a :class:`~qdiff.runs.run.Run` is returned as it is.

    Raises:
        InputError: the folder is no run folder.
    """
    return run if isinstance(run, Run) else Run.existing(run)


@contextmanager
def working(device: str | None, progress: Progress) -> Iterator[None]:
    """Compute on a device and report progress inside the block."""
    if device is not None:
        from qdiff.device import set_device

        set_device(device)
    with reporting(progress):
        yield
