"""A small INT8 Q/DQ graph with external weights and a dynamic batch: the form that export gives, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.engines import Profile
from qdiff.engines.profiles import make_profile

WIDTH, HIDDEN = 64, 128
AXES = {"hidden_states": ("batch", WIDTH), "timestep": ("batch",), "mask": ("batch", 3)}


def _quantized(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.clip(np.round(values / scale), -128, 127) * scale


@dataclass(frozen=True)
class Graph:
    """The graph's file, and what it computes in NumPy."""

    path: Path
    weights: tuple[np.ndarray, np.ndarray]
    activations: bool = True

    def expected(self, hidden_states: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        first, second = (_quantized(w, np.abs(w).max(0) / 127) for w in self.weights)
        latent = hidden_states.numpy()
        hidden = np.maximum((_quantized(latent, 0.03) if self.activations else latent) @ first, 0)
        out = (_quantized(hidden, 0.03) if self.activations else hidden) @ second
        return out + timestep.numpy()[:, None].astype(np.float32) + mask.numpy().sum(1, keepdims=True)


def _write_graph(
    folder: Path, seed: int = 0, external: str = "model.onnx.data", latent: str = "FLOAT", activations: bool = True
) -> Graph:
    """Writes the graph: two quantized MatMuls (or only their weights), plus the timestep, plus the sum of the mask."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = (
        rng.normal(0, 0.2, (WIDTH, HIDDEN)).astype(np.float32),
        rng.normal(0, 0.2, (HIDDEN, WIDTH)).astype(np.float32),
    )
    tensors = [numpy_helper.from_array(np.float32(0.03), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    nodes = []
    for index, weight in enumerate(weights):
        scale = (np.abs(weight).max(0) / 127).astype(np.float32)
        tensors.append(
            numpy_helper.from_array(np.clip(np.round(weight / scale), -127, 127).astype(np.int8), f"w{index}")
        )
        tensors.append(numpy_helper.from_array(scale, f"s{index}"))
        tensors.append(numpy_helper.from_array(np.zeros_like(scale, dtype=np.int8), f"z{index}"))
        source = "latent" if index == 0 else "active"
        if activations:
            nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"q{index}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{index}", "scale", "zero"], [f"dq{index}"]))
            source = f"dq{index}"
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{index}", f"s{index}", f"z{index}"], [f"dw{index}"], axis=1),
            helper.make_node("MatMul", [source, f"dw{index}"], [f"y{index}"], name=f"matmul_{index}"),
        ]
        if index == 0:
            nodes.append(helper.make_node("Relu", ["y0"], ["active"]))
    nodes.insert(0, helper.make_node("Cast", ["hidden_states"], ["latent"], to=TensorProto.FLOAT))
    tensors.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "one"))
    nodes += [
        helper.make_node("Unsqueeze", ["timestep", "one"], ["t"]),
        helper.make_node("Cast", ["mask"], ["fmask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["fmask", "one"], ["m"], keepdims=1),
        helper.make_node("Add", ["y1", "t"], ["yt"]),
        helper.make_node("Add", ["yt", "m"], ["sample"]),
    ]
    inputs = [
        helper.make_tensor_value_info("hidden_states", getattr(TensorProto, latent), ["batch", WIDTH]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", 3]),
    ]
    outputs = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", WIDTH])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=512)
    return Graph(path, weights, activations)


def _make_inputs(batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs as a pipeline gives them: integer timesteps, a mask of ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, WIDTH, generator=generator),
        "timestep": torch.full((batch,), 7),
        "mask": torch.tensor([[1, 1, 0]] * batch),
    }


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder of the test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("QDIFF_HOME", str(home))
    return home


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return _write_graph(tmp_path / "run" / "onnx" / "onnxruntime")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "engines"


@pytest.fixture
def profile() -> Profile:
    return make_profile("mlp", AXES, {"batch": (1, 2, 4)})


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    return _make_inputs


@pytest.fixture
def write_graph() -> Callable[..., Graph]:
    return _write_graph
