"""What a piece of work used: wall seconds and the peak of resident memory; whether the disk has room."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qdiff.errors import MemoryExhaustedError


@dataclass
class Usage:
    """``seconds`` of wall time; ``peak_bytes`` the highest resident set of this process during the block;
    ``start_bytes`` the resident set when it began.
    """

    seconds: float = 0.0
    start_bytes: int = 0
    peak_bytes: int = 0


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def resident_bytes() -> int:
    """Return the resident set size of this process in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


_M_MMAP_THRESHOLD = -3  # mallopt(3)


def release_memory() -> None:
    """Give freed heap pages back to the system, so that the next stage's peak is its own, and keep the heap from
    fragmenting.

    glibc learns to keep blocks of up to 32 MB in its heap. Small tensors that live long (statistics) between large ones that
    do not (activations) then pin holes: collecting statistics of a 2.4 GB model took 7.6 GB. With a fixed threshold of 1 MB
    large blocks are mapped and unmapped one by one, and it takes 3.2 GB.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


_open: list[Usage] = []  # the blocks around this one: a reset of the mark must not lose what they saw so far


@contextlib.contextmanager
def measure_usage() -> Iterator[Usage]:
    """Measure the block. The kernel's own high-water mark is used where it can be reset (Linux), else a thread polls.
    Blocks may stand inside each other.
    """
    usage = Usage(start_bytes=resident_bytes())
    for outer in _open:
        outer.peak_bytes = max(outer.peak_bytes, _status_bytes("VmHWM:") or 0)
    stop = threading.Event()
    poller: threading.Thread | None = None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    except OSError:

        def poll() -> None:
            while not stop.wait(0.02):
                usage.peak_bytes = max(usage.peak_bytes, resident_bytes())

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
    _open.append(usage)
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        _open.remove(usage)
        if poller is not None:
            stop.set()
            poller.join()
        else:
            usage.peak_bytes = max(usage.peak_bytes, _status_bytes("VmHWM:") or 0)
        usage.peak_bytes = max(usage.peak_bytes, usage.start_bytes, resident_bytes())
        for outer in _open:
            outer.peak_bytes = max(outer.peak_bytes, usage.peak_bytes)


def size(count: float | None) -> str:
    """Return bytes for people, in powers of ten."""
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count:.0f} B"


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Fail before the work starts when ``folder`` has less room than ``needed_bytes``.

    Raises:
        MemoryExhaustedError: with what is needed and what is there.
    """
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise MemoryExhaustedError(
            f"{what} needs {size(needed_bytes)} on disk, {folder} has {size(free)} free",
            "free some space on that disk",
        )
