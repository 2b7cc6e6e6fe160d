"""The workers of a test run: what one of them makes for all, and that a run ends where one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "test_dies.py": "import os\ndef test_before(): pass\ndef test_dies(): os.kill(os.getpid(), 9)\ndef test_after(): pass\n",
    "test_lives.py": "import time\ndef test_one(): time.sleep(0.5)\ndef test_two(): time.sleep(0.5)\n",
    **{f"test_rest_{number}.py": "def test_it(): pass\n" for number in range(3)},
}


@pytest.mark.slow
def test_a_run_whose_worker_dies_ends_with_a_failure(tmp_path):
    """With the options of ``make test``. By default pytest-xdist starts another worker, and the run never ends."""
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pytest" in line)
    options = line.partition("-m pytest")[2].replace("$(ARGS)", "").split()
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_dies.py::test_dies'" in done.stdout, done.stdout


def test_a_shared_folder_is_made_once_and_copied(made_once):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "value").write_text(str(len(made)))

    one, other = made_once("once", make), made_once("once", make)
    assert len(made) == 1 and one != other and folder_of(one) == folder_of(other) == {"value": "1"}
    (one / "value").write_text("spoilt")
    assert folder_of(made_once("once", make)) == {"value": "1"}


def test_a_shared_folder_that_could_not_be_made_is_made_anew(made_once):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made_once("failing", fail)
    assert folder_of(made_once("failing", lambda folder: (folder / "whole").write_text("1"))) == {"whole": "1"}


def folder_of(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}
