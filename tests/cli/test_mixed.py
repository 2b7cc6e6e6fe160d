"""Recipe mixed on the command line: what it writes, what it refuses and when, and that a budget is not measured for twice."""

from __future__ import annotations

import pytest

from qdiff.files import read_json
from qdiff.plan.plan import Plan

pytestmark = pytest.mark.slow

FOUR = (
    "{version: 1, name: four, scheme: {weights: int4_g32, activations: int8}, methods: {}, "
    "ignore: {pixart: [proj_out]}, sequential: {tokens: 64}}"
)


@pytest.fixture
def wish(tmp_path):
    """Quick formats for recipe mixed, as arguments."""
    path = tmp_path / "four.yaml"
    path.write_text(FOUR)
    settings = (f"mixed.recipes=[{path}, int8]", "mixed.calls=3", "mixed.pictures=1", "mixed.best=2")
    return ("--recipe", "mixed", *(part for setting in settings for part in ("--set", setting)))


def test_a_finished_quantization_is_not_touched_without_force(spoilt, fails, wish):
    before = (spoilt / "run.json").read_bytes()
    fails(3, ["holds another 'quantize'", "--force"], "quantize", spoilt, *wish)
    assert (spoilt / "run.json").read_bytes() == before


def test_what_cannot_be_had_is_refused_before_anything_is_measured(spoilt, fails, wish, monkeypatch):
    import qdiff.allocation.sensitivity

    monkeypatch.setattr(qdiff.allocation.sensitivity, "measure_sensitivity", None)
    fails(3, "below", "quantize", spoilt, *wish, "--budget", "bits=3", "--force")
    fails(3, "unknown device 'rtx-9090'", "quantize", spoilt, *wish, "--set", "mixed.device=rtx-9090", "--force")
    pattern = "mixed.minimum={pixart: {'blocks.*': int8}}"
    fails(3, "matches no layer", "quantize", spoilt, *wish, "--set", pattern, "--force")
    fails(2, "--budget", "quantize", spoilt, *wish, "--budget", "bits", "--force")
    fails(2, "has no budget", "quantize", spoilt, "--recipe", "int8", "--budget", "bits=5", "--force")


def test_formats_by_budget_and_another_budget_without_measuring_again(spoilt, cli, wish, monkeypatch):
    assert cli("quantize", spoilt, *wish, "--budget", "bits=7", "--force").code == 0
    plan = Plan.load(spoilt / "plan.json")
    formats = {layer.weights for layer in plan.quantized}
    assert formats == {"int4_g32", "int8"} and plan.recipe == "mixed"
    groups = {}
    for layer in plan.quantized:
        assert groups.setdefault(layer.group, layer.weights) == layer.weights, "layers of a group agree"
    made = read_json(spoilt / "allocation.json", "the allocation")
    taken = made["solutions"][made["chosen"]]
    assert taken["cost"] <= 7 and taken["psnr_db"] == max(solution["psnr_db"] for solution in made["solutions"])
    assert [row["weighting"] for row in made["uniform"]][1] == "int8" and len(made["frontier"]) == 7
    table = read_json(spoilt / "sensitivity.json", "the sensitivities")
    assert len(table["errors"]) == len(made["groups"]) and len(table["timesteps"]) == 3

    import qdiff.allocation.sensitivity

    monkeypatch.setattr(qdiff.allocation.sensitivity, "measure_sensitivity", None)
    assert cli("quantize", spoilt, *wish, "--budget", "bits=6.6", "--force").code == 0
    assert read_json(spoilt / "sensitivity.json", "the sensitivities") == table
    fewer = read_json(spoilt / "allocation.json", "the allocation")
    assert fewer["solutions"][fewer["chosen"]]["cost"] <= 6.6
    assert cli("report", spoilt).code == 0
    page = (spoilt / "report.html").read_text()
    assert "Formats by budget" in page and "Cheap proxies" in page
    report = read_json(spoilt / "report.json", "the report")["allocation"]
    assert report["budget"] == 6.6 and {plan["kind"] for plan in report["plans"]} >= {"chosen", "uniform", "solver"}


def test_a_killed_run_goes_on_with_the_plan_that_it_had_chosen(spoilt, cli, wish, monkeypatch):
    import qdiff.allocation.mixed
    import qdiff.quantization.quantize

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    arguments = ("quantize", spoilt, *wish, "--budget", "bits=7")
    with monkeypatch.context() as patch:
        patch.setattr(qdiff.quantization.quantize, "quantize_from_draft", killed)
        assert cli(*arguments, "--force").code != 0
    with monkeypatch.context() as patch:
        patch.setattr(qdiff.allocation.mixed, "decide_formats", None)
        assert cli(*arguments).code == 0, "without force: it goes on"
    made = read_json(spoilt / "allocation.json", "the allocation")
    assert made["budget"] == 7 and made["solutions"][made["chosen"]]["psnr_db"] is not None


def test_formats_by_budget_are_trained_as_one(spoilt, cli, fails, wish):
    training = ("--set", "distil.iterations=8", "--set", "distil.rate=0.02")
    assert cli("quantize", spoilt, *wish, "--budget", "bits=6.6", "--force", *training).code == 0
    plan = Plan.load(spoilt / "plan.json")
    assert len({layer.weights for layer in plan.quantized}) > 1
    assert all("distillation" in layer.why for layer in plan.quantized)
    assert cli("generate", spoilt, "--prompt", "x", "--engine", "eager", "-o", spoilt / "x.png").code == 0


def test_a_refusal_leaves_the_finished_quantization_whole(spoilt, fails, wish, cli):
    before = {name: (spoilt / name).read_bytes() for name in ("plan.json", "model.safetensors", "run.json")}
    for _ in range(2):  # the second time there are parts of the first
        fails(3, "is below", "quantize", spoilt, *wish, "--budget", "bytes=1", "--force")
        stages = read_json(spoilt / "run.json", "the manifest")["stages"]
        assert stages["quantize"]["status"] == "done" and "export:onnxruntime" in stages
    for name in ("plan.json", "model.safetensors"):
        assert (spoilt / name).read_bytes() == before[name]
    assert cli("generate", spoilt, "--prompt", "x", "--engine", "eager", "-o", spoilt / "x.png").code == 0


def test_a_device_is_only_asked_where_the_budget_is_a_time(spoilt, cli, fails, wish):
    given = ("quantize", spoilt, *wish, "--set", "mixed.device=openvino", "--set", "mixed.pictures=0", "--force")
    done = cli(*given, "--budget", "bits=7")
    assert done.code == 0 and "of 7 bits a weight" in done.out
    nowhere = [part.replace("openvino", "tensorrt_rtx") if isinstance(part, str) else part for part in given]
    fails(4, ["layers cannot be timed on 'tensorrt_rtx' here"], *nowhere, "--budget", "latency=1")
