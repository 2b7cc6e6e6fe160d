"""A made-up family through every stage: a layer that is called twice, inputs without a batch axis, of integers and under other
names, and an exact input that joins the modulation."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from made_up import made_up_family

from qdiff.calib.collect import find_groups
from qdiff.plan.plan import Plan
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.run import Run
from qdiff.stages.build import build
from qdiff.stages.calibrate import CalibrateOptions, calibrate
from qdiff.stages.compare import compare
from qdiff.stages.export import export
from qdiff.stages.quantize import quantize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made_up():
    with made_up_family() as family:
        yield family


@dataclass(frozen=True)
class Recorded:
    run: Run
    statistics: Statistics


@pytest.fixture(scope="module")
def recorded(made_up, tmp_path_factory) -> Recorded:
    run = Run(tmp_path_factory.mktemp("made-up"))
    calibrate(run, CalibrateOptions("made-up", "random:made-up-tiny", samples=2, steps=2, batch=2))
    return Recorded(run, Statistics.load(run.file("calibration", "statistics.safetensors")))


def test_a_layer_that_is_called_twice_is_one_layer(made_up, recorded):
    model = made_up.load("random:made-up-tiny")
    groups = find_groups(model, next(iter(Trajectory(recorded.run.file("calibration")))))
    names = [name for layers in groups.values() for name in layers]
    assert len(names) == len(set(names)) and groups["again"] == ["again"]
    assert groups["transformer_blocks.0.attn1.to_q"] == [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    # What it reads the second time is around 3; ranges are those of both calls, rows come from both.
    entry = recorded.statistics.inputs["again"]
    assert (
        entry.low.min() < 0
        and entry.high.max() > 3
        and len(entry.rows) == 2 * len(recorded.statistics.inputs["proj_out"].rows)
    )


TARGETS = ("onnxruntime", "tensorrt")


def exported(run: Run, *ignored: str) -> dict[str, float]:
    """Quantize all layers but ``ignored`` and export for both targets; return the worst cosine to torch of each."""
    quantize(run, "int8", [f"ignore={{made-up: [{', '.join(ignored)}]}}"] if ignored else [], force=True)
    plan = Plan.load(run.file("plan.json"))
    assert [layer.quantized for layer in plan.layers if layer.name == "again"] == ["again" not in ignored]
    return {target: export(run, target)["parity"]["worst_cosine"] for target in TARGETS}


@pytest.fixture(scope="module")
def quantized(recorded, tmp_path_factory) -> tuple[Run, dict[str, float]]:
    """The run with all layers quantized, exported for both targets."""
    run = Run(shutil.copytree(recorded.run.path, tmp_path_factory.mktemp("quantized") / "run"))
    return run, exported(run)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_exported_and_agrees(quantized, target):
    """Parity is a part of the stage, sample by sample."""
    assert quantized[1][target] > 0.999


def test_it_agrees_where_the_layer_is_kept(made_up, recorded):
    """In 16 bit query, key and value have one dtype."""
    assert min(exported(recorded.run, "again").values()) > 0.999


def test_the_pipeline_takes_an_engine_in_its_place(quantized):
    run, _ = quantized
    build(run, "onnxruntime")
    rows = compare(run, engines=["onnxruntime", "eager"], pictures=2, prompts=["a cat", "a dog"])["engines"]
    assert all(row["psnr_db_mean"] > 25 for row in rows), rows


def test_samples_of_a_call_are_cut_where_their_axis_is(made_up):
    from qdiff.recording.inputs import InputSpec, latent_of, samples_of

    specs = (
        InputSpec("table", (3, "batch")),
        InputSpec("shared", (4,)),
        InputSpec("x", ("batch", 2, "height"), varies=True),
    )
    inputs = {"x": torch.arange(12).reshape(3, 2, 2), "shared": torch.arange(4), "table": torch.arange(9).reshape(3, 3)}
    part = samples_of(specs, inputs, slice(1, 2))
    assert part["x"].tolist() == [[[4, 5], [6, 7]]] and part["table"].tolist() == [[1], [4], [7]]
    assert torch.equal(part["shared"], inputs["shared"]) and latent_of(specs).name == "x"
