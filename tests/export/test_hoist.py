"""What does not change in the sampler's loop leaves it: the values stay, bit for bit, and nothing is computed that was known."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qdiff.engines import BuildOptions, choose_engine
from qdiff.engines.base import Profile, Runner
from qdiff.engines.hoisted import FEW, HoistedRunner
from qdiff.engines.inputs import TensorSpec
from qdiff.engines.parts import options_for
from qdiff.errors import InputError, UsageError
from qdiff.export.hoist import write_parts
from qdiff.export.onnx_graph import write_graph
from qdiff.export.translations import TARGETS
from qdiff.graphs.parts import parts_of, read

SOURCES = {"prompt": frozenset({"text", "mask"}), "timestep": frozenset({"t"})}
NAMES = ["x", "text", "mask", "t"]


class Backbone(nn.Module):
    """A latent that attends to a text, with an embedding of the timestep that scales it and a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(24, 32), nn.Linear(24, 32)
        self.both = nn.Linear(24, 32)  # of text and timestep: cannot leave

    def forward(self, x, text, mask, t):
        embedded = self.time((t[:, None] * torch.arange(16)).sin())
        bias = (1 - mask.float())[:, None] * -1e4
        k, v = self.k(text), self.v(text)
        q = self.q(x) * (1 + embedded[:, None])
        attended = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        mixed = self.both(text * t[:, None, None]).mean(dim=1, keepdim=True)
        return x + attended + mixed + embedded[:, None]


def example(batch: int = 2, cells: int = 5, tokens: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(cells)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[:, tokens // 2 :] = 0
    return {
        "x": torch.randn(batch, cells, 32, generator=generator),
        "text": torch.randn(batch, tokens, 24, generator=generator),
        "mask": mask,
        "t": torch.rand(batch, generator=generator),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    module, values = Backbone().eval(), tuple(example().values())
    batch, cells, tokens = (torch.export.Dim(name, min=2) for name in ("batch", "cells", "tokens"))
    axes = ({0: batch, 1: cells}, {0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch})
    program = write_graph(module, values, axes, TARGETS["onnxruntime"], NAMES)
    path = tmp_path_factory.mktemp("hoist") / "model.onnx"
    program.save(str(path), external_data=True)
    files = write_parts(path, SOURCES)
    assert [file.stem for file in files] == ["step", "prompt", "timestep"]
    return module, path


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feed), strict=True))


@pytest.mark.parametrize("sizes", [(2, 5, 7), (3, 9, 4)])
def test_the_parts_together_are_the_whole_bit_for_bit(written, sizes):
    module, path = written
    inputs = example(*sizes)
    carried = {}
    for part in ("prompt", "timestep"):
        onnx.checker.check_model(str(path.with_name(f"{part}.onnx")))
        carried |= run(path.with_name(f"{part}.onnx"), inputs)
    got = run(path.with_name("step.onnx"), inputs | {name: torch.from_numpy(x) for name, x in carried.items()})
    whole = run(path, inputs)["prediction"]
    assert (got["prediction"] == whole).all()
    torch.testing.assert_close(torch.from_numpy(whole), module(*inputs.values()), atol=1e-5, rtol=1e-4)


def test_products_of_the_prompt_and_of_the_timestep_are_in_their_parts_and_only_there(written):
    _, path = written

    def products(name: str) -> int:
        graph = onnx.load(str(path.with_name(f"{name}.onnx")), load_external_data=False).graph
        return sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)

    counts = {name: products(name) for name in ("model", "step", "prompt", "timestep")}
    assert counts == {"model": 8, "step": 4, "prompt": 2, "timestep": 2}
    prompt, timestep = (read(path.with_name(f"{name}.onnx")) for name in ("prompt", "timestep"))
    assert list(prompt.inputs) == ["text"] and len(prompt.outputs) == 2
    assert list(timestep.inputs) == ["t"] and len(timestep.outputs) == 1, "one value with two readers is carried once"


def test_files_of_the_cut_hold_no_second_copy_of_the_weights(written):
    _, path = written
    assert {file.name for file in path.parent.iterdir()} == {
        f"{n}.onnx" for n in ("model", "step", "prompt", "timestep")
    } | {"model.onnx.data"}
    assert all(path.with_name(f"{n}.onnx").stat().st_size < 40_000 for n in ("step", "prompt", "timestep"))


def test_nothing_is_cut_where_nothing_can_leave(tmp_path):
    class Plain(nn.Module):
        def forward(self, x, text):
            return x + text.mean(dim=1, keepdim=True)

    program = write_graph(
        Plain(), (torch.randn(2, 3, 4), torch.randn(2, 5, 4)), None, TARGETS["onnxruntime"], ["x", "text"]
    )
    program.save(str(tmp_path / "model.onnx"), external_data=True)
    assert write_parts(tmp_path / "model.onnx", SOURCES) == [] and parts_of(tmp_path / "model.onnx") == []


def profile(**changes: tuple[int, int, int]) -> Profile:
    sizes = {"batch": (2, 2, 4), "cells": (2, 5, 9), "tokens": (2, 7, 16)} | changes
    axes = {"x": ("batch", "cells", 32), "text": ("batch", "tokens", 24), "mask": ("batch", "tokens"), "t": ("batch",)}
    ranges = {
        name: tuple(tuple(sizes[a][place] if isinstance(a, str) else a for a in named) for place in range(3))
        for name, named in axes.items()
    }
    return Profile("default", ranges)  # type: ignore[arg-type]


def test_profiles_have_ranges_for_what_is_carried(written, monkeypatch):
    _, path = written
    whole, (step, *_) = read(path), parts_of(path)
    options = options_for(choose_engine("openvino"), BuildOptions((profile(),)), whole, step)
    (made,) = options.profiles
    once = {
        graph.name: options_for(choose_engine("openvino"), BuildOptions(), whole, graph).flags
        for graph in parts_of(path)
    }
    assert once == {"step": {}, "prompt": {"precision": "f32"}, "timestep": {"precision": "f32"}}
    carried = [name for name in step.inputs if name not in NAMES]
    keys = [name for name in carried if made.ranges[name][1] in ((2, 7, 32), (2, 32, 7))]
    assert len(keys) == 2 and made.ranges[keys[0]][0][0] == 2 and 16 in made.ranges[keys[0]][2]
    formulas = {"x": ("batch", "cells"), "y": ("2*batch", "cells//2 + 1")}
    from qdiff.engines import parts

    low, usual, high = parts._completed(
        Profile("p", {"x": ((1, 4), (2, 6), (3, 8))}), {"x": formulas["x"]}, formulas
    ).ranges["y"]
    assert (low, usual, high) == ((2, 3), (4, 4), (6, 5))
    with pytest.raises(UsageError, match="says nothing about the axis 'frames'"):
        parts._completed(Profile("p", {"x": ((1, 4), (2, 6), (3, 8))}), {"x": formulas["x"]}, {"z": ("frames",)})


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_call_a_part_once_for_each_new_input(written, tmp_path, name):
    module, path = written
    engine, whole = choose_engine(name), read(path)
    options, runners = (
        BuildOptions((profile(),), threads=1, flags={"precision": "f32"} if name == "openvino" else {}),
        [],
    )
    for graph in parts_of(path):
        folder = tmp_path / graph.name
        folder.mkdir()
        engine.build(graph.path, folder, options_for(engine, options, whole, graph))
        runners.append((engine.load(folder, options_for(engine, options, whole, graph)), graph.outputs))
    (step, _), *parts = runners
    runner = HoistedRunner(step, parts)
    assert {spec.name for spec in runner.inputs} == set(NAMES)
    inputs = example()
    for timestep in (0.9, 0.5, 0.9, 0.5):
        inputs |= {"x": inputs["x"] + 1, "t": torch.full((2,), timestep)}
        torch.testing.assert_close(runner(inputs), module(*inputs.values()), atol=1e-4, rtol=1e-4)
    assert [part.calls for part in runner.parts] == [1, 2]
    inputs["text"][0, 0, 0] += 1  # in place: what was kept must not be taken for it
    torch.testing.assert_close(runner(inputs), module(*inputs.values()), atol=1e-4, rtol=1e-4)
    assert [part.calls for part in runner.parts] == [2, 2]
    for _ in range(2):  # two prompts that take turns: what an engine holds of one is not taken for the other
        for sign in (1, -1):
            turn = inputs | {"text": sign * inputs["text"]}
            torch.testing.assert_close(runner(turn), module(*turn.values()), atol=1e-4, rtol=1e-4)
    assert [part.calls for part in runner.parts] == [3, 2]
    with pytest.raises(InputError, match="was not given"):
        runner({"x": inputs["x"]})
    runner.close()


class _Echo(Runner):
    inputs = (TensorSpec("text", "float32", (None, None)),)

    def __call__(self, inputs):
        return inputs["text"]


def test_few_large_results_are_kept():
    class Sum(_Echo):
        inputs = (TensorSpec("carried", "float32", (None, None)),)

        def __call__(self, inputs):
            return inputs["carried"].sum()

    runner = HoistedRunner(Sum(), [(_Echo(), ["carried"])])
    for number in (0, 1, 0, 1, 2, 0):  # two branches of guidance, then another prompt
        assert float(runner({"text": torch.full((200, 200), float(number))})) == 40_000 * number
    assert runner.parts[0].calls == 4 and len(runner.parts[0]._kept) == FEW
