"""Plans that a hand has edited: what is carried out, what is refused, and that an edit of nothing changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdiff.errors import InputError, IntegrityError
from qdiff.plan.plan import LayerPlan, Plan
from qdiff.quantization import checkpoint, edited_plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.quantization.quantize import quantize_as_planned
from qdiff.recording.activation_statistics import Statistics

BLOCK = "transformer_blocks.1"
QKV = [f"{BLOCK}.attn1.to_{part}" for part in "qkv"]
Json = dict[str, Any]


def layer(plan: Json, name: str) -> Json:
    return next(entry for entry in plan["layers"] if entry["name"] == name)


def change(plan: Json, names: str | list[str], **values: Any) -> None:
    for name in [names] if isinstance(names, str) else names:
        layer(plan, name).update(values)


@pytest.fixture
def edit(finished, tmp_path) -> Callable[..., Path]:
    """Writes a copy of the finished run's plan after a function has changed it."""

    def write(how: Callable[[Json], None]) -> Path:
        value = json.loads((finished.path / "plan.json").read_text())
        how(value)
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture(scope="module")
def statistics(finished) -> Statistics:
    return Statistics.load(finished.path / "calibration" / "statistics.safetensors")


@pytest.fixture(scope="module")
def before(finished) -> Plan:
    return Plan.load(finished.path / "plan.json")


def planned(run: Path) -> dict[str, Any]:
    return {entry.name: entry for entry in Plan.load(run / "plan.json").layers}


def test_an_edit_of_nothing_gives_the_same_bytes(cli, spoilt):
    """The run's own plan.json is read before it is overwritten; and the same decisions are the same stage afterwards."""
    files = ["plan.json", "model.safetensors", "quantization.json"]
    made = [(spoilt / name).read_bytes() for name in files]
    command = ["quantize", spoilt, "--plan", spoilt / "plan.json"]
    assert cli(*command, "--force").code == 0
    assert [(spoilt / name).read_bytes() for name in files] == made
    again = cli(*command)
    assert again.code == 0 and "quantize: done already" in again.err


@pytest.mark.slow
def test_an_edit_in_place_is_told_and_carried_out(cli, spoilt):
    """Every kind of edit at once: the plan says what was changed, the checkpoint does it, and the graph is what was asked."""
    old, path = planned(spoilt), spoilt / "plan.json"
    value = json.loads(path.read_text())
    change(value, QKV, smoothing=0.7, clip=0.9, timestep_scales=True)
    change(value, f"{BLOCK}.attn2.to_q", output=None)
    change(value, f"{BLOCK}.attn1.to_out.0", smoothing=None)
    change(value, f"{BLOCK}.ff.net.2", weights="float16", activations="float16", why="it looked wrong")
    change(value, "transformer_blocks.0.ff.net.0.proj", weights="int8", activations="int8")
    path.write_text(json.dumps(value))

    shown = cli("inspect", spoilt, "--json")
    told = json.loads(shown.out)["stages"]["quantize"]
    assert shown.code == 5 and "plan.json is not the file" in shown.err
    assert "plan.json" in told["files"] and f"qdiff quantize {spoilt} --plan {path} --force" in told["fix"]
    assert told["fix"] in cli("inspect", spoilt).out
    result = cli("quantize", spoilt, "--plan", path, "--force")
    assert result.code == 0 and f"{BLOCK}.ff.net.2 is kept in float16, without smoothing" in result.err
    assert "7 set by hand" in result.out
    assert cli("inspect", spoilt, "--json").json["stages"]["quantize"]["files"] == "unchanged"

    new = planned(spoilt)
    whys = {name: entry.why for name, entry in new.items() if entry.why != old[name].why}
    by_hand = "smoothing 0.7 (was {}), clip 0.9 (was 1.0), timestep_scales true (was false)"
    wanted = {name: by_hand.format(old[name].smoothing) for name in QKV}
    wanted[f"{BLOCK}.attn2.to_q"] = "output null (was int8)"
    wanted[f"{BLOCK}.attn1.to_out.0"] = f"smoothing null (was {old[f'{BLOCK}.attn1.to_out.0'].smoothing})"
    was = "weights {0} (was {1}), activations {0} (was {1})"
    wanted[f"{BLOCK}.ff.net.2"] = was.format("float16", "int8") + ": it looked wrong"
    wanted["transformer_blocks.0.ff.net.0.proj"] = was.format("int8", "float16")
    assert whys == {name: f"set by hand: {why}" for name, why in wanted.items()}
    assert all(new[name].sqnr_db != old[name].sqnr_db for name in wanted if "attn2" not in name)
    assert {name for name in new if new[name].sqnr_db != old[name].sqnr_db} <= set(wanted)
    kept, proj = new[f"{BLOCK}.ff.net.2"], new["transformer_blocks.0.ff.net.0.proj"]
    assert kept.smoothing is kept.group is kept.sqnr_db is None and not kept.quantized
    assert proj.quantized and proj.group == proj.name and proj.sqnr_db > 20

    tensors = load_file(spoilt / "model.safetensors")
    assert f"{BLOCK}.ff.net.2.codes" not in tensors and tensors[f"{BLOCK}.ff.net.2.weight"].dtype == torch.float16
    assert {f"{proj.name}.codes", f"{QKV[0]}.timestep_scales", f"{QKV[0]}.output_scale"} <= tensors.keys()
    assert not {f"{BLOCK}.attn2.to_q.output_scale", f"{BLOCK}.attn1.to_out.0.input_multiplier"} & tensors.keys()
    load_quantized(Plan.load(path), spoilt / "model.safetensors")
    again = cli("quantize", spoilt, "--plan", path)
    assert "done already" in again.err and planned(spoilt) == new
    assert cli("export", spoilt, "--target", "onnxruntime").code == 0


def test_a_killed_try_ends_with_the_same_reasons(cli, spoilt, edit, monkeypatch):
    """The new plan is written before the rest: the try after it compares with itself, and still says what the hand did."""
    path = edit(lambda plan: change(plan, QKV, clip=0.8))
    command = ["quantize", spoilt, "--plan", path]

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_quantized", killed)
        assert cli(*command, "--force").code == 130
    assert cli(*command).code == 0
    assert planned(spoilt)[QKV[0]].why == "set by hand: clip 0.8 (was 1.0)"


def test_a_plan_goes_to_another_calibration_of_the_same_model(cli, finished, edit, tmp_path):
    path = edit(lambda plan: change(plan, f"{BLOCK}.attn1.to_out.0", clip=0.9))
    run = tmp_path / "other"
    made = cli("calibrate", "--weights", "random:pixart-tiny", "--samples", 2, "--steps", 3, "-o", run)
    assert made.code == 0
    assert cli("quantize", run, "--plan", path).code == 0
    plan = Plan.load(run / "plan.json")
    assert len(plan.timesteps) == 3 and all(entry.why.startswith("from a plan file: ") for entry in plan.layers)
    assert planned(run)[f"{BLOCK}.attn1.to_out.0"].clip == 0.9


def test_one_decision_changes_the_numbers_of_its_group_alone(tiny, statistics, before):
    model, edited = tiny(), before.model_copy(deep=True)
    for entry in edited.layers:
        if entry.name in QKV:
            entry.smoothing = 0.3
    settled = edited_plan.settle(edited, model, statistics, before, Path("edited.json"))
    assert set(dict(model.backbone.named_modules())) == set(dict(tiny().backbone.named_modules())), "it only looks"
    plan = quantize_as_planned(model, settled, statistics)
    errors = {entry.name: entry.sqnr_db for entry in plan.layers}
    assert [name for name, entry in zip(errors, before.layers, strict=True) if errors[name] != entry.sqnr_db] == QKV


def test_by_token_and_weights_alone(tiny, statistics, before):
    """Decisions that this plan's recipe did not take."""
    model, edited = tiny(), before.model_copy(deep=True)
    for entry in edited.layers:
        if entry.name in QKV:
            entry.per_token = True
        if entry.name.startswith(f"{BLOCK}.ff"):
            entry.activations = "float16"
    settled = edited_plan.settle(edited, model, statistics, before, Path("edited.json"))
    new = {entry.name: entry for entry in quantize_as_planned(model, settled, statistics).layers}
    proj = new[f"{BLOCK}.ff.net.0.proj"]
    assert new[QKV[0]].why == "set by hand: per_token true (was false)" and new[QKV[0]].per_token
    assert proj.why == "set by hand: activations float16 (was int8)" and proj.quantized
    old = {entry.name: entry.sqnr_db for entry in before.layers}
    assert new[proj.name].sqnr_db > old[proj.name] + 1, "half of the noise is gone"


def kind(name: str) -> Callable[[Json], None]:
    def set_kind(plan: Json) -> None:
        plan["layers"][0]["kind"] = name

    return set_kind


def drop(plan: Json) -> None:
    plan["layers"].remove(layer(plan, QKV[1]))


FACTS: dict[str, tuple[Callable[[Json], Any], str]] = {
    "fingerprint": (lambda plan: plan.update(fingerprint="0" * 64), "the plan of another model"),
    "family": (lambda plan: plan.update(family="wan"), "family is 'wan', the model's is 'pixart'"),
    "class": (lambda plan: plan.update(backbone_class="UNet2DConditionModel"), "backbone_class is 'UNet2D"),
    "config": (lambda plan: plan["config"].update(num_layers=9), "config.num_layers is 9, the model's is 2"),
    "fewer": (drop, f"the layer '{QKV[1]}' is missing"),
    "name": (lambda plan: change(plan, QKV[0], name=f"{BLOCK}.attn1.to_qq"), f"the nearest is {QKV[0]})"),
    "shape": (lambda plan: change(plan, QKV[0], shape=[3, 4]), f"{QKV[0]}: shape is [3, 4], the model's is [32, 32]"),
    "bias": (lambda plan: change(plan, QKV[0], bias=False), f"{QKV[0]}: bias is false, the model's is true"),
    "kind of another": (kind("Conv2d"), "kind is Conv2d, the model's is Linear"),
    "group": (lambda plan: change(plan, QKV[1], group=QKV[1]), f"but it reads the tensor of '{QKV[0]}'"),
}
WISHES: dict[str, tuple[Callable[[Json], Any], str]] = {
    "one of three": (lambda plan: change(plan, QKV[1], smoothing=0.1), "have to agree, but smoothing is"),
    "scales of one": (lambda plan: change(plan, QKV[2], timestep_scales=True), "but timestep_scales is false there"),
    "half": (
        lambda plan: change(plan, QKV, weights="float16"),
        "weights float16 with activations int8: quantize the weights",
    ),
    "format": (lambda plan: change(plan, QKV, weights="int7"), "unknown format 'int7'"),
    "blocks": (
        lambda plan: change(plan, QKV, weights="int4_g64"),
        f"{QKV[0]}: int4_g64 has blocks of 64, and 32 columns",
    ),
    "another kept": (
        lambda plan: plan.update(storage_dtype="bfloat16"),
        "proj_out: weights is float16, but this plan's storage_dtype is",
    ),
    "float32": (lambda plan: change(plan, QKV, weights="float32", activations="float32"), "storage_dtype is float16"),
    "smoothing": (lambda plan: change(plan, QKV, smoothing=1.5), "smoothing is 1.5; it is null, or above 0"),
    "no number": (lambda plan: change(plan, QKV, smoothing=float("nan")), "smoothing is NaN"),
    "clip": (lambda plan: change(plan, QKV, clip=0), "clip is 0.0; it is above 0"),
    "token": (lambda plan: change(plan, QKV, activations="float16", per_token=True), "have no scale per token"),
    "no range": (
        lambda plan: change(plan, QKV, per_token=True, timestep_scales=True),
        "no constant scale that it could",
    ),
    "a method's": (lambda plan: change(plan, QKV, rotation=16), "rotation is 16, which only a recipe can do"),
    "output": (lambda plan: change(plan, QKV[0], output="float16"), "output is float16; it can be null or int8"),
    "nothing": (
        lambda plan: [entry.update(weights="float16", activations="float16") for entry in plan["layers"]],
        "it quantizes no layer",
    ),
    "word": (lambda plan: change(plan, QKV, smoothing="strong"), "smoothing"),
    "field": (lambda plan: change(plan, QKV, bits=4), "bits"),
    "kind": (kind("Conv3d"), "kind"),
}


@pytest.mark.parametrize("name", [*FACTS, *WISHES])
def test_nonsense_is_refused_with_the_entry_and_the_fix(edit, tiny, statistics, before, name):
    how, part = (FACTS | WISHES)[name]
    error = IntegrityError if name in FACTS else InputError
    path = edit(how)
    with pytest.raises(error, match="edited.json") as caught:
        edited_plan.settle(edited_plan.read(path), tiny(), statistics, before, path)
    assert part in caught.value.message and len(caught.value.message) < 1000 and caught.value.fix


def test_what_is_refused_costs_nothing(fails, finished, spoilt, edit, tmp_path):
    """Exit codes on the command line; the run stays as it was, also with --force."""
    kept = {path: path.read_bytes() for path in spoilt.rglob("*") if path.is_file()}
    nonsense = edit(lambda plan: change(plan, QKV[1], smoothing=0.1))
    fails(3, "have to agree", "quantize", spoilt, "--plan", nonsense, "--force")
    fails(3, "have to agree", "quantize", spoilt, "--plan", nonsense, "--dry-run")
    fails(5, "another model", "quantize", spoilt, "--plan", edit(lambda plan: plan.update(fingerprint="")), "--force")
    fails(3, "plan was not there", "quantize", spoilt, "--plan", edit(lambda plan: None))
    fails(3, "No such file", "quantize", spoilt, "--plan", tmp_path / "none.json", "--force")
    (tmp_path / "cut.json").write_bytes((finished.path / "plan.json").read_bytes()[:-50])
    fails(3, "not valid JSON", "quantize", spoilt, "--plan", tmp_path / "cut.json", "--force")
    for other in (["--recipe", "my.yaml"], ["--set", "storage_dtype=bfloat16"]):
        fails(2, "--plan holds every decision", "quantize", spoilt, "--plan", spoilt / "plan.json", *other)
    assert kept == {path: path.read_bytes() for path in spoilt.rglob("*") if path.is_file()}


def test_a_dry_run_shows_the_edit(cli, finished, edit):
    path = edit(lambda plan: change(plan, f"{BLOCK}.ff.net.2", weights="float16", activations="float16"))
    rows = {
        row["name"]: row for row in cli("quantize", finished.path, "--plan", path, "--dry-run", "--json").json["layers"]
    }
    assert rows[f"{BLOCK}.ff.net.2"]["why"].startswith("set by hand: weights float16 (was int8)")
    assert rows[f"{BLOCK}.ff.net.2"]["bytes"] > rows["transformer_blocks.0.ff.net.2"]["bytes"]


@pytest.mark.parametrize(
    "wish", [{"per_token": True}, {"weights": "nvfp4", "activations": "nvfp4"}], ids=["token", "blocks"]
)
def test_a_convolution_reads_windows(wish):
    settings: Json = {"weights": "int8", "activations": "int8", **wish}
    layer = LayerPlan(name="conv", kind="Conv2d", shape=(32, 32, 3, 3), bias=True, group="conv", **settings)
    assert any(
        "a convolution's input cannot have" in fault
        for fault in edited_plan._impossible(layer, "float16", None, torch.nn.Conv2d(32, 32, 3))
    )
