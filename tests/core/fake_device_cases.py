"""The stages that compute with torch, on a device where a tensor of the host beside one of its own is an error
(tests/fake_device.py). test_device.py runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdiff.runs.run import Run
from tests.fake_device import watched


def decide_unsaved(run: Run) -> None:
    """What was seen of attention is of the host before it went through a file, too."""
    from qdiff.allocation.attention_masks import decide_masks
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions
    from qdiff.recording.trajectory import Trajectory
    from qdiff.stages.calibrated_model import reload_model

    model = reload_model(run)
    trajectory = Trajectory(run.file("calibration"), model.device)
    statistics = AttentionCalibration(model, trajectory, AttentionOptions(orders=("fhw",)), None).run()
    decide_masks(statistics, 0.5, "float", run.entry("calibrate")["timesteps"], 0)


RECIPES = {
    "int8": ["methods.rotate.kinds=[outlier,randomised]", "distil.iterations=2", "attention.density=0.5"],
    "nvfp4-svd": ["sequential.reconstruct.method=flexround", "sequential.reconstruct.iterations=2"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_forgets_the_device(tmp_path: Path, monkeypatch, recipe):
    from qdiff.stages import calibrate, compare, quantize
    from qdiff.stages.attention import calibrate_attention

    with watched(monkeypatch) as there:
        run = Run(tmp_path / "run")
        options = calibrate.CalibrateOptions(
            weights="random:pixart-tiny", samples=2, steps=6 if recipe == "int8" else 3, batch=1
        )
        calibrate.calibrate(run, options)
        if recipe == "int8":
            calibrate_attention(run)
            decide_unsaved(run)
        quantize.quantize(run, recipe, RECIPES[recipe])
        made = compare.compare(run, engines=["eager"], pictures=1)
    assert run.entry("calibrate")["device"] == run.entry("quantize")["device"] == str(there)
    assert made["engines"][0]["psnr_db_mean"] > 10
