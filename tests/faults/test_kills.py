"""A few kills of :mod:`bench.faults`, as a person would start them: the same command, run again, ends with the bytes of an
undisturbed run, and nothing is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_stages_end_with_the_bytes_of_an_undisturbed_run(tmp_path):
    found = tmp_path / "trials.json"
    words = ["kills", "--stage", "calibrate", "quantize", "--count", "3", "--seed", "1", "--work", tmp_path / "work"]
    command = [sys.executable, "-m", "bench.faults", *map(str, words), "--json", str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    stages = json.loads(found.read_text())
    assert list(stages) == ["calibrate", "quantize"]
    for stage in stages.values():
        assert sum(trial["hits"] > 0 for trial in stage["trials"]) == 3
        assert [trial["faults"] for trial in stage["trials"] if trial["faults"]] == []
    assert "| calibrate |" in ended.stdout and "kills: quantize: 3/3" in ended.stderr
