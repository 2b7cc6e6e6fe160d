"""What a good run prints and leaves, and that its pictures are right."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdiff.engines import integer_products
from qdiff.evaluation.images import read_metadata

pytestmark = pytest.mark.slow

CALIBRATE = ["calibrate", "--weights", "random:pixart-tiny", "--samples", "2", "--steps", "2"]


def test_stdout_is_the_result_and_stderr_the_progress(finished):
    result = finished.result.json
    assert {"run", "id", "report", "images", "engines", "stages", "packed_bytes"} <= result.keys()
    assert [row["name"] for row in result["engines"]] == FASTEST_FIRST
    assert all(row["psnr_db_mean"] > 20 for row in result["engines"])
    assert "random weights" in finished.result.err and "calibrate: 5 prompts, 4 steps, about" in finished.result.err
    for stage in ("calibrate", "quantize", "export:tensorrt", "build:tensorrt_rtx"):
        assert result["stages"][stage]["seconds"] > 0 and result["stages"][stage]["peak_memory_bytes"] > 1e7
    assert Path(result["report"]).is_file()


def test_a_second_run_does_nothing_expensive(cli, finished, monkeypatch):
    from qdiff.models.pixart import PixArt

    def no_pictures(*arguments, **options):
        raise AssertionError("the model was run")

    monkeypatch.setattr(PixArt, "generate", no_pictures)
    skipped = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file() and p.parent != finished.path}
    started = time.perf_counter()
    arguments = ["run", "--weights", "random:pixart-tiny", "--steps", 4, "--batch", 3, "--prompts", finished.prompts,
                 "--engine", "openvino", "--engine", "onnxruntime", "--engine", "tensorrt_rtx",
                 "--compute-capability", "8.9", "--pictures", 2, "-o", finished.path, "--json"]  # fmt: skip
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert time.perf_counter() - started < 30
    assert "calibrate: done already" in result.err and "compare: done already" in result.err
    assert result.json["id"] == finished.result.json["id"]
    assert skipped == {
        p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file() and p.parent != finished.path
    }


@pytest.mark.parametrize("verb", ["inspect", "report", "models", "doctor", "quantize", "export"])
def test_json_and_text(cli, finished, verb):
    run = [] if verb in ("models", "doctor") else [finished.path]
    assert cli(verb, *run, "--json").json
    text = cli(verb, *run)
    assert text.code == 0 and text.out.strip() and not text.out.lstrip().startswith(("{", "["))
    quiet = cli("--quiet", verb, *run)
    assert quiet.code == 0 and not quiet.err and quiet.out


def test_dry_runs_say_and_do_nothing(cli, finished, tmp_path):
    before = (finished.path / "run.json").read_bytes()
    said = cli(*CALIBRATE, "-o", tmp_path / "run", "--dry-run", "--json").json
    assert said["seconds"] >= 0 and said["bytes"] > 0 and not (tmp_path / "run").exists()
    layers = cli("quantize", finished.path, "--dry-run", "--json").json["layers"]
    planned = json.loads((finished.path / "plan.json").read_text())["layers"]
    assert {layer["name"]: layer["weights"] for layer in layers} == {
        layer["name"]: layer["weights"] for layer in planned
    }
    for verb in (["quantize"], ["export"], ["build", "--engine", "openvino"], ["build", "--engine", "tensorrt_rtx"]):
        assert cli(verb[0], finished.path, *verb[1:], "--dry-run").code == 0
    assert (finished.path / "run.json").read_bytes() == before


def test_inspect_tells_of_a_changed_file(cli, spoilt):
    shutil.copy(spoilt / "compare.json", spoilt / "quantization.json")
    shown = cli("inspect", spoilt, "--layers", "--json")
    told = json.loads(shown.out)
    assert shown.code == 5 and "quantization.json is not the file" in shown.err
    assert "quantization.json" in told["stages"]["quantize"]["files"]
    assert told["stages"]["calibrate"]["files"] == "unchanged"
    assert len(told["layers"]) == 26 == told["plan"]["quantized"] + told["plan"]["kept"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def draw(cli, finished, tmp_path):
    """Makes pictures: ``draw("name", "a cat", seed=3, engine="eager")`` gives their paths."""

    def make(name: str, *prompts: str, **options: object) -> list[Path]:
        arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
        for option, value in options.items():
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        result = cli("generate", finished.path, *arguments, "-o", tmp_path / f"{name}.png", "--json")
        return [Path(path) for path in result.json["images"]]

    return make


# Where OpenVINO's INT8 products overflow it computes in float.
FASTEST_FIRST = sorted(["openvino", "onnxruntime"], reverse=integer_products.exact("openvino"))
ENGINES = ("float", "eager", "onnxruntime", "openvino")


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_an_engine(draw, finished, engine):
    first = draw("first", "a red apple", seed=7, engine=engine)[0]
    again = draw("again", "a red apple", seed=7, engine=engine)[0]
    other = draw("other", "a red apple", seed=8, engine=engine)[0]
    assert first.read_bytes() == again.read_bytes(), "the same seed gives the same picture, to the byte"
    assert np.abs(pixels(first) - pixels(other)).max() > 1
    info = read_metadata(first)
    assert info is not None and (info.prompt, info.seed, info.engine, info.steps) == ("a red apple", 7, engine, 4)
    assert info.run_id == finished.result.json["id"] and "random:pixart-tiny" in info.model
    both = draw("both", "a rocket", "a red apple", seed=6, engine=engine)
    assert [path.name for path in both] == ["both-0.png", "both-1.png"]
    assert np.abs(pixels(both[1]) - pixels(first)).max() <= 1, "a picture does not depend on its batch"
    split = draw("split", "a rocket", "a red apple", seed=6, engine=engine, batch=1)
    assert np.abs(pixels(split[1]) - pixels(first)).max() <= 1


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_pictures_are_as_near_to_the_plan_however_integers_are_multiplied(draw, engine, integer_arithmetic):
    wanted = pixels(draw("eager", "a red apple", seed=7, engine="eager")[0])
    got = pixels(draw("engine", "a red apple", seed=7, engine=engine)[0])
    assert 10 * np.log10(255**2 / max(((wanted - got) ** 2).mean(), 1e-9)) > 35, engine


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_what_works_with_the_float_pipeline_works_with_an_engine(draw, engine):
    """Negative prompts, no guidance, other steps, schedulers and sizes: the engine draws what torch draws."""
    plain = draw("plain", "a red apple", seed=3, engine=engine)[0]
    for name, settings in {
        "negative": {"negative_prompt": "blurry, grey", "guidance": 7},
        "unguided": {"guidance": 1.0},
        "steps": {"steps": 7},
        "ddim": {"scheduler": "ddim"},
        "size": {"height": 64, "width": 160},
    }.items():
        got = draw(f"{name}-engine", "a red apple", seed=3, engine=engine, **settings)[0]
        wanted = draw(f"{name}-float", "a red apple", seed=3, engine="float", **settings)[0]
        a, b = pixels(got), pixels(wanted)
        assert a.shape == b.shape and (name != "size" or a.shape == (64, 160, 3))
        psnr = 10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9))
        assert psnr > 25, (name, psnr)
        assert got.read_bytes() != plain.read_bytes(), f"{name} changed nothing"


def test_a_negative_prompt_that_has_no_effect_is_announced(cli, finished, tmp_path):
    given = ("generate", finished.path, "--prompt", "x", "--negative-prompt", "grey", "-o", tmp_path / "x.png")
    assert "no effect" in cli(*given, "--guidance", 1.0).err
    assert "no effect" not in cli(*given, "--guidance", 3.0).err


def test_the_default_engine_is_the_fastest_that_is_there(cli, finished, tmp_path):
    made = cli("generate", finished.path, "--prompt", "x", "-o", tmp_path / "x.png", "--json").json
    assert made["engine"] == FASTEST_FIRST[0] and made["weights"].startswith("random weights")
