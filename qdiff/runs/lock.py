"""The lock of a run folder: one process works in it at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from qdiff.errors import QdiffError
from qdiff.files import open_lock


class RunLockedError(QdiffError):
    """Another process works in the same run folder."""

    exit_code = 3

    def __init__(self, path: Path, because: str | None = None) -> None:
        message = f"another qdiff works in {path}" + (f", and {because}" if because else "")
        super().__init__(message, "wait until it ends")


class RunLock:
    """The lock of one folder. It is free again when the process that holds it ends, however it does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._held = folder, False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock for the length of a block.

        Raises:
            RunLockedError: another process has it.
        """
        path = self.folder / ".lock"
        if path.is_file() and path.stat().st_nlink > 1:  # a hard-linked copy of a run would share its lock
            path.unlink(missing_ok=True)
        with os.fdopen(open_lock(path)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunLockedError(self.folder) from None
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def is_held_elsewhere(self) -> bool:
        """Return whether another process works here now."""
        if self._held:
            return False
        try:
            with open(self.folder / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock yet, or a folder that cannot be read
            return False
        return False
