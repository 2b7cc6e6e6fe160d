"""No quality collapses in silence: floors of layers, of the backbone's steps and of pictures, and splits that have to gain."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qdiff.errors import QualityGateError
from qdiff.plan.plan import Plan
from qdiff.quantization.quantize import quantize
from qdiff.quantization.splits import gaining_splits
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import InputStatistics, Statistics

pytestmark = pytest.mark.slow


def test_a_layer_below_the_floor_is_kept_and_the_plan_says_what_it_reached(tiny, recorded):
    _, statistics = recorded
    reached = {layer.name: layer.sqnr_db for layer in quantize(tiny(), load_recipe("int8"), statistics).quantized}
    floor = sorted(reached.values())[len(reached) // 2]
    model = tiny()
    plan = quantize(model, load_recipe("int8", [f"floors.layer={floor}"]), statistics)
    layers = {layer.name: layer for layer in plan.layers}
    below = {name for name, value in reached.items() if value < floor}
    assert below and below < reached.keys()
    for name in reached:
        assert layers[name].quantized is (name not in below), name
        if name in below:
            assert (
                f"int8 x int8 reaches {reached[name]:.1f} dB" in layers[name].why and "floors.layer" in layers[name].why
            )
    groups = {layer.group for layer in plan.quantized}
    assert any(layers[name].group is None and reached[name] for name in below)
    assert any(group in groups for group in {layer.group for layer in plan.quantized}), "what is left of a group stays"
    with pytest.raises(QualityGateError, match="every layer is below 100 dB"):
        quantize(tiny(), load_recipe("int8", ["floors.layer=100"]), statistics)


def test_part_of_a_group_can_be_kept(tiny, recorded):
    """Query, key and value read one tensor; two of them are quantized as they were while the third is kept."""
    _, statistics = recorded
    before = quantize(tiny(), load_recipe("int8"), statistics)
    members = [layer for layer in before.quantized if layer.group == "transformer_blocks.0.attn1.to_q"]
    least, *others = sorted(members, key=lambda layer: layer.sqnr_db)
    floor = (least.sqnr_db + others[0].sqnr_db) / 2
    after = {
        layer.name: layer
        for layer in quantize(tiny(), load_recipe("int8", [f"floors.layer={floor}"]), statistics).layers
    }
    assert not after[least.name].quantized
    for layer in others:
        assert after[layer.name] == layer


def test_steps_and_pictures_below_their_floor_end_with_exit_code_7_after_the_files_are_there(cli, fails, tmp_path):
    run = tmp_path / "run"
    settings = ("--model", "pixart", "--weights", "random:pixart-tiny", "--steps", 2, "--samples", 2)
    assert cli("calibrate", *settings, "-o", run, "--json").code == 0
    strict = ("--set", "floors.step=80", "--set", "floors.pictures=99")
    fails(7, ["at timestep ", "the floor of 80 dB", "--accept-quality"], "quantize", run, *strict)
    assert Plan.load(run / "plan.json").quantized and (run / "model.safetensors").exists()
    fails(7, "at timestep ", "quantize", run, *strict)  # also where the stage is done already
    assert cli("quantize", run, *strict, "--accept-quality", "--json").json["worst_sqnr_db"] < 80
    compare = ("compare", run, "--engine", "eager", "--pictures", 2)
    fails(7, ["eager have a mean PSNR of", "floor is 99 dB", "the worst is picture 00"], *compare)
    assert (
        len(json.loads((run / "compare.json").read_text())["engines"]) == 2 and (run / "images/eager/001.png").exists()
    )
    assert cli(*compare, "--accept-quality", "--json").json["pictures"] == 2
    fails(7, "at timestep ", "run", *settings, *strict, "--engine", "eager", "--pictures", 2, "-o", run)
    every = ("run", *settings, "--set", "floors.pictures=99", "--engine", "eager", "--pictures", 2, "-o", run)
    fails(7, "floor is 99 dB", *every, "--force")
    assert (run / "report.html").exists(), "the report about the failure is there"
    assert cli(*every, "--accept-quality", "--json").code == 0


def _joined(hidden: torch.Tensor, skip: torch.Tensor) -> Statistics:
    rows = torch.cat([hidden, skip], dim=1)
    entry = InputStatistics(
        ["conv"],
        low=rows.amin(0)[None],
        high=rows.amax(0)[None],
        square=rows.square().mean(0)[None],
        histogram=torch.zeros(1, 320, dtype=torch.int64),
        rows=rows,
        rows_timestep=torch.zeros(len(rows), dtype=torch.int64),
    )
    return Statistics([999.0], {"conv": entry}, {"conv": torch.ones(1)})


def test_a_shortcut_is_split_only_where_that_gains():
    generator = torch.Generator().manual_seed(0)
    hidden, skip = torch.randn(2, 64, 8, generator=generator).unbind()
    weight = torch.randn(4, 8, generator=generator)
    recipe = load_recipe("int8", ["methods={}"])

    def splits(weights: torch.Tensor, statistics: Statistics) -> dict[str, int]:
        conv = nn.Conv2d(16, 4, 1)
        conv.weight.data = weights[:, :, None, None]
        model = SimpleNamespace(backbone=nn.ModuleDict({"conv": conv}), device=torch.device("cpu"))
        return gaining_splits(model, recipe, statistics, {"conv": 8})

    apart = torch.cat([weight, weight], dim=1)
    assert splits(apart, _joined(100 * hidden, skip)) == {"conv": 8}, "one scale would round the smaller half away"
    # Halves that cancel, of which one is wider elsewhere: under one scale their errors cancel as well, under two they do not.
    equal = _joined(hidden, hidden)
    for table in (equal.inputs["conv"].low, equal.inputs["conv"].high):
        table[:, 8:] *= 3
    assert splits(torch.cat([weight, -weight], dim=1), equal) == {}
