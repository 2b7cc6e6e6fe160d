"""Recipes below 8 bits go the whole way: exported, checked, built, run; and what no target takes says so and runs in torch."""

from __future__ import annotations

from qdiff.files import read_json

TINY = ("--weights", "random:pixart-tiny", "--steps", "4", "--samples", "3", "--batch", "3", "--pictures", "2")


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
