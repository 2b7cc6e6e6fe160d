"""A calibration of another size than the model's own: everything that follows is of that size."""

from __future__ import annotations

import pytest
from PIL import Image

from qdiff.engines import choose_engine
from qdiff.runs.run import Run
from qdiff.stages.build import make_options

pytestmark = pytest.mark.slow


def test_everything_after_a_calibration_has_its_size(cli, tmp_path):
    path, picture = tmp_path / "run", tmp_path / "x.png"
    settings = ("--weights", "random:pixart-tiny", "--samples", 2, "--steps", 2, "--height", 96, "--width", 64)
    for command in (
        ("calibrate", *settings, "-o", path),
        ("quantize", path, "--recipe", "int8"),
        ("export", path, "--target", "onnxruntime"),
        ("build", path, "--engine", "onnxruntime"),
        ("compare", path, "--engine", "onnxruntime", "--pictures", 1),
        ("generate", path, "--engine", "onnxruntime", "--prompt", "a rocket", "-o", picture),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    assert Image.open(picture).size == (64, 96)
    assert all(Image.open(file).size == (64, 96) for file in (path / "images").rglob("*.png"))
    ranges = make_options(Run.existing(path), choose_engine("onnxruntime"), [], None, {}).profiles[0].ranges
    assert [shape[2:] for shape in ranges["hidden_states"]] == [(12, 8)] * 3
    again = cli("calibrate", *settings[:-1], 32, "-o", path)
    assert again.code == 3 and "width was 64 and is now 32" in again.err
