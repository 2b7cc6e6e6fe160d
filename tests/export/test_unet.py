"""A U-Net through calibrate, quantize, export and build: convolutions in INT8, shortcuts split, the first token apart."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch

from qdiff.engines import choose_engine
from qdiff.evaluation.metrics import sqnr_db
from qdiff.export.reading import Graph
from qdiff.models import FAMILIES
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.quantization.edited_plan import read, settle
from qdiff.quantization.layer_plans import change
from qdiff.quantization.quantize import quantize_as_planned
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.run import Run
from qdiff.stages.build import build, load_runner
from qdiff.stages.calibrate import CalibrateOptions, calibrate
from qdiff.stages.export import export
from qdiff.stages.quantize import quantize

pytestmark = pytest.mark.slow

MODELS = {"sd": ("random:sd-tiny", "onnxruntime"), "sdxl": ("random:sdxl-tiny", "tensorrt")}


@dataclass(frozen=True)
class Exported:
    run: Run
    plan: Plan
    graph: onnx.ModelProto
    target: str


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Exported:
    run = Run(tmp_path_factory.mktemp(request.param))
    weights, target = MODELS[request.param]
    calibrate(run, CalibrateOptions("stable-diffusion", weights, samples=2, steps=2, batch=2))
    quantize(run, "int8")
    export(run, target)
    graph = onnx.load(str(run.file("onnx", target, "model.onnx")))
    return Exported(run, Plan.load(run.file("plan.json")), graph, target)


def test_every_convolution_is_fed_by_packed_codes_of_its_own_shape(exported):
    """The pair DequantizeLinear and Conv, with nothing between, is what runtimes make an INT8 kernel of."""
    producer = {output: node for node in exported.graph.graph.node for output in node.output}
    codes = {tensor.name: tensor for tensor in exported.graph.graph.initializer}
    kernels = []
    for node in exported.graph.graph.node:
        weight = producer.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            tensor = codes[weight.input[0]]
            assert len(tensor.dims) == 4 and tensor.data_type == onnx.TensorProto.INT8
            kernels.append(tuple(tensor.dims))
    planned = [tuple(layer.shape) for layer in exported.plan.quantized if layer.kind == "Conv2d"]
    assert sorted(kernels) == sorted(planned) and len(planned) > 20


def test_split_shortcuts_are_two_convolutions_and_a_sum(exported):
    structure = exported.plan.structure
    names = {layer.name for layer in exported.plan.quantized}
    assert structure.split and structure.first_token
    for name in structure.split:
        assert {f"{name}.hidden", f"{name}.skip"} <= names
    for name in structure.first_token:
        assert f"{name}.rest" in names


def test_engines_compute_what_the_module_computes(exported, integer_arithmetic):
    run, family = exported.run, FAMILIES["stable-diffusion"]
    if exported.target == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        build(
            run, "tensorrt_rtx"
        )  # a real engine, which needs a GPU to run; the export has compared its graph with torch
        assert any(run.file("engines").iterdir())
        return
    module = choose_engine("eager").load_module(
        family.for_export(load_quantized(exported.plan, run.file("model.safetensors")))
    )
    step = next(iter(Trajectory(run.file("calibration"))))
    expected = module(step.inputs)
    larger = {
        name: value.repeat_interleave(2, 2).repeat_interleave(2, 3) if value.ndim == 4 else value
        for name, value in step.inputs.items()
    }
    for engine, least in (("openvino", 20), ("onnxruntime", 30)):  # OpenVINO's other layers may run in BF16
        build(run, engine)
        runner = load_runner(run, engine, None)
        assert sqnr_db(expected, runner(step.inputs)) > least
        assert runner(larger).shape == larger["sample"].shape
        runner.close()


def test_a_plan_edited_by_hand_keeps_its_structure(exported):
    run = exported.run
    path: Path = run.file("plan.json")
    name = next(layer.name for layer in exported.plan.quantized if layer.name.endswith(".skip"))
    layers = [
        layer.model_copy(update={"weights": "float16", "activations": "float16"}) if layer.name == name else layer
        for layer in exported.plan.layers
    ]
    edited = run.path / "edited.json"
    exported.plan.model_copy(update={"layers": layers}).save(edited)
    model = FAMILIES["stable-diffusion"].load(exported.plan.weights)
    statistics = change(
        model, exported.plan.structure, Statistics.load(run.file("calibration", "statistics.safetensors"))
    )
    plan = quantize_as_planned(model, settle(read(edited), model, statistics, exported.plan, edited), statistics)
    assert {layer.name for layer in exported.plan.quantized} - {layer.name for layer in plan.quantized} == {name}
    assert plan.structure == exported.plan.structure and path.exists()
    with torch.inference_mode():
        model.family.call(model.backbone, next(iter(Trajectory(run.file("calibration")))).inputs)


@pytest.mark.parametrize("exported", ["sd"], indirect=True)
def test_a_layer_that_feeds_another_has_no_quantized_output(exported, tmp_path):
    """Without smoothing nothing stands between a downsampling convolution and the input quantizer of the layer that reads it."""
    shutil.copytree(exported.run.file("calibration"), tmp_path / "run" / "calibration")
    shutil.copy(exported.run.file("run.json"), tmp_path / "run")
    run = Run(tmp_path / "run")
    quantize(run, "int8", ["methods={}"], force=True)
    export(run, exported.target)
    found = Graph(run.file("onnx", exported.target, "model.onnx")).quantized_layer
    plan = Plan.load(run.file("plan.json"))
    assert {layer.name: found(layer.name).output for layer in plan.quantized} == {
        layer.name: layer.output for layer in plan.quantized
    }
    assert any(layer.output for layer in plan.quantized)
