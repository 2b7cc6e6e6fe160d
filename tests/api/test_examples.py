"""The examples run as they stand, are short, and the notebook has pictures in it."""

from __future__ import annotations

import json
import os
import shutil
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


# Those that calibrate the bundled PixArt with the same four prompts go on from one calibration, as they would in a folder where
# it is done already. The other scripts begin with nothing.
CALIBRATED = {"image": "runs/image", "budget": "runs/budget", "tour": "runs/tour"}
PROMPTS = ["a rocket on a blue background", "a red apple", "cheese", "two cats on a green background"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """Return a run of the bundled PixArt with the calibration of those examples: any other is refused by their own calls."""
    import qdiff

    path = tmp_path_factory.mktemp("calibrated") / "run"
    qdiff.calibrate("pixart", prompts=PROMPTS, output=path, progress=False)
    return path


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """Return the folder that an example runs in."""
    name = request.node.callspec.id if hasattr(request.node, "callspec") else NOTEBOOK.stem
    if name in CALIBRATED:
        shutil.copytree(request.getfixturevalue("calibrated"), tmp_path / CALIBRATED[name])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(path, folder):
    if path.stem == "serving":
        pytest.importorskip("gradio")
    assert python(path, folder).strip(), "it prints what it made"


def test_examples_are_short_and_listed():
    assert len(SCRIPTS) >= 6
    listed = (EXAMPLES / "README.md").read_text()
    for path in [*SCRIPTS, NOTEBOOK]:
        assert f"({path.name})" in listed, path.name
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures(folder):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    script = folder / "tour.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    assert "PSNR" in python(script, folder)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "execute it and save it with its outputs"
