"""What every registered engine has to do; a new engine joins by being registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.engines import ENGINES, BuildOptions, Engine, ModuleRunner, choose_engine, describe
from qdiff.errors import InputError, MissingDependencyError, UsageError

ALL = sorted(ENGINES)
BUILT = [name for name in ALL if not ENGINES[name]().runs_module]
RUNNABLE = [name for name in BUILT if ENGINES[name]().missing() is None]
MODULES = [name for name in ALL if ENGINES[name]().runs_module]


@pytest.mark.parametrize("name", ALL)
def test_says_who_it_is(name):
    engine = choose_engine(name)
    assert engine.name == name and engine.title and isinstance(engine, Engine)
    assert engine.target in (None, "tensorrt", "onnxruntime")
    if engine.missing_for_build() is None:
        assert engine.version()
    else:
        assert engine.missing()
        with pytest.raises(MissingDependencyError, match="pip install") as caught:
            engine.version()
        assert caught.value.exit_code == 4


def test_the_build_stage_names_no_engine():
    """What an engine cannot build is said by the engine itself (``refuses``, ``profile_for``): the stage takes any."""
    from qdiff.stages import build

    text = Path(build.__file__).read_text()
    assert [name for name in ALL if f'"{name}"' in text] == []


@pytest.mark.parametrize("name", BUILT)
def test_flags_are_checked(name):
    engine = choose_engine(name)
    for flag, values in engine.known_flags.items():
        assert engine.flag(BuildOptions(), flag) == values[0]
        with pytest.raises(UsageError, match="known"):
            engine.flag(BuildOptions(flags={flag: "no such value"}), flag)
        with pytest.raises(UsageError, match="unknown flag"):
            engine.flag(BuildOptions(flags={flag + "x": values[0]}), flag)


@pytest.mark.parametrize("name", ALL)
def test_the_way_that_an_engine_does_not_have_says_so(name, tmp_path):
    engine = choose_engine(name)
    with pytest.raises(UsageError):
        if engine.runs_module:
            engine.build(tmp_path / "model.onnx", tmp_path, BuildOptions())
        else:
            engine.load_module(torch.nn.Identity())


def _exact(engine):
    """Flags that keep unquantized layers in float32: 16 bit has its own error."""
    return {"precision": "f32"} if "precision" in engine.known_flags else {}


@pytest.mark.parametrize("name", RUNNABLE)
def test_builds_loads_and_agrees_with_numpy(name, graph, profile, inputs, tmp_path):
    folder = tmp_path / "engine"
    folder.mkdir()
    engine = choose_engine(name)
    options = BuildOptions(profiles=(profile,), threads=1, flags=_exact(engine))
    facts = engine.build(graph.path, folder, options)
    assert facts["bytes"] > 0
    runner = engine.load(folder, options)
    assert [spec.name for spec in runner.inputs] == ["hidden_states", "timestep", "mask"]
    kept = []
    for batch in (2, 1, 3, 2):  # seen and unseen shapes, more of them than variants are kept
        given = inputs(batch, seed=batch)
        out = runner(given)
        assert out.dtype == torch.float32 and out.shape == (batch, 64) and out.device.type == "cpu"
        np.testing.assert_allclose(out.numpy(), graph.expected(**given), atol=0.03)  # one step of the second Q
        assert np.abs(out.numpy() - graph.expected(**given)).mean() < 2e-3
        kept.append((out, out.clone()))
    assert all(torch.equal(out, copy) for out, copy in kept)  # an output is not overwritten by a later call
    runner.close()


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("threads", [1, 2])
def test_adds_no_rounding_of_its_own(name, threads, inputs, tmp_path, write_graph):
    """Weight-only layers keep float activations: backends would quantize them at run time if they were let."""
    weights_only = write_graph(tmp_path / "onnx", activations=False)
    engine = choose_engine(name)
    options = BuildOptions(threads=threads, flags=_exact(engine))
    engine.build(weights_only.path, tmp_path, options)
    given = inputs(2)
    out = engine.load(tmp_path, options)(given)
    np.testing.assert_allclose(out.numpy(), weights_only.expected(**given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNNABLE)
def test_refuses_wrong_inputs_in_the_models_words(name, graph, inputs, tmp_path):
    engine = choose_engine(name)
    engine.build(graph.path, tmp_path, BuildOptions(threads=1))
    runner = engine.load(tmp_path, BuildOptions(threads=1))
    given = inputs(2)
    wrong = {
        "was not given": {key: value for key, value in given.items() if key != "mask"},
        "unknown engine input 'maks'": {**given, "maks": given["mask"]},
        "axis 1 has to be 64": {**given, "hidden_states": torch.zeros(2, 63)},
        "was given 3 axes": {**given, "hidden_states": torch.zeros(2, 1, 64)},
        "torch.float32 values": {**given, "mask": given["mask"].float()},
    }
    for message, bad in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            runner(bad)
        assert caught.value.fix
    with pytest.raises(InputError):
        runner({**given, "timestep": torch.zeros(3)})  # another batch than the latent's
    assert runner(given).shape == (2, 64)  # and goes on working


@pytest.mark.parametrize("name", RUNNABLE)
def test_casts_to_what_the_graph_declares(name, inputs, tmp_path, write_graph):
    half = write_graph(tmp_path / "onnx", latent="FLOAT16")
    engine = choose_engine(name)
    engine.build(half.path, tmp_path, BuildOptions(threads=1))
    runner = engine.load(tmp_path, BuildOptions(threads=1))
    given = inputs(2)
    assert runner.inputs[0].dtype == "float16"
    rounded = {**given, "hidden_states": given["hidden_states"].half().float()}
    np.testing.assert_allclose(runner(given).numpy(), half.expected(**rounded), atol=0.03)


@pytest.mark.parametrize("name", BUILT)
def test_refuses_what_is_not_a_graph(name, tmp_path):
    engine = choose_engine(name)
    if engine.missing_for_build():
        pytest.skip(f"{name} cannot be built here: {engine.missing_for_build()}")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x3a\x05abcd")
    with pytest.raises(Exception) as caught:
        engine.build(tmp_path / "model.onnx", tmp_path, BuildOptions(compute_capability="12.0"))
    assert getattr(caught.value, "exit_code", 1) in (3, 5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_a_module(name, dtype):
    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, hidden_states, timestep, return_dict=True):
            assert hidden_states.dtype == self.linear.weight.dtype
            out = self.linear(hidden_states) * timestep[:, None].to(hidden_states.dtype)
            return {"sample": out} if return_dict else (out,)

    module = Backbone().to(dtype)
    runner = choose_engine(name).load_module(module)
    assert isinstance(runner, ModuleRunner)
    x, t = torch.randn(2, 8), torch.tensor([1.0, 2.0])
    out = runner({"hidden_states": x, "timestep": t})
    assert out.dtype == torch.float32
    assert torch.equal(out, module(x.to(dtype), t, return_dict=False)[0].float())


def test_the_default_is_the_best_that_can_run_here():
    rows = describe()
    assert [row.name for row in rows] == sorted(ENGINES, key=lambda name: -choose_engine(name).rank)
    assert choose_engine().name == next(row.name for row in rows if row.available)
    for row in rows:
        assert (row.why_not is None) == row.available and (row.version is None) != row.can_build
    with pytest.raises(UsageError, match="openvino"):
        choose_engine("openvin")


def test_importing_engines_loads_no_library():
    heavy = ["torch", "onnx", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt", "diffusers"]
    code = f"import sys, qdiff.engines; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
