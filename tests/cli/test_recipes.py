"""Recipes below 8 bits go the whole way: exported, checked, built, run; and what no target takes says so and runs in torch."""

from __future__ import annotations

import os

import pytest

from qdiff.files import read_json

TINY = ("--weights", "random:pixart-tiny", "--steps", "4", "--samples", "3", "--batch", "3", "--pictures", "2")


@pytest.mark.slow
def test_nvfp4_goes_the_whole_way(cli, tmp_path):
    run = tmp_path / "run"
    result = cli("run", *TINY, "--recipe", "nvfp4", "-o", run, "--json").json
    assert set(result["skipped"]) <= {"tensorrt_rtx"}, result["skipped"]
    rows = {row["name"]: row for row in result["engines"]}
    assert {"openvino", "onnxruntime"} <= rows.keys()
    assert abs(rows["openvino"]["psnr_db_mean"] - rows["onnxruntime"]["psnr_db_mean"]) < 3
    plan = read_json(run / "plan.json", "")
    assert {layer["rounding"] for layer in plan["layers"] if layer["weights"] == "nvfp4"} & {"gptq"}
    assert result["packed_bytes"] < result["float32_bytes"] / 2
    assert not (run / "quantization" / "blocks").exists(), "finished blocks are kept only until the stage is done"
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "nvfp4 x nvfp4" in html and 'class="differs"' not in html


@pytest.mark.slow
def test_a_recipe_that_a_target_cannot_run_says_what_is_left_out(cli, fails, tmp_path):
    run = tmp_path / "run"
    study = ("--recipe", "nvfp4", "--set", "scheme.weights=fp4_e3m0_g128", "--set", "scheme.activations=float16")
    methods = ("--set", "methods={}")
    ignored = (
        "--set",
        'ignore.pixart=["adaln_single.*", "caption_projection.*", "proj_out", "*.attn?.*", "*.net.0.*"]',
    )
    settings = (*study, *ignored, *methods)
    result = cli("run", *TINY, *settings, "-o", run, "--json").json
    assert set(result["skipped"]) == {"openvino", "onnxruntime", "tensorrt_rtx"}
    assert all("fp4_e3m0_g128 x float16" in reason and "layer " in reason for reason in result["skipped"].values())
    assert [row["name"] for row in result["engines"]] == ["eager"]
    fails(3, ["fp4_e3m0_g128 x float16", "cannot run"], "export", run, "--target", "tensorrt")
    fails(3, "fp4_e3m0_g128 x float16", "run", *TINY, *settings, "-o", run, "--engine", "openvino")


BOMB = """version: 1
name: bomb
scheme: {weights: int8, activations: int8}
methods: {smooth: {strengths: [&a [0.5, 0.5], *a, *a]}}
"""


def test_recipes_that_are_no_recipes(spoilt, fails, tmp_path):
    files = {"bomb": BOMB, "deep": "[" * 5000, "digits": "version: " + "9" * 5000}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    fails(3, "aliases (*name) are not taken", "quantize", spoilt, "--recipe", tmp_path / "bomb.yaml", "--force")
    for name in ("deep", "digits"):
        fails(3, "is not valid YAML", "quantize", spoilt, "--recipe", tmp_path / f"{name}.yaml", "--force")
    os.mkfifo(tmp_path / "pipe.yaml")
    fails(3, "no regular file", "quantize", spoilt, "--recipe", tmp_path / "pipe.yaml", "--force")
    wrong = 'ignore={pixarrt: ["proj_out"]}'
    fails(3, ["family in ignore", "did you mean pixart"], "quantize", spoilt, "--set", wrong, "--force")


def test_models_and_recordings_with_nothing_in_them(cli, fails, tmp_path):
    from safetensors.torch import load_file, save_file

    from qdiff.models import FAMILIES

    folder, run = tmp_path / "weights", tmp_path / "run"
    FAMILIES["pixart"].load("random:pixart-tiny").pipeline.save_pretrained(folder)
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert cli("calibrate", "--weights", folder, "--samples", 1, "--steps", 1, "--batch", 1, "-o", run).code == 0
    fails(3, "nothing but zeros", "quantize", run)
    one = tmp_path / "one"
    weights = ("--weights", "random:pixart-tiny", "--samples", 1, "--steps", 1, "--batch", 1)
    assert cli("calibrate", *weights, "-o", one).code == 0
    learned = "sequential={tokens: 64, reconstruct: {method: adaround, iterations: 2}}"
    fails(3, "there is one call", "quantize", one, "--recipe", "nvfp4", "--set", learned)


def test_a_damaged_engine_is_not_called_built(spoilt, cli, fails):
    from qdiff.runs.run import Run

    assert cli("build", spoilt, "--engine", "openvino", "--force").code == 0
    folder = spoilt / Run(spoilt).entry("build:openvino")["folder"]
    (folder / "model.bin").unlink()
    fails(5, "model.bin is missing", "build", spoilt, "--engine", "openvino")
    assert cli("build", spoilt, "--engine", "openvino", "--force").code == 0
    assert "step, cpu" in cli("inspect", spoilt).out
