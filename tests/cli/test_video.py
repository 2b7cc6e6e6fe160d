"""A video model through the stages: clips as MP4, motion measured, and a graph that computes the same."""

from __future__ import annotations

import shutil

import pytest

from qdiff.evaluation.video import read_metadata
from qdiff.files import read_json
from qdiff.recording.trajectory import Trajectory

pytestmark = pytest.mark.slow


def test_a_run_has_clips_and_says_how_they_move(filmed):
    for engine in ("float", "eager"):
        for index in range(2):
            path = filmed / "images" / engine / f"{index:03d}.mp4"
            assert path.with_suffix(".png").is_file()
            info = read_metadata(path)
            assert info is not None and info.engine == engine and "wan (random:wan-tiny)" in info.model
    row = read_json(filmed / "compare.json", "the comparison")["engines"][1]
    assert set(row["motion"]) == {"magnitude_ratio", "change_psnr_db", "steadiness", "reference_steadiness"}
    assert 0.5 < row["motion"]["magnitude_ratio"] < 2 and 10 < row["psnr_db_mean"] < 100
    page = (filmed / "report.html").read_text()
    assert "Motion" in page and "changes from frame to frame" in page and "data:image/webp" in page
    assert (
        read_json(filmed / "report.json", "the report")["quality"]["motion_ratio"] == row["motion"]["magnitude_ratio"]
    )


def test_a_recording_joins_the_two_branches_of_guidance(filmed):
    step = next(iter(Trajectory(filmed / "calibration")))
    assert len(step.inputs["timestep"]) == 2, "one prompt, guided and unguided"
    unguided, guided = step.inputs["encoder_hidden_states"]
    assert not unguided.equal(guided)
    assert unguided.abs().sum(dim=1).gt(0).sum() < guided.abs().sum(dim=1).gt(0).sum(), "an empty prompt has one token"


def test_a_clip_is_made_and_a_picture_is_refused(filmed, cli, fails, finished, tmp_path):
    clip = tmp_path / "out.mp4"
    request = ("generate", filmed, "--prompt", "a rocket moves up", "--engine", "float", "--seed", 3)
    result = cli(*request, "--frames", 5, "-o", clip, "--json").json
    assert result["images"] == [str(clip)] and clip.is_file() and not clip.with_suffix(".png").exists()
    loud = tmp_path / "LOUD.MP4"
    assert cli(*request, "-o", loud, "--json").json["images"] == [str(loud)] and loud.is_file()
    fails(2, ["6 frames", "use 5"], *request, "--frames", 6, "-o", clip)
    fails(2, "--frames 0", *request, "--frames", 0, "-o", clip)
    fails(2, ["does not end in .mp4", "clips are written as MP4"], *request, "-o", tmp_path / "out.png")
    fails(
        2, ["--frames 5", "makes pictures"],
        "generate", finished.path, "--prompt", "a", "--frames", 5, "-o", tmp_path / "out.png",
    )  # fmt: skip


def test_the_graph_computes_what_torch_computes(filmed, cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(filmed, run)
    result = cli("quantize", run, "--recipe", "int8", "--force", "--json")
    assert result.code == 0, result.err
    exported = cli("export", run, "--target", "onnxruntime", "--json").json
    parity = (exported[0] if isinstance(exported, list) else exported)["parity"]
    assert parity["worst_cosine"] > 0.9999
    built = cli("build", run, "--engine", "onnxruntime", "--json")
    assert built.code == 0, built.err
    compared = cli("compare", run, "--engine", "onnxruntime", "--pictures", 1, "--json").json
    assert compared["engines"][0]["psnr_db_mean"] > 20


@pytest.mark.parametrize("positions", ["", "-table"], ids=["rotary", "table"])
def test_a_model_whose_text_and_video_are_one_sequence_goes_the_whole_way(cli, fails, tmp_path, positions):
    """CogVideoX: positions by rotation or from a table of another size, modulation by the timestep that leaves the loop."""
    path = tmp_path / "run"
    settings = ("--weights", f"random:cogvideox-tiny{positions}", "--samples", 1, "--steps", 2)
    for command in (
        ("calibrate", "--model", "cogvideox", *settings, "-o", path),
        ("quantize", path, "--recipe", "int8"),
        ("export", path, "--target", "onnxruntime"),
        ("build", path, "--engine", "onnxruntime"),
        ("compare", path, "--engine", "onnxruntime", "--pictures", 1),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    row = read_json(path / "compare.json", "the comparison")["engines"][1]
    assert row["psnr_db_mean"] > 30
    assert (path / "onnx" / "onnxruntime" / "timestep.onnx").is_file(), "norm1 and norm2 read the timestep alone"
    fails(2, "for the size that was calibrated", "build", path, "--engine", "onnxruntime", "--profile", "128")
    fails(3, "the blocks of a chain", "quantize", path, "--recipe", "routed", "--force")
    fails(3, "no bundled weights for cogvideox", "calibrate", "--model", "cogvideox", "-o", tmp_path / "other")
