"""Layers timed in an engine that is here, and a budget of those milliseconds."""

from __future__ import annotations

import pytest
import torch

from qdiff.engines.base import ENGINES
from qdiff.errors import InputError, UsageError
from qdiff.files import read_json
from qdiff.nn.quant_linear import KeptLinear, QuantLinear, QuantLinearConfig, TimestepIndex
from qdiff.plan.devices import DEVICES
from qdiff.plan.plan import LayerPlan
from qdiff.stages.decisions import read_recipe
from qdiff.stages.layer_times import LayerTimes

pytestmark = pytest.mark.slow


def entry(weights: str, activations: str, per_token: bool = False) -> LayerPlan:
    return LayerPlan(
        name="blocks.0.fc", kind="Linear", shape=(1024, 1024), bias=False, weights=weights, activations=activations,
        per_token=per_token,
    )  # fmt: skip


def quantized(columns: int, weights: str = "int8", activations: str = "int8", **pieces: object) -> QuantLinear:
    layer = QuantLinear(QuantLinearConfig(columns, 1024, False, weights, activations, **pieces), TimestepIndex())
    for name, tensor in layer.named_buffers():
        if tensor.is_floating_point() or name == "scale":
            tensor.fill_(1)
    return layer


def test_times_are_of_the_layer_and_equal_layers_are_measured_once():
    times = LayerTimes("openvino", threads=1)
    eight = entry("int8", "int8")
    small, large = (times(quantized(columns), eight, [1, 512, columns]) for columns in (64, 1024))
    assert large > small, "sixteen times the arithmetic"
    measured = times._measure
    times._measure = None  # type: ignore[assignment]
    assert times(quantized(1024), eight, [1, 512, 1024]) == large
    times._measure = measured
    assert times(quantized(64, timesteps=4), eight, [2, 16, 64]) >= 0, "scales by timestep need no clock"
    half = times(KeptLinear(1024, 1024, False), entry("float16", "float16"), [1, 512, 1024])
    assert half > 0


def test_what_an_engine_cannot_run_names_the_layer():
    times = LayerTimes("openvino", threads=1)
    unfit = entry("fp6_e3m2", "fp6_e3m2")
    with pytest.raises(InputError, match="cannot run layer blocks.0.fc"):
        times(torch.nn.Identity(), unfit, [1, 4, 1024])
    with pytest.raises(InputError, match="runs torch modules"):
        LayerTimes("eager")
    with pytest.raises(UsageError):
        LayerTimes("warp")


def test_devices_are_engines_that_run_graphs_or_gpus_with_rates():
    assert not set(ENGINES) & set(DEVICES)
    for device in ("openvino", "rtx-5090"):
        read_recipe("mixed", ["mixed.budget={latency: 8}", f"mixed.device={device}"])
    with pytest.raises(InputError, match="unknown device 'eager'"):  # it runs modules, no graphs
        read_recipe("mixed", ["mixed.budget={latency: 8}", "mixed.device=eager"])


def test_a_budget_of_measured_milliseconds(spoilt, cli, tmp_path):
    four = tmp_path / "four.yaml"
    four.write_text(
        "{version: 1, name: four, scheme: {weights: int4_g32, activations: int8}, methods: {}, ignore: {pixart: [proj_out]}}"
    )
    wish = [f"mixed.recipes=[{four}, int8]", "mixed.calls=2", "mixed.pictures=0", "mixed.device=openvino"]
    arguments = ["quantize", spoilt, "--recipe", "mixed", *(part for one in wish for part in ("--set", one)), "--force"]
    refused = cli(*arguments, "--budget", "latency=1e-9")
    assert refused.code == 3 and "what the cheapest formats come to" in refused.err, "no layer runs in no time"
    assert cli(*arguments, "--budget", "latency=1000").code == 0
    made = read_json(spoilt / "allocation.json", "the allocation")
    assert made["measured"] and made["device"] == "openvino" and 0 < made["solutions"][0]["cost"] < 1000
    assert cli("report", spoilt).code == 0
    assert "ms a step, measured with openvino" in (spoilt / "report.html").read_text()
