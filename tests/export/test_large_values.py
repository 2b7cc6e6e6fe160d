"""Graphs of models whose values leave float16."""

from __future__ import annotations

import shutil
from dataclasses import replace

import onnx
import pytest
import torch

from qdiff.engines import BuildOptions, choose_engine
from qdiff.evaluation.metrics import sqnr_db
from qdiff.export.onnx_graph import write_graph
from qdiff.export.precision import fitting_target
from qdiff.export.translations import TARGETS
from qdiff.nn.quant_linear import QuantLinear, QuantLinearConfig
from qdiff.runs.run import Run
from qdiff.stages.export import export


@pytest.mark.slow
def test_a_graph_for_a_gpu_computes_in_float32_where_values_leave_float16(grown, tmp_path):
    """Parity, a part of the stage, runs the file: with a scale of 10^7 in float16 it would be NaN."""
    run = Run(shutil.copytree(grown, tmp_path / "run"))
    export(run, "tensorrt")
    graph = onnx.load(str(run.file("onnx", "tensorrt", "model.onnx"))).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scales = [constants.get(node.input[1]) for node in graph.node if node.op_type == "QuantizeLinear"]
    assert scales and all(scale is None or scale.data_type == onnx.TensorProto.FLOAT for scale in scales)
    assert max(onnx.numpy_helper.to_array(scale).max() for scale in scales if scale is not None) > 65504
    target = TARGETS["tensorrt"]
    assert fitting_target(target, 65504.0) is target and fitting_target(target, None) is target
    assert fitting_target(target, 65505.0) == replace(target, compute="float32")


@pytest.mark.parametrize(
    ("engine", "least"), [("onnxruntime", 80), ("openvino", 40)]
)  # OpenVINO rounds in 16 bits between
def test_scales_by_token_beyond_float16(tmp_path, engine, least):
    layer = QuantLinear(QuantLinearConfig(32, 16, False, "int8", "int8", per_token=True))
    layer.codes = torch.randint(-127, 128, (16, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    layer.scale = torch.full((16,), 2.0**-7)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([1.0, 1e3, 8e6, 9e6, 1e9, 1e20])[:, None]
    module = torch.nn.ModuleDict({"layer": layer})
    module.forward = layer.forward
    write_graph(module, (x,), None, TARGETS["onnxruntime"], ["x"]).save(str(tmp_path / "model.onnx"))
    (tmp_path / "engine").mkdir()
    chosen = choose_engine(engine)
    chosen.build(tmp_path / "model.onnx", tmp_path / "engine", BuildOptions())
    runner = chosen.load(tmp_path / "engine", BuildOptions())
    got, expected = runner({"x": x}), layer(x)
    runner.close()
    for token in range(6):
        assert sqnr_db(expected[:, token], got[:, token]) > least, token
