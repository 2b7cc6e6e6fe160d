"""Inputs that last are handed to an engine once: block lists of sparse attention are not copied at every step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_what_lasts_is_copied_once():
    """In a process of its own, as the device of tests.fake_device wants it."""
    cases = Path(__file__).with_name("lasting_cases.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cases.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
