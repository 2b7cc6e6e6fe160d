"""A nearly full disk is noticed before the computing: everything that a stage writes is in its estimate."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from qdiff import resources

Free = namedtuple("Free", "total used free")
TINY = ("--weights", "random:pixart-tiny", "--samples", 5, "--steps", 4, "--batch", 3)


def size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def test_the_estimate_holds_what_a_calibration_writes(cli, finished, tmp_path):
    said = cli("calibrate", *TINY, "-o", tmp_path / "run", "--dry-run", "--json").json
    statistics = (finished.path / "calibration/statistics.safetensors").stat().st_size
    shards = sum(path.stat().st_size for path in (finished.path / "calibration").glob("trajectory-*"))
    assert shards < said["trajectory_bytes"] < 3 * shards
    assert 2 * statistics < said["bytes"] - said["trajectory_bytes"] < 6 * statistics, "and its unfinished part"


@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "compare"])
def test_a_full_disk_is_refused_with_what_is_needed(fails, spoilt, tmp_path, monkeypatch, command):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Free(10**9, 10**9 - 40_000, 40_000))
    arguments = {
        "calibrate": (*TINY, "-o", tmp_path / "new"),
        "export": (spoilt, "--target", "tensorrt", "--force"),
        "build": (spoilt, "--engine", "openvino", "--force"),
    }.get(command, (spoilt, "--force"))
    told = fails(6, "has 40.0 kB free", command, *arguments)
    assert " MB on disk" in told and "0 MB" not in told.replace("10 MB", "")


def test_a_run_counts_all_its_stages_before_the_first(fails, tmp_path, finished, monkeypatch):
    free = size(finished.path / "calibration") * 4 + 2_500_000  # enough for the calibration alone
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Free(10**9, 0, free))
    told = fails(6, "the whole run", "run", *TINY, "--engine", "openvino", "-o", tmp_path / "new")
    assert not list((tmp_path / "new").rglob("trajectory-*")), told
