"""What was used is measured, also when measured blocks stand inside each other; and a full disk is seen before the work."""

from __future__ import annotations

import mmap
import time

import pytest

from qdiff import resources
from qdiff.errors import MemoryExhaustedError

MB = 1_000_000


def taken(megabytes: int) -> mmap.mmap:
    """Memory fresh from the system: a heap that other tests have left would hand out pages that are resident already."""
    block = mmap.mmap(-1, megabytes * MB)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return block


def touch(megabytes: int) -> None:
    """Takes memory for real, and gives it back."""
    taken(megabytes).close()


@pytest.mark.parametrize("kernel_mark", [True, False])
def test_peak_and_seconds(monkeypatch, kernel_mark):
    if not kernel_mark:  # macOS and containers without /proc: a thread polls

        def no(self, text):
            raise OSError("read-only")

        monkeypatch.setattr(resources.Path, "write_text", no)
    with resources.measure_usage() as usage:
        touch(200)
        block = taken(80)
        time.sleep(0.1)
    assert usage.peak_bytes - usage.start_bytes > 75 * MB * (2 if kernel_mark else 1)
    assert 0.1 <= usage.seconds < 30
    block.close()


def test_an_inner_block_does_not_hide_what_came_before_it():
    with resources.measure_usage() as outer:
        touch(300)
        with resources.measure_usage() as inner:
            touch(40)
    assert outer.peak_bytes - outer.start_bytes > 280 * MB
    assert inner.peak_bytes - inner.start_bytes < 200 * MB
    with resources.measure_usage() as outer:
        with resources.measure_usage() as inner:
            touch(300)
        with resources.measure_usage():
            pass
    assert outer.peak_bytes >= inner.peak_bytes > 280 * MB


def test_too_little_disk_is_refused_before_the_work(tmp_path):
    resources.require_disk(tmp_path / "not" / "yet" / "there", 1000, "the shard")
    with pytest.raises(MemoryExhaustedError, match="the trajectory needs 1000000000 GB on disk"):
        resources.require_disk(tmp_path, 10**18, "the trajectory")


def test_small_numbers_have_units_too(tmp_path, monkeypatch):
    """What is needed and what is there differ where one is refused: not "needs 0 MB, has 0 MB free"."""
    from types import SimpleNamespace

    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=123_456))
    with pytest.raises(MemoryExhaustedError, match=r"needs 457 kB on disk, .* has 123 kB free"):
        resources.require_disk(tmp_path, 456_789, "the shard")
