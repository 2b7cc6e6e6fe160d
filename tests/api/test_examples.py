"""The examples run as they stand, are short, and the notebook has pictures in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "tour.ipynb"


def python(path: Path, folder: Path) -> str:
    """Return what a script prints that is run in ``folder``, with one thread beside the other tests."""
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    if path.stem == "serving":
        pytest.importorskip("gradio")
    assert python(path, tmp_path).strip(), "it prints what it made"


def test_examples_are_short_and_listed():
    assert len(SCRIPTS) >= 6
    listed = (EXAMPLES / "README.md").read_text()
    for path in [*SCRIPTS, NOTEBOOK]:
        assert f"({path.name})" in listed, path.name
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures(tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    assert "PSNR" in python(script, tmp_path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "execute it and save it with its outputs"
