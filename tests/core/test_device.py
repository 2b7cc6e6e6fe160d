"""Where models compute: the device that is chosen, and that nothing forgets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdiff import device
from qdiff.artifacts import Run
from qdiff.errors import MissingDependencyError, UsageError
from tests.conftest import run_cli
from tests.elsewhere import watched


@pytest.fixture(autouse=True)
def as_before():
    yield
    device.choose(None)


@pytest.mark.parametrize(("there", "name"), [(0, "cuda"), (0, "cuda:128"), (1, "cuda:1"), (2, "cuda:256")])
def test_a_gpu_that_is_not_there(monkeypatch, there, name):
    """Torch wraps numbers at 256, and takes ``cuda:256`` for the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(MissingDependencyError, match=r"sees (no GPU|one GPU|2 GPUs)"):
        device.choose(name)


@pytest.mark.parametrize("name", ["npu", "mps", "cuda:-1", "cpu:x", "cpu:0", ""])
def test_devices_that_qdiff_does_not_compute_on(name):
    with pytest.raises(UsageError, match="computes on cpu and cuda"):
        device.choose(name)


def test_the_command_line_chooses(tmp_path):
    assert run_cli("calibrate", "--device", "cuda:7", "-o", tmp_path / "run").code == 4
    assert run_cli("calibrate", "--device", "npu", "-o", tmp_path / "run").code == 2
    assert (
        run_cli("calibrate", "--device", "cpu", "--weights", "random:pixart-tiny", "--dry-run", "-o", tmp_path).code
        == 0
    )
    assert device.chosen().type == "cpu"


def test_what_is_timed_beside_engines_of_the_host_is_there(monkeypatch):
    monkeypatch.setattr(device, "found", lambda: "cuda")
    assert device.chosen().type == "cuda"
    with device.on_host():
        assert device.chosen().type == "cpu"
    assert device.chosen().type == "cuda"
    monkeypatch.setattr(device, "_chosen", "cuda:1")  # asked for
    with device.on_host():
        assert device.chosen() == torch.device("cuda:1")


def decide_unsaved(run: Run) -> None:
    """What was seen of attention is of the host before it went through a file, too."""
    from qdiff.attention.sparse import decide
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions
    from qdiff.stages.calibrate import reload_model
    from qdiff.trajectory import Trajectory

    model = reload_model(run)
    trajectory = Trajectory(run.file("calibration"), model.device)
    statistics = AttentionCalibration(model, trajectory, AttentionOptions(orders=("fhw",)), None).run()
    decide(statistics, 0.5, "float", run.entry("calibrate")["timesteps"], 0)


RECIPES = {
    "int8": ["methods.rotate.kinds=[outlier,randomised]", "distil.iterations=2", "attention.density=0.5"],
    "nvfp4-svd": ["sequential.reconstruct.method=flexround", "sequential.reconstruct.iterations=2"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_forgets_the_device(tmp_path: Path, monkeypatch, recipe):
    """The stages that compute with torch, on a device where a tensor of the host beside one of its own is an error."""
    from qdiff.stages import calibrate, compare, quantize
    from qdiff.stages.attention import calibrate_attention

    with watched(monkeypatch) as there:
        run = Run(tmp_path / "run")
        options = calibrate.CalibrateOptions(weights="random:pixart-tiny", samples=2, steps=6, batch=1)
        calibrate.calibrate(run, options)
        if "attention.density=0.5" in RECIPES[recipe]:
            calibrate_attention(run)
            decide_unsaved(run)
        quantize.quantize(run, recipe, RECIPES[recipe])
        made = compare.compare(run, engines=["eager"], pictures=1)
    assert run.entry("calibrate")["device"] == run.entry("quantize")["device"] == str(there)
    assert made["engines"][0]["psnr_db_mean"] > 10
