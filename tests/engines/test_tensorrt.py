"""TensorRT-RTX builds real engines here, without a GPU; running them says what it needs."""

from __future__ import annotations

import pytest
import torch

from qdiff.engines import BuildOptions, Profile, choose_engine
from qdiff.engines.cache import build_cached, load_trusted
from qdiff.engines.trt_run import choose_profile
from qdiff.errors import InputError, MissingDependencyError, UsageError
from qdiff.events import listening

rtx = choose_engine("tensorrt_rtx")
needs_rtx = pytest.mark.skipif(
    rtx.missing_for_build() is not None, reason=f"needs TensorRT-RTX: {rtx.missing_for_build()}"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where no GPU is")


@needs_rtx
@no_gpu
@pytest.mark.parametrize("target", ["8.9", "12.0"])
def test_builds_for_a_named_gpu_and_says_what_running_needs(target, graph, profile, root):
    options = BuildOptions(profiles=(profile,), compute_capability=target)
    events = []
    with listening(events.append):
        folder, facts, was_cached = build_cached(rtx, graph.path, root, options)
    assert not was_cached and folder.name.startswith("tensorrt_rtx-")
    assert facts["bytes"] == (folder / "model.plan").stat().st_size > 10_000
    assert facts["compute_capability"] == target
    assert facts["layers"]["matrix_multiply"] == 2 and facts["layers"]["quantize"] == 2
    assert facts["tensors"]["int8"] >= 2
    assert events and events[-1].finished
    assert build_cached(rtx, graph.path, root, options).was_cached
    with pytest.raises(
        MissingDependencyError, match=f"the engine is built; running it needs an NVIDIA GPU.*{target}"
    ) as caught:
        load_trusted(rtx, folder)
    assert caught.value.exit_code == 4 and caught.value.fix
    assert rtx.missing() and rtx.missing_for_build() is None


@needs_rtx
def test_several_profiles_go_into_one_engine(graph, profile, tmp_path):
    static = Profile("one", {name: (shapes[0],) * 3 for name, shapes in profile.ranges.items()})
    rtx.build(graph.path, tmp_path, BuildOptions((profile, static), "12.0", flags={"level": "0"}))
    assert (tmp_path / "model.plan").stat().st_size > 10_000


@needs_rtx
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (BuildOptions((), "12.0"), UsageError, "dynamic sizes"),
        (
            BuildOptions((Profile("p", {"hidden_states": ((1, 64),) * 3}),), "12.0"),
            UsageError,
            "no shape for timestep, mask",
        ),
        (BuildOptions((), "9.0"), UsageError, "no engines for compute capability '9.0'"),
        (BuildOptions((), "twelve"), UsageError, "8.9"),
    ],
)
def test_wrong_options_are_named(options, error, message, graph, tmp_path):
    with pytest.raises(error, match=message):
        rtx.build(graph.path, tmp_path, options)
    assert not (tmp_path / "model.plan").exists()


@needs_rtx
def test_a_profile_that_contradicts_the_graph(graph, profile, tmp_path):
    ranges = {**profile.ranges, "hidden_states": ((1, 32), (2, 32), (4, 32))}
    with pytest.raises((UsageError, InputError), match="hidden_states"):
        rtx.build(graph.path, tmp_path, BuildOptions((Profile("bad", ranges),), "12.0"))


@needs_rtx
def test_the_parsers_refusal_names_the_node(graph, profile, tmp_path):
    import onnx

    model = onnx.load(graph.path)
    node = next(node for node in model.graph.node if node.name == "matmul_1")
    node.op_type, node.domain = "SparseDream", "nobody"
    model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    broken = tmp_path / "broken"
    broken.mkdir()
    onnx.save(model, broken / "model.onnx")
    with pytest.raises(InputError, match="matmul_1.*SparseDream"):
        rtx.build(broken / "model.onnx", tmp_path, BuildOptions((profile,), "12.0"))


@needs_rtx
@no_gpu
def test_without_a_gpu_the_target_has_to_be_named(graph, profile, root):
    with pytest.raises(MissingDependencyError, match="no GPU here to build for") as caught:
        build_cached(rtx, graph.path, root, BuildOptions((profile,)))
    assert "compute_capability=" in str(caught.value)
    assert not list(root.glob("*")) if root.exists() else True


def test_choose_profile():
    small = Profile("small", {"x": ((1, 8), (2, 8), (4, 8)), "t": ((1,), (2,), (4,))})
    exact = Profile("exact", {"x": ((3, 8),) * 3, "t": ((3,),) * 3})
    profiles = [small, exact]
    assert choose_profile(profiles, {"x": (1, 8), "t": (1,)}) == 0
    assert choose_profile(profiles, {"x": (3, 8), "t": (3,)}) == 1  # its usual shape, though the first takes it as well
    assert choose_profile([], {"x": (9, 9)}) == 0
    for shapes in ({"x": (5, 8), "t": (5,)}, {"x": (2, 9), "t": (2,)}, {"x": (2,), "t": (2,)}):
        with pytest.raises(InputError, match="small: x \\[1, 8\\]..\\[4, 8\\]"):
            choose_profile(profiles, shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_runs_on_a_gpu(name, graph, profile, root, inputs):
    engine = choose_engine(name)
    if engine.missing():
        pytest.skip(f"{name} cannot run here: {engine.missing()}")
    static = Profile("one", {key: (shapes[0],) * 3 for key, shapes in profile.ranges.items()})
    folder, *_ = build_cached(engine, graph.path, root, BuildOptions((profile, static)))
    for _ in range(2):  # the second time with the kernels kept from the first
        runner = load_trusted(engine, folder)
        for batch in (2, 1, 4):
            given = inputs(batch)
            out = runner({key: value.cuda() for key, value in given.items()})
            assert out.is_cuda and out.dtype == torch.float32
            assert (out.cpu() - torch.from_numpy(graph.expected(**given))).abs().max() < 0.05
        with pytest.raises(InputError, match="no profile"):
            runner(inputs(5))
        runner.close()
