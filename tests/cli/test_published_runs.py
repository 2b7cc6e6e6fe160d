"""The command line on folders as people publish them: what works, and the exit code of what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SD, PIXART = ("--model", "stable-diffusion"), ("--model", "pixart")
SHORT = ("--samples", 1, "--steps", 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("safety_checker", (*SD, "--samples", 1, "--steps", 3)),
        ("pndm", (*SD, "--samples", 1, "--steps", 3)),
        ("karras", (*SD, "--samples", 1, "--steps", 50, "--keep", 5)),
        ("alpha_1024", (*PIXART, *SHORT, "--height", 128, "--width", 128)),
        ("fp16_variant", (*SD, *SHORT)),
        ("lcm_distilled", (*SD, *SHORT)),
    ],
)
def test_what_is_published_is_calibrated(cli, published, tmp_path, name, options):
    run = tmp_path / "run"
    calibrated = cli("calibrate", *options, "--weights", published(name), "-o", run)
    assert calibrated.code == 0, calibrated.err
    assert ("safety checker is left out" in calibrated.err) == (name == "safety_checker")
    entry = json.loads((run / "run.json").read_text())["stages"]["calibrate"]
    assert ("variants" in entry["inputs"]) == (name == "fp16_variant")
    assert len(set(entry["timesteps"])) == len(entry["timesteps"])
    if name in ("alpha_1024", "lcm_distilled"):  # inputs of their own go through all stages
        assert cli("quantize", run, "--recipe", "int8").code == 0
        compared = cli("compare", run, "--engine", "eager", "--pictures", 1, "--json").json["engines"][0]
        assert 30 < compared["psnr_db_mean"] < 100, "quantized, and near"


def test_a_unet_without_a_middle_is_quantized_block_by_block(cli, published, tmp_path):
    run = tmp_path / "run"
    assert cli("calibrate", *SD, *SHORT, "--weights", published("no_mid_block"), "-o", run).code == 0
    result = cli("quantize", run, "--recipe", "int8-gptq", "--set", "sequential.tokens=256")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("name", "code", "parts", "options"),
    [
        ("vae_lacks_a_weight", 3, ["vae", "lacks the weight decoder.conv_out.weight"], (*PIXART, *SHORT)),
        ("vae_gives_nan", 3, ["decoder.conv_out.bias in the vae", "NaN"], (*PIXART, *SHORT)),
        ("nine_channels", 3, ["reads 9 channels"], (*SD, *SHORT)),
        ("class_embedding", 3, ["reads class labels"], (*SD, *SHORT)),
        ("bin_files", 3, ["has no safetensors", "safe_serialization=True"], (*SD, *SHORT)),
        ("plain", 3, ["use --model pixart"], (*SD, *SHORT)),
        ("lcm", 2, ["does not take 60 steps", "--steps 50"], (*SD, "--samples", 1, "--steps", 60)),
    ],
)
def test_what_cannot_work_is_refused_by_name(fails, published, tmp_path, name, code, parts, options):
    fails(code, parts, "calibrate", *options, "--weights", published(name), "-o", tmp_path / "run")


def test_a_model_that_makes_nan_passes_no_gate(cli, fails, published, tmp_path, monkeypatch):
    """The decoder breaks after loading, where the weights are whole: both pictures would be black and equal."""
    from qdiff.models import folders

    monkeypatch.setattr(folders, "require_finite", lambda tensor, what: None)
    run = tmp_path / "run"
    broken = ("--weights", published("vae_gives_nan"))
    message = ["the float model itself makes NaN or infinity", "the decoded picture"]
    fails(
        3, message, "run", *PIXART, *SHORT, *broken, "--engine", "eager", "--pictures", 1, "--min-psnr", 60, "-o", run
    )
    assert not list(Path(run).rglob("*.png"))


def test_a_repeating_trajectory_goes_through_the_later_stages(cli, tmp_path):
    """Per-timestep scales, block by block, a correction, distillation and the report, all by the timestep's value."""
    run = tmp_path / "run"
    settings = (
        *PIXART,
        "--weights",
        "random:pixart-tiny",
        "--scheduler",
        "pndm",
        "--samples",
        2,
        "--steps",
        5,
        "--batch",
        1,
    )
    assert cli("calibrate", *settings, "-o", run).code == 0
    distilled = ("--set", "distil={iterations: 2}", "--set", "sequential.tokens=64")
    scales = ("--set", "methods={timestep_scales: {}}")
    result = cli("quantize", run, "--recipe", "int8-gptq", *distilled, *scales)
    assert result.code == 0, result.err
    plan = json.loads((run / "plan.json").read_text())
    assert (
        len(set(plan["timesteps"]))
        == len(plan["timesteps"])
        < len(json.loads((run / "quantization.json").read_text())["timesteps"])
    )
    corrected = cli("correct", run, "--method", "ptqd", "--engine", "eager", "--pictures", 1)
    assert corrected.code == 0, corrected.err
    (row,) = cli("compare", run, "--engine", "eager", "--pictures", 1, "--json").json["engines"]
    assert row["psnr_db_mean"] > 30
    assert cli("report", run).code == 0
