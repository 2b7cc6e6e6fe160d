"""Calibrations that cover several guidance scales, and what is said about a scale outside them."""

from __future__ import annotations

import json

import pytest
import torch

from qdiff.calib.record import Recording, record
from qdiff.files import read_json
from qdiff.models import FAMILIES
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.run import Run
from qdiff.stages.calibrated_model import guidance_range, options_of
from qdiff.stages.generate import guidance_warning

TINY = ("--weights", "random:pixart-tiny", "--samples", 4, "--steps", 3, "--batch", 1)


@pytest.fixture(scope="module")
def ranged(cli, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranged") / "run"
    assert cli("calibrate", *TINY, "--guidance", "2,7.5", "-o", path).code == 0
    return path


def _shard(path, number: int) -> list[torch.Tensor]:
    return [step.inputs["hidden_states"] for step in Trajectory(path / "calibration").steps(number)]


def test_batches_take_turns_at_the_scales(cli, ranged, tmp_path):
    """Shard by shard what a calibration with that scale alone records, bit for bit."""
    for scale, mine in (("2", (0, 2)), ("7.5", (1, 3))):
        assert cli("calibrate", *TINY, "--guidance", scale, "-o", tmp_path / scale).code == 0
        for number in range(4):
            alone, there = _shard(tmp_path / scale, number), _shard(ranged, number)
            assert all(torch.equal(a, b) for a, b in zip(alone, there, strict=True)) is (number in mine)


def test_the_scales_are_in_the_manifest_and_later_stages_restore_them(ranged):
    run = Run(ranged)
    options = options_of(run)
    assert (options.guidance, options.other_guidance) == (2.0, (7.5,))
    assert read_json(ranged / "run.json", "")["stages"]["calibrate"]["inputs"]["other_guidance"] == [7.5]
    model = FAMILIES["pixart"].load("random:pixart-tiny")
    assert guidance_range(run, model) == (2.0, 7.5)
    assert (
        guidance_warning(run, model, 2.0)
        is guidance_warning(run, model, 5)
        is guidance_warning(run, model, 7.5)
        is None
    )
    above, below = (str(guidance_warning(run, model, scale)) for scale in (15, 1))
    assert (
        "calibrated with (2 to 7.5)" in above
        and above.endswith("(guidance=[2, 15])")
        and below.endswith("(guidance=[1])")
    )


def test_one_scale_is_recorded_as_ever(cli, tmp_path):
    assert Recording(["a", "b"], guidance=3.0, batch=1).request(1).guidance == 3.0
    path = tmp_path / "run"
    assert cli("calibrate", *TINY, "--guidance", "3", "-o", path).code == 0
    inputs = read_json(path / "run.json", "")["stages"]["calibrate"]["inputs"]
    assert inputs["guidance"] == 3.0 and "other_guidance" not in inputs


def test_a_batch_that_is_missing_is_made_with_its_own_scale(tmp_path):
    """The same bytes, whichever batch is made first: a killed calibration goes on."""
    model = FAMILIES["pixart"].load("random:pixart-tiny")
    recording = Recording(["a", "b", "c"], steps=2, guidance=2.0, batch=1, other_guidance=(7.5,))
    paths = record(model, recording, tmp_path)
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    assert [path.read_bytes() for path in record(model, recording, tmp_path)] == before


def test_what_is_no_range_is_refused(fails, tmp_path):
    for text, said in (
        ("2,x", "no numbers with commas"),
        ("1,7.5", "all above 1"),
        ("2,2", "different ones"),
        ("200", "100"),
    ):
        fails(2, said, "calibrate", *TINY, "--guidance", text, "-o", tmp_path / "run")
    fails(2, "fewer batches", "calibrate", *TINY[:-1], 4, "--guidance", "2,7.5", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_generate_warns_outside_the_calibrated_scales(cli, ranged, tmp_path):
    assert cli("quantize", ranged, "--accept-quality").code == 0
    ask = (
        "generate",
        ranged,
        "--engine",
        "eager",
        "--prompt",
        "a cat",
        "--steps",
        1,
        "-o",
        tmp_path / "a.png",
        "--json",
    )
    assert cli(*ask).json["warnings"] == [] == cli(*ask, "--guidance", 5).json["warnings"]
    told = cli(*ask, "--guidance", 15)
    assert "guidance 15 is outside" in told.json["warnings"][0] and "guidance 15 is outside" in told.err
    float_made = cli(*ask[:2], "--engine", "float", *ask[4:], "--guidance", 15)
    assert json.loads(float_made.out)["warnings"] == []
