"""Speeds of a comparison: float and engines in turn, on the calls that the sampler made."""

from __future__ import annotations

import json

import pytest

from qdiff.evaluation import timing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quantized(cli, tmp_path_factory):
    """A run of the smallest model, quantized, three steps."""
    path = tmp_path_factory.mktemp("speed") / "run"
    settings = ("--weights", "random:pixart-tiny", "--samples", 2, "--steps", 3, "-o", path)
    for command in (("calibrate", *settings), ("quantize", path)):
        result = cli(*command)
        assert result.code == 0, result.err
    return path


def test_speeds_are_of_pairs(cli, quantized):
    result = cli("compare", quantized, "--engine", "eager", "--pictures", 3, "--json").json
    for row in (result["float"], *result["engines"]):
        assert row["speed_pairs"] >= timing.LEAST_ROUNDS and row["seconds_per_step"] > 0
        assert row["speedup_range"][0] <= row["speedup_range"][1]
        assert row["speed_reliable"] is (row["speed_reason"] is None)
    assert result["float"]["speedup"] == pytest.approx(1)
    row = result["engines"][0]
    assert row["speedup"] == pytest.approx(result["float"]["seconds_per_step"] / row["seconds_per_step"])


def test_a_busy_machine_is_said_in_every_form(cli, quantized, monkeypatch):
    busy = "other processes used 1.4 of the 2 cores"
    monkeypatch.setattr(timing.Load, "reason", lambda self: busy)
    text = cli("compare", quantized, "--engine", "eager", "--pictures", 2).out
    assert "not reliable (" in text and f"eager: machine busy, speed not reliable: {busy}" in text
    row = json.loads((quantized / "compare.json").read_text())["engines"][1]
    assert row["speed_reliable"] is False and row["speed_reason"] == busy
    warnings = cli("report", quantized, "--json").json["warnings"]
    assert any(busy in warning for warning in warnings)
    data = json.loads((quantized / "report.json").read_text())
    assert next(one for one in data["engines"] if one["name"] == "eager")["speed_reason"] == busy


def test_one_engine_after_the_other_where_memory_is_short(cli, spoilt, monkeypatch):
    """Two engines that do not fit at once: each is timed beside float alone, and it is said."""
    from qdiff.stages import speed

    monkeypatch.setattr(speed, "take_turns", turns := Turns(speed.take_turns))
    compare = ("compare", spoilt, "--engine", "openvino", "--engine", "onnxruntime", "--pictures", 2, "--force")
    assert cli(*compare).code == 0
    monkeypatch.setattr(speed, "SPARE", 1e12)
    result = cli(*compare)
    assert result.code == 0 and "memory does not hold all engines at once" in result.err
    assert turns.asked == [["float", "openvino", "onnxruntime"], ["float", "openvino"], ["float", "onnxruntime"]]


class Turns:
    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __call__(self, engines, *arguments, **settings):
        self.asked.append(list(engines))
        return self.inner(engines, *arguments, **settings)


def test_calls_are_those_of_the_sampler(tiny):
    """In order, by the first batch alone; what does not change from step to step is kept once."""
    import torch

    from qdiff.engines.recorder import CallRecorder

    class Echo:
        inputs, lasting = (), frozenset()

        def __call__(self, inputs):
            return inputs["hidden_states"]

    recorder, text = CallRecorder(Echo(), 4), torch.ones(1, 3)
    for step in range(6):
        latent = torch.full((1, 2), float(step))
        recorder({"hidden_states": latent, "encoder_hidden_states": text.clone()})
        latent.add_(100)  # a pipeline may go on with the same memory
    assert [call["hidden_states"][0, 0].item() for call in recorder.calls] == [0, 1, 2, 3]
    assert len({call["encoder_hidden_states"].data_ptr() for call in recorder.calls}) == 1
