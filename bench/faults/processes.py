"""Commands of qdiff in processes that are forked from this one, which has imported what they need.

Nothing of a backend may run in this process itself: threads do not come along through a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = "modules.json"
_POLL = 0.002  # seconds between looks at whether a process has ended


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: exit code; that of a signal as a shell gives it (128 + signal).
        signal: that ended the process, 0 where it ended by itself.
        seconds: from its start to its end.
        hung: whether it was killed because it ran past its limit.
    """

    code: int
    signal: int
    seconds: float
    out: str
    err: str
    hung: bool = False


class Commands:
    """Starts commands.

    Args:
        folder: for logs, ``QDIFF_HOME`` and the temporary folder of the processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.temporary = folder / "home", folder / "tmp"
        for each in (folder, self.home, self.temporary):
            each.mkdir(parents=True, exist_ok=True)
        self._preload()

    def _preload(self) -> None:
        """Import what a former process had imported at its end, and at least the command line."""
        known = self.folder / MODULES
        names = json.loads(known.read_text()) if known.exists() else ["torch", "diffusers"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in [*names, "qdiff.cli.commands"]:
                with contextlib.suppress(
                    Exception
                ):  # a module that cannot be imported alone is imported where it is needed
                    importlib.import_module(name)

    def learn(self, arguments: Sequence[object], threads: int = 1) -> Ended:
        """Run a command to its end and import what it had imported."""
        ended = self.run(arguments, threads=threads, list_modules=True)
        self._preload()
        return ended

    def run(
        self,
        arguments: Sequence[object],
        limit: float = 600.0,
        *,
        threads: int = 1,
        may_read_all: bool = True,
        list_modules: bool = False,
    ) -> Ended:
        """Run a command to its end, or kills it after ``limit`` seconds."""
        return self.interrupt(
            arguments,
            limit,
            signal.SIGKILL,
            threads=threads,
            may_read_all=may_read_all,
            list_modules=list_modules,
            late=True,
        )

    def interrupt(
        self,
        arguments: Sequence[object],
        moment: float,
        number: int,
        *,
        threads: int = 1,
        may_read_all: bool = True,
        list_modules: bool = False,
        late: bool = False,
        patience: float = 60.0,
    ) -> Ended:
        """Run a command and send it a signal after ``moment`` seconds, unless it has ended by then.

        Args:
            arguments: of the command line.
            moment: seconds after the start.
            number: of the signal.
            threads: of torch.
            may_read_all: ``False`` takes root's right to read and write every file from the process.
            list_modules: whether the process lists the modules that it imported.
            late: whether the signal means that it hung.
            patience: seconds that it has to end after the signal, before it is killed.
        """
        out, err = self.folder / "stdout", self.folder / "stderr"
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become([str(argument) for argument in arguments], out, err, threads, may_read_all, list_modules)
        status = _wait(pid, start + moment)
        hung = False
        if status is None:
            hung = late
            os.kill(pid, number)
            status = _wait(pid, time.monotonic() + patience)
            if status is None:
                hung = True
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
        by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = 128 + by if by else os.WEXITSTATUS(status)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
        return Ended(code, by, time.monotonic() - start, texts[0], texts[1], hung)

    def _become(
        self, arguments: list[str], out: Path, err: Path, threads: int, may_read_all: bool, list_modules: bool
    ) -> None:
        """Run the command in the forked child; this is the rest of its life."""
        code = 70
        try:
            for number, path in ((1, out), (2, err)):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, number)
            if not may_read_all:
                _obey_permissions()
            os.environ.update(QDIFF_HOME=str(self.home), TMPDIR=str(self.temporary))
            os.chdir(self.folder)
            import tempfile

            tempfile.tempdir = None  # it was chosen in the parent
            import torch

            from qdiff.cli import main

            torch.set_num_threads(threads)
            sys.argv = ["qdiff", *arguments]
            try:
                main.main()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
            if list_modules:
                names = sorted(name for name in sys.modules if not name.startswith("__"))
                before = (
                    set(json.loads((self.folder / MODULES).read_text())) if (self.folder / MODULES).exists() else set()
                )
                (self.folder / MODULES).write_text(json.dumps(sorted(before.union(names))))
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _obey_permissions() -> None:
    """Drop the capabilities by which root passes over permissions of files (capabilities(7): 1, DAC_OVERRIDE, and 2,
    DAC_READ_SEARCH). Python has no call for it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits of each
    if library.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for index in (0, 1):
        sets[index] &= ~0b110 & 0xFFFFFFFF
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _wait(pid: int, until: float) -> int | None:
    """Return the status of a child that ends before ``until`` (of the monotonic clock)."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        left = until - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(_POLL, left))
