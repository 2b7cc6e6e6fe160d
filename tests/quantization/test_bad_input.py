"""What quantization refuses or leaves alone, and that it says which layer and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calib.collect import Collector
from qdiff.errors import InputError
from qdiff.events import log
from qdiff.quantization.quantize import quantize
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory


@pytest.fixture
def recorded(finished):
    folder = finished.path / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")


def test_a_block_that_does_not_divide_a_layer_is_refused_by_the_layers_name(tiny, recorded):
    """The tiny model is 32 wide."""
    settings = ["scheme.weights=int4_g64", "scheme.activations=float16", "methods={}"]
    with pytest.raises(
        InputError, match=r"layer transformer_blocks\.0\.attn1\.to_q of shape \[32, 32\].*blocks of 64"
    ) as caught:
        quantize(tiny(), load_recipe("int8", [*settings, "quantize_outputs={}"]), recorded[1])
    assert "int4_g32" in caught.value.fix and "int4_g128" not in caught.value.fix


def test_a_rank_that_is_too_large_is_refused_by_the_layers_name(tiny, recorded):
    settings = ["methods={low_rank: {rank: 64}}", "quantize_outputs={}"]
    with pytest.raises(InputError, match=r"rank 64 is not smaller than layer transformer_blocks\.0\.attn1\.to_q"):
        quantize(tiny(), load_recipe("int8", settings), recorded[1])


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("recipe", ["int8", "nvfp4", "w4a8"])
def test_constant_inputs_quantize_to_finite_numbers(tiny, recorded, recipe, value):
    trajectory, statistics = recorded
    for entry in statistics.inputs.values():
        for table in (entry.low, entry.high, entry.rows):
            table.fill_(value)
    model = tiny()
    settings = ["sequential=null"] + (["scheme.weights=int4_g32"] if recipe == "w4a8" else [])
    plan = quantize(model, load_recipe(recipe, settings), statistics)
    with torch.no_grad():
        step = next(iter(trajectory))
        assert torch.isfinite(model.family.call(model.backbone, step.inputs)).all()
    if value == 0 and recipe != "int8":
        assert any("zero on every token" in layer.why for layer in plan.quantized)


def test_a_calibration_that_is_too_small_names_the_layer(tiny, recorded):
    _, statistics = recorded
    for entry in statistics.inputs.values():
        entry.rows, entry.rows_timestep = entry.rows[:1], entry.rows_timestep[:1]
    with pytest.raises(
        InputError, match=r"gptq: layer transformer_blocks\.0\..* has 1 tokens to fit on.*\n.*more prompts"
    ):
        quantize(tiny(), load_recipe("nvfp4", ["sequential=null"]), statistics)


class Unreached(nn.Module):
    """A branch that no call takes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.taken, self.spare = layer, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``taken(x)``."""
        return self.taken(x)


def test_a_layer_that_calibration_never_reached_is_kept_and_named(tiny, finished, tmp_path, caplog):
    model = tiny()
    block = model.backbone.transformer_blocks[1]
    block.attn1.to_q = Unreached(block.attn1.to_q)
    log.propagate = True
    with caplog.at_level("WARNING"):
        collector = Collector(model, Trajectory(finished.path / "calibration"), "x")
        collector.collect(tmp_path / "partial").save(tmp_path / "statistics.safetensors")
        settings = ['ignore.pixart=["adaln_single.*", "caption_projection.*", "proj_out"]', "quantize_outputs={}"]
        statistics = Statistics.load(tmp_path / "statistics.safetensors")
        plan = quantize(model, load_recipe("int8", settings), statistics)
    spare = next(layer for layer in plan.layers if layer.name.endswith("attn1.to_q.spare"))
    assert spare.weights == "float16" and spare.why == "kept: calibration never reached this layer"
    assert not spare.quantized and sum(layer.quantized for layer in plan.layers) > 10
    assert "attn1.to_q.spare" in caplog.text and "never reached" in caplog.text
