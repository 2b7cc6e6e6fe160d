"""The attention kernel as TensorRT plugins: through the Python files of TensorRT's own bindings, with a stand-in for their core.

What the bindings check (signatures, annotations, types, tactics, launch parameters) is checked by them. That TensorRT's parser
and launcher do as their sources and documents say is for a GPU: :func:`test_an_engine_on_a_gpu`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this system")

from qdiff.attention.kernels import aot
from qdiff.attention.kernels.sparse_attention import Launch
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.nodes import KEYS, PARTS, PLUGIN_ATTRIBUTES, PRODUCT, QUERIES, VALUES, WHOLE, AttentionNode
from qdiff.attention.numerics import NUMERICS
from qdiff.engines import trt_plugin
from qdiff.engines.base import BuildOptions, Profile
from qdiff.engines.graph import inlined
from qdiff.errors import InputError, IntegrityError, MissingDependencyError, UsageError

LARGE = AttentionNode(WHOLE, "int8_fp8", True, 12, 128, Tiling(32760, 0, 128, 128), "float16")
SMALL = AttentionNode(WHOLE, "fp8", True, 2, 64, Tiling(300, 17, 64, 64), "bfloat16")
ODD = AttentionNode(WHOLE, "int8_fp8", True, 16, 72, Tiling(4096, 0, 128, 128), "float32")
TYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}


def load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def trt(monkeypatch):
    core = load("tensorrt_core")
    made = core.install(monkeypatch)
    if made is None:
        pytest.skip("needs TensorRT's Python bindings: pip install tensorrt_cu13_bindings")
    monkeypatch.setattr(trt_plugin, "_REGISTERED", {})
    yield made
    core.uninstall()


class Made:
    """One plugin as TensorRT's builder would drive it: types, shapes, choices, then launch and kernel of one choice.

    Args:
        sizes: batch and number of listed blocks.
    """

    def __init__(self, trt, node, batch, listed, tactic=1):
        self.told = trt_plugin.interface(node)
        self.sizes = {"batch": batch, "listed": listed}
        creator = trt.get_plugin_registry().get_creator(node.name, PLUGIN_ATTRIBUTES["plugin_version"], "qdiff")
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        plugin = creator.create_plugin(
            node.name, "qdiff", trt.PluginFieldCollection(), trt.TensorRTPhase.BUILD, request
        )
        shapes = input_shapes(node)
        types = [getattr(trt.DataType, kind) for kind in input_types(node)]
        assert len(shapes) == len(types) == len(self.told.inputs)
        self.output_types = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
        builder = trt.IExprBuilder()
        exprs = [
            [builder.size(size) if isinstance(size, str) else builder.constant(size) for size in shape]
            for shape in shapes
        ]
        self.output_shapes = [
            [self.value(size) for size in shape] for shape in plugin.get_output_shapes(exprs, [], builder)
        ]
        concrete = [[self.sizes.get(size, size) for size in shape] for shape in shapes] + self.output_shapes
        descriptions = [trt.PluginTensorDesc(*one) for one in zip(concrete, [*types, *self.output_types], strict=True)]
        dynamic = [trt.DynamicPluginTensorDesc(one) for one in descriptions]
        count = len(types)
        self.choices = plugin.get_supported_format_combinations(dynamic, count)
        plugin.configure_plugin(dynamic[:count], dynamic[count:])
        self.tactics = plugin.get_valid_tactics()
        plugin.set_tactic(tactic)
        self.launch, self.scalars = Bag(), Scalars()
        plugin.get_launch_params(exprs, dynamic, count, self.launch, self.scalars, builder)
        self.name, self.ptx = plugin.get_kernel(descriptions[:count], descriptions[count:])
        self.ptx = self.ptx.decode()

    def value(self, expression):
        return expression.value(self.sizes)

    def launched(self):
        """Grid, block and shared memory, as integers."""
        axes = [f"{kind}_{axis}" for kind in ("grid", "block") for axis in "xyz"]
        return [self.value(getattr(self.launch, name).expr) for name in [*axes, "shared_mem"]]


class Bag:
    pass


class Scalars(dict):
    nbSymExprs = 0


def input_shapes(node):
    """What the graph hands to the node, from the ONNX function's own account of it."""
    heads, tiling, size, plane = node.heads, node.tiling, node.size, ("batch", node.heads)
    whole, order, by_channel = (*plane, tiling.tokens, size), (heads, tiling.ordered), (*plane, 1, size)
    if node.kind == QUERIES:
        return [whole, order]
    if node.kind == KEYS:
        return [whole, by_channel, order]
    if node.kind == VALUES:
        return [whole, by_channel, by_channel, order]
    q, k, v = (trt_plugin.interface(node.part(kind)).outputs for kind in (QUERIES, KEYS, VALUES))
    packed = [("batch", *shape) for outputs in (q, k, v) for _, kind, shape in outputs if kind == "INT8"]
    scales = [("batch", *outputs[1][2]) for outputs in (q, k)]
    return [*packed, *scales, by_channel, by_channel, order, (heads + 1,), (tiling.rows, "listed")]


def input_types(node):
    x = TYPES[node.dtype]
    return {
        QUERIES: [x, "INT32"],
        KEYS: [x, "FLOAT", "INT32"],
        VALUES: [x, "FLOAT", "FLOAT", "INT32"],
        PRODUCT: ["INT8"] * 3 + ["FLOAT"] * 4 + ["INT32"] * 3,
    }[node.kind]


def parameters(ptx):
    entry = re.search(r"\.entry \w+\(([^)]*)\)", ptx)[1]
    return re.findall(r"\.param \.(u64|b64|u32|b32)", entry)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [LARGE, SMALL, ODD], ids=["large", "small", "odd"])
def test_the_bindings_take_the_plugins_and_the_kernels_their_arguments(whole, trt):
    nodes = [whole.part(kind) for kind in PARTS]
    trt_plugin.register(trt, [node.name for node in nodes], 90)
    tiling, widths = whole.tiling, {64: (64, 64), 72: (96, 80), 128: (128, 128)}[whole.size]
    rows, columns = tiling.text_rows + tiling.rows, tiling.text_columns + tiling.columns
    programs = columns * tiling.block_k // min(64, tiling.block_k)
    expected = {
        QUERIES: (rows, [[whole.heads, rows * tiling.block_q, widths[0]], [whole.heads, rows]]),
        KEYS: (columns, [[whole.heads, columns * tiling.block_k, widths[0]], [whole.heads, columns]]),
        VALUES: (programs, [[whole.heads, columns, widths[1], tiling.block_k]]),
        PRODUCT: (rows * tiling.block_q // 64, [[whole.heads, tiling.tokens, whole.size]]),
    }
    output = getattr(trt.DataType, TYPES[whole.dtype])
    for node in nodes:
        grid, shapes = expected[node.kind]
        for batch, listed in ((1, 5), (2, 700), (5, 12345)):
            made = Made(trt, node, batch, listed)
            assert made.output_shapes == [[batch, *shape] for shape in shapes], node.kind
            assert made.output_types == ([output] if node.kind == PRODUCT else [1 + 1, 0][: len(shapes)])
            threads = int(re.search(r"\.reqntid (\d+)", made.ptx)[1])
            *launched, shared = made.launched()
            assert launched == [grid, whole.heads, batch, threads, 1, 1]
            assert 0 <= shared <= aot.SHARED_LIMITS[90]
            scalars = [made.value(made.scalars[place].expr) for place in range(made.scalars.nbSymExprs)]
            assert scalars == [tiling.tokens, tiling.text, listed][: 3 if node.kind == PRODUCT else 2]
            assert all(one.dtype == trt.PluginArgDataType.INT32 for one in made.scalars.values())
            wide, narrow, end = len(made.told.inputs), len(scalars), len(made.output_shapes)
            kinds = [kind[1:] for kind in parameters(made.ptx)]
            assert kinds == ["64"] * wide + ["32"] * narrow + ["64"] * end, "pointers, integers, pointers"
            assert f".entry {made.name}(" in made.ptx
            assert ".version 8.5" in made.ptx and ".target sm_90a" in made.ptx


@pytest.mark.parametrize(("whole", "count"), [(LARGE, 3), (SMALL, 1), (ODD, 2)], ids=["large", "small", "odd"])
def test_every_choice_has_a_kernel_of_its_own_and_one_is_for_any_launcher(whole, count, trt):
    node = whole.part(PRODUCT)
    trt_plugin.register(trt, [node.name], 90)
    made = [Made(trt, node, 2, 100, tactic) for tactic in range(1, count + 1)]
    assert all(sorted(one.tactics) == list(range(1, count + 1)) for one in made)
    assert len({one.ptx for one in made}) == count
    assert min(one.launched()[-1] for one in made) <= trt_plugin.PLAIN_LAUNCH
    for one in trt_plugin.compiled(node, 90):
        assert one.mma_sync == 0 and one.wgmma and one.spilled == 0 and one.parameters == 14
        assert one.global_scratch == one.profile_scratch == 0


def test_every_shipped_head_size_has_its_kernels():
    for launch in aot.SHIPPED:
        if launch.numerics.coded:
            tiling = Tiling(1000, 0, launch.block_q, launch.block_k)
            node = AttentionNode(PRODUCT, launch.numerics.name, True, 1, launch.size, tiling, "float16")
            assert AttentionNode.named(node.name) == node
            told = trt_plugin.interface(node)
            assert told.arguments[-2:] == ("pitch", "out") and len(told.types.split(",")) == 11


def test_only_the_types_of_the_name_are_offered(trt):
    for whole in (LARGE, SMALL):
        node = whole.part(KEYS)
        trt_plugin.register(trt, [node.name], 90)
        offered = Made(trt, node, 1, 1).choices
        assert [one.type.name for one in offered] == [TYPES[whole.dtype], "FLOAT", "INT32", "INT8", "FLOAT"]
        assert {one.format for one in offered} == {trt.TensorFormat.LINEAR}


def test_a_second_build_may_be_for_another_gpu(trt):
    node = SMALL.part(VALUES)
    trt_plugin.register(trt, [node.name], 90)
    assert ".target sm_90a" in Made(trt, node, 1, 1).ptx
    trt_plugin.register(trt, [node.name], 89)
    assert ".target sm_89" in Made(trt, node, 1, 1).ptx


def test_kernels_with_other_parameters_than_the_launch_are_refused(monkeypatch):
    node = SMALL.part(VALUES)
    (good,) = trt_plugin.compiled(node, 90)
    swapped = (*good.arguments[1::-1], *good.arguments[2:])
    monkeypatch.setattr(trt_plugin, "_packing", lambda *_: replace(good, arguments=swapped))
    with pytest.raises(IntegrityError, match="the launch gives"):
        trt_plugin.compiled(node, 90)
    monkeypatch.setattr(trt_plugin, "_packing", lambda *_: replace(good, parameters=good.parameters + aot.HIDDEN))
    with pytest.raises(IntegrityError, match="the launch gives"):
        trt_plugin.compiled(node, 90)


def test_what_there_is_no_kernel_for_is_refused_with_a_way_out(trt, monkeypatch):
    small = replace(SMALL, size=16).part(PRODUCT)
    for name, capability, part in ((small.name, 90, "16"), (SMALL.part(PRODUCT).name, 100, "10.0")):
        with pytest.raises(InputError, match=part) as caught:
            trt_plugin.register(trt, [name], capability)
        assert 'flags={"attention": "plain"}' in str(caught.value.fix)
    monkeypatch.delattr(trt, "QuickPluginCreationRequest")
    with pytest.raises(MissingDependencyError, match="ahead-of-time"):
        trt_plugin.register(trt, [], 90)


def test_one_size_is_demanded():
    fixed = Profile("one", {"x": ((2, 4),) * 3})
    trt_plugin.require_static([fixed])
    ranged = Profile("wide", {"x": ((1, 4), (2, 4), (8, 4))})
    for profiles, part in (([fixed, fixed], "2 profiles"), ([ranged], "x from"), ([], "0 profiles")):
        with pytest.raises(UsageError, match=part) as caught:
            trt_plugin.require_static(profiles)
        assert "profiles=" in str(caught.value.fix)


class Attention(torch.nn.Module):
    def __init__(self, order, tiling, numerics):
        super().__init__()
        self.register_buffer("order", order)
        self.tiling, self.numerics = tiling, numerics

    def forward(self, q, k, v, blocks, bounds):
        cut = (self.tiling.text, self.tiling.block_q, self.tiling.block_k)
        return torch.ops.qdiff.sparse_attention(
            q, k, v, self.order, blocks, bounds, 0, *cut, self.numerics, q.shape[-1] ** -0.5
        )


class Graph:
    """The exported graph of one attention, and what it is given."""

    def __init__(self, path, numerics="int8_fp8", size=64, tiling=Tiling(300, 17, 64, 64), batch=2):  # noqa: B008
        import qdiff.attention.operator  # noqa: F401
        from qdiff.export.onnx_graph import write_graph
        from qdiff.export.translations import TARGETS

        generator = torch.Generator().manual_seed(0)
        self.path, self.tiling, self.numerics = path, tiling, numerics
        shape = (batch, 2, tiling.tokens, size)
        self.q, self.k, self.v = (torch.randn(shape, generator=generator).half() for _ in range(3))
        self.order = torch.stack([torch.randperm(tiling.ordered, generator=generator) for _ in range(2)]).int()
        masks = torch.zeros(2, tiling.rows, tiling.columns, dtype=torch.bool)
        masks[0, :, :2] = masks[1, :, -3:] = True
        self.lists = BlockLists.of_masks(masks)
        sizes = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("listed", min=2, max=1000)
        shapes = ({0: sizes[0]}, {0: sizes[0]}, {0: sizes[0]}, {1: sizes[1]}, None)
        values = (self.q, self.k, self.v, self.lists.blocks, self.lists.bounds)
        module, names = Attention(self.order, tiling, numerics).eval(), ["q", "k", "v", "blocks", "bounds"]
        write_graph(module, values, shapes, TARGETS["tensorrt"], names).save(str(path))
        self.inputs = dict(zip(names, values, strict=True))
        self.profile = Profile("one", {name: (tuple(value.shape),) * 3 for name, value in self.inputs.items()})

    def as_good_as_torch(self, got):
        """Whether ``got`` is as near to exact attention as torch with the same numerics. To one another they are not: noise has
        the largest errors of codes there are, 4 %, and 16 bit around them turns some of the roundings."""
        from qdiff.attention import gathered, oracle

        floats = (self.q.float(), self.k.float(), self.v.float(), self.order, self.lists, self.tiling)
        exact = oracle.attend(*floats)
        ours, theirs = (
            float((x.double() - exact).norm() / exact.norm())
            for x in (got, gathered.attend(*floats, NUMERICS[self.numerics]))
        )
        return 0 < ours < 1.05 * theirs


def test_the_file_asks_the_parser_for_plugins_and_runs_without(tmp_path):
    """One file: four nodes that a plugin may compute, in a function whose plain form the ONNX checker, ONNX Runtime and OpenVINO
    take (tests/attention/test_executors.py compares what they compute)."""
    import onnx

    graph = Graph(tmp_path / "model.onnx")
    onnx.checker.check_model(str(graph.path), full_check=True)
    names = trt_plugin.taken_over(graph.path)
    assert sorted(AttentionNode.named(name).kind for name in names) == sorted(PARTS)
    with inlined(graph.path, names) as path:
        model = onnx.load(str(path))
    assert not model.functions, "nothing to fall back to without a word"
    nodes = {node.op_type: node for node in model.graph.node if node.domain == "qdiff"}
    assert sorted(nodes) == sorted(names)
    for name, node in nodes.items():
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert given == {"plugin_namespace": b"qdiff", "plugin_version": b"1", "aot": 1}
        told = trt_plugin.interface(AttentionNode.named(name))
        assert (len(node.input), len(node.output)) == (len(told.inputs), len(told.outputs))
    producer = {output: node for node in model.graph.node for output in node.output}
    product = next(node for name, node in nodes.items() if name.startswith(PRODUCT))
    made_by = [AttentionNode.named(producer[name].op_type) for name in product.input[:5]]
    assert [one.kind for one in made_by] == [QUERIES, KEYS, VALUES, QUERIES, KEYS]
    with inlined(graph.path) as path:
        plain = onnx.load(str(path))
    assert not plain.functions and all(node.domain != "qdiff" for node in plain.graph.node)


def test_openvino_takes_the_file(tmp_path):
    openvino = pytest.importorskip("openvino")
    graph = Graph(tmp_path / "model.onnx")
    with inlined(graph.path) as path:
        model = openvino.Core().compile_model(
            openvino.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
    given = {name: value.numpy() for name, value in graph.inputs.items()}
    assert graph.as_good_as_torch(torch.from_numpy(model(given)[0]))


def test_numerics_without_a_kernel_stay_one_function(tmp_path):
    assert trt_plugin.taken_over(Graph(tmp_path / "model.onnx", "float").path) == ()


def test_the_engine_registers_what_the_graph_has(tmp_path, trt, monkeypatch):
    """Up to the builder: which plugins are there when the file is parsed, and what the parser is given."""
    from qdiff.engines import choose_engine, trt_engine

    graph, engine, seen = Graph(tmp_path / "model.onnx"), choose_engine("tensorrt"), []
    monkeypatch.setattr(type(engine), "backend", lambda self: trt)
    monkeypatch.setattr(type(engine), "_gpu", lambda self: "9.0")
    monkeypatch.setattr(trt_engine, "build_plan", lambda *given: seen.append(given) or (memoryview(b"plan"), {}))
    engine.build(graph.path, tmp_path, BuildOptions((graph.profile,)))
    creators = trt.get_plugin_registry().creators
    assert sorted(name for name, _, _ in creators) == sorted(seen[0][-1]) == sorted(trt_plugin.taken_over(graph.path))
    engine.build(graph.path, tmp_path, BuildOptions((graph.profile,), flags={"attention": "plain"}))
    assert seen[1][-1] == ()
    ranged = replace(graph.profile, ranges={**graph.profile.ranges, "blocks": ((5, 2), (5, 4), (5, 9))})
    with pytest.raises(UsageError, match="blocks from"):
        engine.build(graph.path, tmp_path, BuildOptions((ranged,)))


def test_lists_are_padded_to_what_the_engine_is_for():
    """After the last bound comes what nobody reads; an engine of any width gets them as they are."""
    from types import SimpleNamespace

    from qdiff.attention.schedule import Schedule
    from qdiff.engines.inputs import TensorSpec
    from qdiff.engines.scheduled import ScheduledRunner
    from qdiff.plan.attention_plan import BLOCKS, BOUNDS

    tiling = Tiling(256, 0, 64, 64)
    masks = torch.eye(4, dtype=torch.bool).expand(2, -1, -1)
    schedule = Schedule([0.9], [BlockLists.full(2, tiling), BlockLists.of_masks(masks)])
    for width, wanted in ((8, (8, 8)), (None, (8, 2))):
        seen = []
        specs = (TensorSpec(BLOCKS, "int32", (4, width)), TensorSpec(BOUNDS, "int64", (3,)))
        inner = SimpleNamespace(
            inputs=specs, outputs=lambda inputs, seen=seen: seen.append(inputs) or [], keep=lambda names: None
        )
        runner = ScheduledRunner(inner, schedule)
        for timestep in (950.0, 100.0, 50.0):
            runner.outputs({"timestep": torch.tensor([timestep])})
        assert [one[BLOCKS].shape[1] for one in seen] == [*wanted, wanted[1]]
        assert torch.equal(seen[1][BLOCKS][:, :2], schedule.lists[1].blocks) and seen[1][BOUNDS].tolist() == [0, 1, 2]
        assert (seen[1][BLOCKS] is seen[2][BLOCKS]) and (width is None or not seen[1][BLOCKS][:, 2:].any())


def test_the_usual_profile_of_such_an_engine_has_one_size(monkeypatch):
    from types import SimpleNamespace

    from qdiff.engines.plan_profiles import with_lists
    from qdiff.engines.profiles import make_profile
    from qdiff.plan.attention_plan import BLOCKS, BOUNDS

    attention = SimpleNamespace(heads=4, grid=(4, 16, 16), block_k=128, block_q=128, density=0.3)
    axes = {"hidden_states": ("batch", 16, 8), "text": ("batch", "tokens", 8)}
    sizes = {"batch": (2, 2, 2), "tokens": (77, 77, 77)}
    profile = make_profile("default", axes, sizes)
    fixed = with_lists(attention, profile, one_size=True)
    trt_plugin.require_static([fixed])
    assert fixed.ranges[BLOCKS] == ((8, 32),) * 3 and fixed.ranges[BOUNDS] == ((5,),) * 3
    with pytest.raises(UsageError, match=BLOCKS):
        trt_plugin.require_static([with_lists(attention, profile)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("numerics", ["int8_fp8", "fp8"])
def test_an_engine_on_a_gpu(numerics, size, tmp_path):
    """Parser, launcher, shared memory above 48 KiB, INT8 names of FP8 codes: whatever the tests above take from documents."""
    pytest.importorskip("tensorrt", reason="needs TensorRT: pip install 'qdiff-deploy[tensorrt]'")
    from qdiff.engines import choose_engine

    engine, graph = (
        choose_engine("tensorrt"),
        Graph(tmp_path / "model.onnx", numerics, size, Tiling(1000, 20, 128, 128)),
    )
    (tmp_path / "engine").mkdir()
    options = BuildOptions((graph.profile,))
    facts = engine.build(graph.path, tmp_path / "engine", options)
    assert sum(count for kind, count in facts["layers"].items() if "plugin" in kind) == 4
    with engine.load(tmp_path / "engine", options) as runner:
        for _ in range(3):
            assert graph.as_good_as_torch(runner(graph.inputs).cpu())
        runner(graph.inputs)
        before = torch.cuda.mem_get_info()[0]
        for _ in range(100):
            runner(graph.inputs)
        torch.cuda.synchronize()
        assert before - torch.cuda.mem_get_info()[0] < 2**20, "memory is lost from call to call"


def test_launches_follow_the_tiling():
    found = trt_plugin.launches(LARGE.part(PRODUCT), 90)
    assert [one.keys for one in found] == [64, 128, 32] and {one.scale for one in found} == {1.0}
    assert all(one.matrix and one.partial == (32760 % 128 != 0) for one in found)
    assert isinstance(found[0], Launch)
