"""Independent pieces of work side by side: forked processes of one thread each, which share the parent's tensors.

A small model leaves most threads idle within an operator; several pieces at once keep them busy, and a fork copies nothing.
What a piece finds must reach the parent through files (:class:`qdiff.runs.partial.Scratch`).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from qdiff import device
from qdiff.errors import MemoryExhaustedError, QdiffError

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    Failure = tuple[int | None, QdiffError | str]  # the piece, and what a process failed with

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
WAIT = 1.0  # seconds between looks at whether a process is still there


def workers_for(pieces: int) -> int:
    """Return how many processes are of use: one for each of torch's threads; 1 where processes cannot be forked, or a
    GPU computes or has computed.
    """
    on_gpu = device.chosen().type != device.HOST or torch.cuda.is_initialized()
    if "fork" not in multiprocessing.get_all_start_methods() or on_gpu:
        return 1
    return max(1, min(torch.get_num_threads(), pieces))


def run_all(
    pieces: Sequence[int],
    work: Callable[[int], None],
    workers: int,
    done: Callable[[], None],
    name: Callable[[int], str] | None = None,
) -> None:
    """Call ``work`` with every piece, in forked processes, or here when one worker is enough.

    Args:
        pieces: numbers that ``work`` is called with.
        work: must not change what other pieces read.
        workers: number of processes.
        done: called in this process after each piece.
        name: what a piece is, in messages of errors.

    Raises:
        QdiffError: what ``work`` raised, with the piece's name. The others are ended.
        MemoryExhaustedError: a process was killed.
    """
    if workers <= 1:
        for piece in pieces:
            try:
                work(piece)
            except QdiffError as error:
                raise _named(error, name, piece) from error
            done()
        return
    context = multiprocessing.get_context("fork")
    todo: Queue[int | None] = context.Queue()
    results: Queue[Failure | None] = context.Queue()
    for piece in pieces:
        todo.put(piece)
    for _ in range(workers):
        todo.put(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks beside threads; see _serve
        processes = [
            context.Process(target=_serve, args=(todo, results, work, os.getpid()), daemon=True) for _ in range(workers)
        ]
        for process in processes:
            process.start()
    try:
        left = len(pieces)
        while left:
            try:
                failure = results.get(timeout=WAIT)
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in processes):
                    raise MemoryExhaustedError(
                        "a process that measured was killed", "use a machine with more memory, or fewer of its cores"
                    ) from None
                continue
            if failure is not None:
                failed, cause = failure
                if isinstance(cause, QdiffError):
                    raise _named(cause, name, failed)
                raise _named(QdiffError(f"a process failed:\n{cause}"), name, failed)
            left -= 1
            done()
    finally:
        for process in processes:
            if process.is_alive() and left:
                process.terminate()
            process.join()


def _end_with(parent: int) -> None:
    """Make this process end when its parent is killed: it would go on with all pieces, and the lock of the run folder,
    which it has inherited, would keep out the run that goes on. Linux alone can; elsewhere it ends after its piece.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _serve(todo: Queue[int | None], results: Queue[Failure | None], work: Callable[[int], None], parent: int) -> None:
    """Run the work of a forked process, in one thread: the parent's pool of threads has not come along."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends its processes
    _end_with(parent)
    piece = None
    try:
        while (piece := todo.get()) is not None and os.getppid() == parent:
            work(piece)
            results.put(None)
    except QdiffError as error:
        results.put((piece, error))
    except BaseException:
        results.put((piece, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # nothing of the parent's is to be closed or written here


def _named(error: QdiffError, name: Callable[[int], str] | None, piece: int | None) -> QdiffError:
    """Return the error with the piece that it happened at."""
    if name is not None and piece is not None:
        error.message = f"{name(piece)}: {error.message}"
        error.args = (error.message,)
    return error
