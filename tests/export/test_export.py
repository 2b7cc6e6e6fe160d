"""What is exported is what was evaluated: precision, parity, dynamic axes; and each check catches what it is for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from qdiff.engines import BuildOptions, choose_engine
from qdiff.errors import InputError, IntegrityError, QualityGateError
from qdiff.evaluation.metrics import cosine
from qdiff.export import checks, parity
from qdiff.export.onnx_graph import check_target
from qdiff.export.translations import TARGETS, custom_ops, table_for
from qdiff.files import open_tensors
from qdiff.models import FAMILIES
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.recording.trajectory import Trajectory
from qdiff.stages.quantize import FLOAT_PREDICTIONS


@pytest.fixture(scope="module")
def plan(finished) -> Plan:
    return Plan.load(finished.path / "plan.json")


@pytest.fixture(scope="module", params=sorted(TARGETS))
def target(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantized(finished, plan) -> torch.nn.Module:
    return load_quantized(plan, finished.path / "model.safetensors")


def as_exported(finished, plan: Plan, target: str) -> torch.nn.Module:
    """The torch module that a target's graph has to agree with."""
    return load_quantized(plan, finished.path / "model.safetensors", outputs=bool(TARGETS[target].outputs))


@pytest.fixture
def edited(finished, tmp_path) -> Callable[..., Path]:
    """A copy of a target's graph after a function changed it: ``edited("tensorrt", change)``."""

    def make(target: str, change: Callable[[onnx.ModelProto], None]) -> Path:
        folder = tmp_path / target
        shutil.copytree(finished.path / "onnx" / target, folder)
        model = onnx.load(str(folder / "model.onnx"))
        change(model)
        (folder / "model.onnx.data").unlink()
        onnx.save(model, str(folder / "model.onnx"))
        return folder / "model.onnx"

    return make


def graph_of(finished, target: str) -> Path:
    return finished.path / "onnx" / target / "model.onnx"


@pytest.mark.parametrize("op", sorted(custom_ops()))
def test_every_op_has_a_translation_or_its_formats_are_refused(target, op, plan):
    """No layer may reach the exporter with an op that it cannot write."""
    if getattr(torch.ops.qdiff, op).default in table_for(TARGETS[target]):
        return
    refused = {
        "token_quantize_dequantize": {"per_token": True},
        "block_quantize_dequantize": {"weights": "nvfp4", "activations": "nvfp4"},
    }[op]
    first = plan.quantized[0]
    layers = [first.model_copy(update=refused), *plan.quantized[1:]]
    with pytest.raises(InputError, match=re.escape(first.name)):
        check_target(plan.model_copy(update={"layers": layers}), TARGETS[target])


def test_the_files_checks_pass_and_nothing_was_downgraded(finished, plan, target):
    path = graph_of(finished, target)
    checks.check_file(path)
    realised = checks.realised_precision(path, plan)
    assert checks.downgraded(plan, realised, TARGETS[target].outputs) == []
    assert all(
        (realised[layer.name].weights, realised[layer.name].activations) == ("int8", "int8") for layer in plan.quantized
    )
    model = onnx.load(str(path), load_external_data=False)
    codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert sorted(sorted(t.dims) for t in codes) == sorted(sorted(layer.shape) for layer in plan.quantized)
    assert {o.domain for o in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common", "pkg.onnxscript.torch_lib"}
    assert not model.functions or all(f.domain.startswith("pkg.") for f in model.functions)


def test_the_file_tells_nothing_of_this_machine(finished, target):
    data = graph_of(finished, target).read_bytes()
    for word in (str(Path.home()).encode(), str(finished.path).encode(), b"site-packages", b".py"):
        assert word not in data or word == b"/", word


def test_axes_are_dynamic_and_named(finished, plan, target):
    model = onnx.load(str(graph_of(finished, target)), load_external_data=False)
    family = FAMILIES[plan.family]

    def axes(value) -> tuple:
        return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)

    assert [(v.name, axes(v)) for v in model.graph.input] == [(s.name, s.axes) for s in family.inputs(plan.config)]
    assert axes(model.graph.output[0]) == family.output_axes(plan.config)


SIZES = [(1, 16, 16, 2), (1, 16, 24, 7), (3, 8, 32, 40), (5, 16, 16, 300), (2, 4, 4, 120)]


@pytest.mark.parametrize("size", SIZES)
def test_other_shapes_agree_with_torch(finished, plan, target, size):
    """Shapes that neither calibration nor the tracer saw: batch, height, width, tokens; each row at its own timestep."""
    batch, height, width, tokens = size
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, tokens // 2 + 1 :] = 0
    inputs = {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, plan.config["caption_channels"], generator=generator),
        "timestep": torch.tensor([plan.timesteps[i % len(plan.timesteps)] for i in range(batch)]),
        "encoder_attention_mask": mask,
    }
    session = onnxruntime.InferenceSession(str(graph_of(finished, target)), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
    with torch.inference_mode():
        expected = FAMILIES[plan.family].call(as_exported(finished, plan, target), inputs)
    assert got.shape == expected.shape == (batch, plan.config["out_channels"], height, width)
    assert got.dtype == torch.float32 and cosine(expected, got) >= parity.COSINE


def test_parity_was_measured_on_every_step(finished, target):
    entry = finished.result.json["stages"][f"export:{target}"]
    assert entry["parity"]["steps"] == 4 and entry["parity"]["worst_cosine"] >= parity.COSINE
    whole = graph_of(finished, target)
    assert entry["bytes"] == sum(f.stat().st_size for f in (whole, whole.with_name("model.onnx.data")))
    parts = {file.stem for file in whole.parent.glob("*.onnx")}
    assert parts == {"model", "step", "prompt", "timestep"}, "parity ran what engines are built from"


def initializer(model: onnx.ModelProto, ending: str):
    return next(t for t in model.graph.initializer if t.name.endswith(ending))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layer", ["transformer_blocks.1.ff.net.2", "transformer_blocks.0.attn1.to_q"])
@pytest.mark.parametrize("how", ["initializer", "constant"])
def test_a_float_copy_of_a_weight_is_caught(finished, plan, edited, dtype, layer, how):
    """Also one whose shape is that of layers which the recipe keeps in float (width x width)."""
    shape = next(entry.shape for entry in plan.layers if entry.name == layer)

    def smuggle(model):
        tensor = numpy_helper.from_array(np.zeros(shape[::-1], dtype), "val_9000")
        if how == "initializer":
            model.graph.initializer.append(tensor)
        else:
            model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["val_9000"], value=tensor))

    with pytest.raises(IntegrityError, match="float copy.*val_9000"):
        checks.realised_precision(edited("onnxruntime", smuggle), plan)


def product_of(model: onnx.ModelProto, layer: str) -> onnx.NodeProto:
    """The MatMul or Gemm that the layer's codes end in."""
    value = initializer(model, f"{layer}.codes").name
    while True:
        node = next(node for node in model.graph.node if value in node.input)
        if node.op_type in ("MatMul", "Gemm"):
            return node
        value = node.output[0]


def test_a_removed_quantizer_is_reported_as_a_downgrade(plan, edited):
    layer = "transformer_blocks.0.ff.net.2"

    def remove(model):
        producer = {output: node for node in model.graph.node for output in node.output}
        product = product_of(model, layer)
        dequantize = producer[product.input[0]]
        while dequantize.op_type != "DequantizeLinear":
            dequantize = producer[dequantize.input[0]]
        quantize = producer[dequantize.input[0]]
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == dequantize.output[0]:
                    node.input[i] = quantize.input[0]

    realised = checks.realised_precision(edited("onnxruntime", remove), plan)
    lost = checks.downgraded(plan, realised, TARGETS["onnxruntime"].outputs)
    assert len(lost) == 1 and lost[0].startswith(f"{layer}: asked int8 x int8, the graph has int8 x float")


def test_an_output_quantizer_that_is_missing_is_a_downgrade(finished, plan):
    """The tensorrt graph leaves the quantizers of q and k out on purpose; a target that wants them calls that a loss."""
    realised = checks.realised_precision(graph_of(finished, "tensorrt"), plan)
    lost = checks.downgraded(plan, realised, frozenset({"int8"}))
    assert len(lost) == sum(layer.output is not None for layer in plan.layers) == 8


def test_codes_that_are_gone_are_an_error(plan, edited):
    def rename(model):
        tensor = initializer(model, "transformer_blocks.0.ff.net.2.codes")
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == tensor.name:
                    node.input[i] = "elsewhere"
        tensor.name = "elsewhere"

    with pytest.raises(IntegrityError, match=r"no codes of layer transformer_blocks\.0\.ff\.net\.2"):
        checks.realised_precision(edited("onnxruntime", rename), plan)


def run_parity(finished, plan: Plan, path: Path, target: str, folder: Path) -> list[parity.StepParity]:
    engine = choose_engine("onnxruntime")
    folder.mkdir()
    engine.build(path, folder, BuildOptions())
    with open_tensors(finished.path / FLOAT_PREDICTIONS, "the float predictions") as file:
        predictions = list(file.get_tensor("predictions"))
    steps = list(Trajectory(finished.path / "calibration").steps(0))
    expected = parity.expected_outputs(FAMILIES[plan.family], as_exported(finished, plan, target), steps)
    specs = FAMILIES[plan.family].inputs(plan.config)
    return parity.compare(expected, engine.load(folder, BuildOptions()), steps, predictions, specs)


def test_the_parity_gate_closes_when_a_scale_is_changed(finished, plan, target, edited, tmp_path):
    layer = "transformer_blocks.1.ff.net.2"

    def change(model):
        tensor = initializer(model, f"{layer}.scale")
        values = numpy_helper.to_array(tensor) * 4
        tensor.CopyFrom(numpy_helper.from_array(values.astype(numpy_helper.to_array(tensor).dtype), tensor.name))

    steps = run_parity(finished, plan, edited(target, lambda model: None), target, tmp_path / "same")
    assert len(steps) == 4 and min(step.cosine for step in steps) >= parity.COSINE
    assert all(step.agrees and 20 < step.module_db < 100 and 20 < step.graph_db < 100 for step in steps)
    shutil.rmtree(tmp_path / target)
    with pytest.raises(QualityGateError, match="differs from the torch module at timestep") as caught:
        run_parity(finished, plan, edited(target, change), target, tmp_path / "other")
    assert caught.value.exit_code == 7


def test_a_plan_that_a_target_cannot_run_names_the_layer(plan, target):
    wrong = plan.model_copy(deep=True)
    layer = wrong.quantized[3]
    layer.activations = "fp4_e3m0_g128"  # a format for studies
    with pytest.raises(InputError, match=layer.name):
        check_target(wrong, TARGETS[target])
    with pytest.raises(InputError, match="cannot run"):
        check_target(plan, replace(TARGETS[target], runs=frozenset()))


def test_a_damaged_file_is_no_onnx(finished, tmp_path):
    path = tmp_path / "model.onnx"
    data = graph_of(finished, "onnxruntime").read_bytes()
    for content in (b"", data[: len(data) // 2], b"not at all"):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="is not valid ONNX"):
            checks.check_file(path)


def test_quantized_differs_from_float_and_recipes_from_each_other(finished, plan, quantized, tiny):
    """The guard: every method of the recipe changes the output, none of them into the float model's."""
    from qdiff.quantization.quantize import quantize
    from qdiff.recipes import load_recipe
    from qdiff.recording.activation_statistics import Statistics

    step = next(iter(Trajectory(finished.path / "calibration")))
    statistics = Statistics.load(finished.path / "calibration" / "statistics.safetensors")
    family = FAMILIES[plan.family]
    outputs = {}
    with torch.inference_mode():
        outputs["float"] = family.call(tiny().backbone, step.inputs)
        outputs["loaded"] = family.call(quantized, step.inputs)
        for name, settings in {
            "int8": [],
            "nothing": ["methods={}"],
            "smooth": ["methods={smooth: {strengths: [0.5], minimum_gain_db: -100}}"],
            "timestep_scales": ["methods={timestep_scales: {minimum_gain_db: -100}}"],
            "clip": ["methods={clip: {ratios: [0.5], minimum_gain_db: -100}}"],
            "fewer": [
                'ignore.pixart=["adaln_single.*", "caption_projection.*", "proj_out", "*.attn1.*"]',
                "methods={}",
            ],
        }.items():
            model = tiny()
            quantize(model, load_recipe("int8", settings), statistics)
            outputs[name] = family.call(model.backbone, step.inputs)
    assert torch.equal(outputs.pop("loaded"), outputs["int8"]), "what was saved is what was evaluated"
    names = list(outputs)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if torch.equal(outputs[a], outputs[b])]
    assert not same
    assert all(cosine(outputs["float"], output) > 0.99 for output in outputs.values())
