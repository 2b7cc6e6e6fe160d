"""Recipes whose formats no target can be given yet still go the whole way, in torch, and say so."""

from __future__ import annotations

from qdiff.files import read_json

TINY = ("--weights", "random:pixart-tiny", "--steps", "4", "--samples", "3", "--batch", "3", "--pictures", "2")


def test_a_recipe_without_an_export_runs_in_torch_and_says_what_is_left_out(cli, fails, tmp_path):
    run = tmp_path / "run"
    result = cli("run", *TINY, "--recipe", "nvfp4", "-o", run, "--json").json
    assert set(result["skipped"]) == {"openvino", "onnxruntime", "tensorrt_rtx"}
    assert all("nvfp4 x nvfp4" in reason and "layer " in reason for reason in result["skipped"].values())
    assert [row["name"] for row in result["engines"]] == ["eager"]
    plan = read_json(run / "plan.json", "")
    assert {layer["rounding"] for layer in plan["layers"] if layer["weights"] == "nvfp4"} & {"gptq"}
    assert result["packed_bytes"] < result["float32_bytes"] / 2
    assert not (run / "quantization" / "blocks").exists(), "finished blocks are kept only until the stage is done"
    fails(3, ["nvfp4 x nvfp4", "cannot run"], "export", run, "--target", "tensorrt")
    fails(3, "nvfp4 x nvfp4", "run", *TINY, "--recipe", "nvfp4", "-o", run, "--engine", "openvino")
