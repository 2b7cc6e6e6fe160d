"""A model whose values leave float16: nothing is cut, nothing that is kept becomes infinite, and what collapses is not silent."""

from __future__ import annotations

import json

import pytest
import torch

from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.quantization.layer_plans import kept_entry
from qdiff.quantization.storage import half_layer
from qdiff.recording.magnitude import Magnitude
from qdiff.runs.run import Run


def test_a_residual_stream_of_a_thousand_million_keeps_its_quality(grown):
    """Scales that ended at 65,504 cut it, and so did biases in float16: the prediction was NaN."""
    entry = Run(grown).entry("quantize")
    assert entry["largest_value"] > 1e9
    errors = json.loads((grown / "quantization.json").read_text())["timesteps"]
    assert min(error["sqnr_db"] for error in errors) > 25


def test_its_scales_and_biases_are_finite_numbers_beyond_float16(grown):
    plan = Plan.load(grown / "plan.json")
    state = load_quantized(plan, grown / "model.safetensors").state_dict()
    scales = {name: value for name, value in state.items() if name.endswith(".input_scale")}
    assert max(float(value) for value in scales.values()) > 65504
    for name, value in state.items():
        if value.is_floating_point() and value.element_size() > 1:
            assert torch.isfinite(value.float()).all(), name
    assert all(torch.equal(value, value.bfloat16().float()) for value in scales.values() if value > 65504)


def test_what_is_kept_is_kept_in_a_dtype_that_holds_it():
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 1e6
    entry = kept_entry("layer", layer, "float16", "ignored")
    assert entry.weights == entry.activations == "float32" and "1e+06" in entry.why
    assert torch.equal(half_layer(entry, layer).weight, layer.weight)
    assert kept_entry("layer", layer, "bfloat16", "ignored").weights == "bfloat16"
    with torch.no_grad():
        layer.weight[0, 0] = 6e4
        layer.bias[0] = 1e6
    entry = kept_entry("layer", layer, "float16", "ignored")
    assert entry.weights == "float16" and entry.why == "kept: ignored"
    assert half_layer(entry, layer).bias[0] == 1e6


def test_the_largest_value_is_seen_where_no_layer_reads_it():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Identity())
    with Magnitude(module) as magnitude:
        module[1](torch.tensor([1.0, -3e5]))
    assert magnitude.largest == pytest.approx(3e5)
    module[1](torch.tensor([1e9]))
    assert magnitude.largest == pytest.approx(3e5), "it looks only while it is a context"
