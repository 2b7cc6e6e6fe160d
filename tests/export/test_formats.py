"""Every format that a target claims is written, found again in the file, and computes what torch computes.

All cells of a target are layers of one module, so each target is traced once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qdiff.engines import BuildOptions, Profile, choose_engine, integer_products
from qdiff.errors import InputError
from qdiff.evaluation.metrics import sqnr_db
from qdiff.export import support
from qdiff.export.codes import bytes_as_codes
from qdiff.export.emulation import emulated
from qdiff.export.onnx_graph import InComputeDtype, write_graph
from qdiff.export.reading import Graph, Realised
from qdiff.export.translations import TARGETS, Target
from qdiff.formats.packing import pack, unpack
from qdiff.formats.table import FORMATS, format_named
from qdiff.formats.weight import quantize_weight
from qdiff.graphs import walk
from qdiff.nn.quant_linear import QuantLinear, QuantLinearConfig
from qdiff.nn.rotations import hadamard, outlier_rotation

COLUMNS, ROWS = 256, 96
PLAIN = "float16"


@dataclass(frozen=True)
class Cell:
    """One layer of the module."""

    weights: str
    activations: str
    per_token: bool = False
    pieces: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "_".join([self.weights, self.activations, *(["token"] if self.per_token else []), *self.pieces])

    def layer(self) -> QuantLinear:
        generator = torch.Generator().manual_seed(len(self.name))
        outliers = "outliers" in self.pieces
        rank, rotation = (8 if "rank" in self.pieces else 0), (16 if outliers or "rotation" in self.pieces else 0)
        smooth, shift = "smooth" in self.pieces, "shift" in self.pieces
        form = QuantLinearConfig(
            COLUMNS,
            ROWS,
            True,
            self.weights,
            self.activations,
            self.per_token,
            input_multiplier=smooth,
            shift=shift,
            centered="centered" in self.pieces,
            rotation=rotation,
            outliers=outliers,
            rank=rank,
        )
        layer = QuantLinear(form)
        weight = quantize_weight(torch.randn(ROWS, COLUMNS, generator=generator) / 16, format_named(self.weights))
        layer.codes, layer.scale, layer.tensor_scale = weight.packed(), weight.scale, weight.tensor_scale
        layer.bias = torch.randn(ROWS, generator=generator)
        if layer.input_scale is not None:
            largest = format_named(self.activations).largest
            layer.input_scale = torch.tensor(4 / largest).half().float()
            if format_named(self.activations).tensor_scale:
                layer.input_scale = torch.tensor(4 / (largest * 448))
        if smooth:
            layer.input_multiplier = (torch.rand(COLUMNS, generator=generator) + 0.5).half().float()
        if shift:
            layer.shift = torch.randn(COLUMNS, generator=generator).half().float()
        if rotation:
            layer.rotation = hadamard(rotation)
        if outliers:
            fitted = outlier_rotation(torch.randn(64, COLUMNS, generator=generator).exp(), rotation)
            layer.outlier_rotation, layer.outlier_order = fitted.first, fitted.order
        if rank:
            layer.down = torch.randn(rank, COLUMNS, generator=generator).half() / 16
            layer.up = torch.randn(ROWS, rank, generator=generator).half() / 4
        return layer

    @property
    def realised(self) -> Realised:
        activations = self.activations if format_named(self.activations).quantized else None
        return Realised(self.weights, activations, self.per_token)


def cells_of(target: Target) -> list[Cell]:
    """Every weight format, every activation format and every pair that is not free of the other; and every other piece."""
    if target.name == "tensorrt":
        cells = [Cell(weights, activations or PLAIN) for weights, activations in sorted(target.runs, key=str)]
    else:
        cells = [Cell(weights, PLAIN) for weights in sorted({weights for weights, _ in target.runs})]
        cells += [Cell("int8", name) for name in sorted({name for _, name in target.runs if name})]
        cells += [Cell("int6", "int8"), Cell("int6", "int8", True)]
        cells += [Cell("int4_g64", name, True) for name in sorted({name for _, name in target.tokens if name})]
        cells += [Cell("nvfp4", "nvfp4"), Cell("fp8", "fp8"), Cell("mxfp8", "mxfp8")]
    pieces = [("rank",), ("rotation",), ("outliers",), ("centered",), ("smooth", "shift", "rotation", "rank")]
    pieces += [("smooth", "shift", "centered", "rotation", "rank")]
    return cells + [Cell("nvfp4", "nvfp4", pieces=one) for one in pieces]


class Side(nn.Module):
    """All cells on one input; their outputs side by side."""

    def __init__(self, cells: list[Cell]) -> None:
        super().__init__()
        self.cells = nn.ModuleDict({cell.name: cell.layer() for cell in cells})

    names = ("x",)

    def forward(self, x: Tensor) -> Tensor:
        """``x [batch, tokens, columns]`` to ``[batch, tokens, cells * rows]``."""
        return torch.cat([cell(x) for cell in self.cells.values()], dim=-1)


def inputs() -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, COLUMNS, generator=generator)
    x[0, 0] = 0
    x[1] *= torch.exp2(torch.randint(-3, 1, (5, 1), generator=generator).float())
    return {"x": x}


def written(target: Target, cells: list[Cell], folder: Path) -> Path:
    module = InComputeDtype(Side(cells), getattr(torch, target.compute))
    bytes_as_codes(module)
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=1, max=4096)
    program = write_graph(module, tuple(inputs().values()), (({0: batch, 1: tokens},),), target, ["x"])
    program.save(str(folder / "model.onnx"), external_data=True)
    return folder / "model.onnx"


@pytest.fixture(scope="module", params=sorted(TARGETS))
def target(request) -> Target:
    return TARGETS[request.param]


@pytest.fixture(scope="module")
def path(target, tmp_path_factory) -> Path:
    return written(target, cells_of(target), tmp_path_factory.mktemp(target.name))


def outputs(
    path: Path, engine: str, folder: Path, count: int, given: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    options = BuildOptions()
    made = choose_engine(engine)
    made.build(path, folder, options)
    runner = made.load(folder, options)
    try:
        return runner(given or inputs()).chunk(count, dim=-1)
    finally:
        runner.close()


def test_the_file_is_valid_and_tells_what_each_layer_is(path, target):
    onnx.checker.check_model(str(path))
    graph = Graph(path)
    found = {cell.name: graph.quantized_layer(f"cells.{cell.name}") for cell in cells_of(target)}
    assert found == {cell.name: cell.realised for cell in cells_of(target)}


def test_onnx_runtime_computes_what_torch_computes(path, target, tmp_path):
    """In 32 bit to the last digits of a sum; in 16 bit to what float16 leaves, far above any format's own error."""
    cells = cells_of(target)
    with torch.no_grad():
        expected = Side(cells)(**inputs()).chunk(len(cells), dim=-1)
    with emulated(path) as graph:
        got = outputs(graph, "onnxruntime", tmp_path, len(cells))
    assert not list(path.parent.glob(".*")), "the emulated graph is left behind"
    for cell, ours, theirs in zip(cells, expected, got, strict=True):
        # A value near a rounding boundary may fall either way: float16 sums of a rotation do that more often.
        least = 100 if target.compute == "float32" and not cell.pieces and cell.activations != "int8" else 33
        assert sqnr_db(ours, theirs) > least, cell.name


@pytest.mark.slow
def test_openvino_computes_what_torch_computes(tmp_path):
    """Its casts to E4M3 round twice, and it drops the rounding of run-time scales to float16: a value in 250 lands elsewhere."""
    cells = cells_of(TARGETS["onnxruntime"])
    path = written(TARGETS["onnxruntime"], cells, tmp_path)
    with torch.no_grad():
        expected = Side(cells)(**inputs()).chunk(len(cells), dim=-1)
    (tmp_path / "engine").mkdir()
    for cell, ours, theirs in zip(
        cells, expected, outputs(path, "openvino", tmp_path / "engine", len(cells)), strict=True
    ):
        floor = 100 if cell.activations == PLAIN else 33
        assert sqnr_db(ours, theirs) > floor, cell.name


def in_a_branch(path: Path, made: Path) -> Path:
    """The graph as what is computed where an input ``chosen`` says so, as routed blocks are."""
    model = onnx.load(path)
    graph, (output,) = model.graph, model.graph.output
    then = onnx.helper.make_graph(list(graph.node), "then", [], [output], list(graph.initializer))
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [graph.input[0].name], ["other"])],
        "other",
        [],
        [onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None)],
    )
    either = onnx.helper.make_node("If", ["chosen"], ["y"], then_branch=then, else_branch=other)
    inputs = [*graph.input, onnx.helper.make_tensor_value_info("chosen", onnx.TensorProto.BOOL, [])]
    results = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    model.graph.CopyFrom(onnx.helper.make_graph([either], "chosen", inputs, results))
    onnx.save(model, made)
    return made


def test_openvino_gets_codes_of_six_bits_as_constants(tmp_path):
    """Else it folds them with their scales to float weights, and computes no integer products."""
    import openvino

    cells = [Cell("int6", "int8"), Cell("int6", "int8", True), Cell("int6_g64", "int8", True)]
    path = written(TARGETS["onnxruntime"], cells, tmp_path)
    codes = [each for each in onnx.load(path).graph.initializer if each.name.endswith(".codes")]
    assert {tuple(each.dims) for each in codes} == {(ROWS, COLUMNS * 6 // 8)}, "packed in the file"
    (tmp_path / "engine").mkdir()
    outputs(path, "openvino", tmp_path / "engine", len(cells))
    whole = openvino.Core().read_model(str(tmp_path / "engine" / "model.xml"))
    branch = tmp_path / "branch"
    branch.mkdir()
    choose_engine("openvino").build(in_a_branch(path, tmp_path / "branch.onnx"), branch, BuildOptions())
    (chooses,) = (
        op
        for op in openvino.Core().read_model(str(branch / "model.xml")).get_ordered_ops()
        if op.get_type_name() == "If"
    )
    for operations in (whole.get_ordered_ops(), chooses.get_function(0).get_ordered_ops()):
        assert "FloorMod" not in {op.get_type_name() for op in operations}
        kinds = {op.get_output_element_type(0) for op in operations if op.get_type_name() == "Constant"}
        assert openvino.Type.i8 in kinds and openvino.Type.u8 not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("branched", [False, True], ids=["whole", "in a branch"])
def test_openvino_files_of_one_graph_have_one_hash(tmp_path, branched):
    """OpenVINO numbers what has no name by what the process has made before: twice here, and in a process of its own."""
    path = written(TARGETS["onnxruntime"], [Cell("int8", "int8"), Cell("int6", "int8", True)], tmp_path)
    path = in_a_branch(path, tmp_path / "branch.onnx") if branched else path
    program = (
        "import sys; from pathlib import Path; from qdiff.engines import BuildOptions, choose_engine\n"
        "choose_engine('openvino').build(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions())"
    )
    folders = [tmp_path / name for name in ("first", "second", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        choose_engine("openvino").build(path, folder, BuildOptions())
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(path), str(folders[2])], check=True, env=environment)
    for name in ("model.xml", "model.bin"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


@pytest.mark.parametrize("branched", [False, True], ids=["whole", "in a branch"])
def test_onnxruntime_gets_codes_of_six_bits_as_int8(tmp_path, branched):
    """Else it folds them itself, through integers of 32 bits that it keeps."""
    from qdiff.engines.unpacked import take_out_unpacking

    cells = [Cell("int6", "int8"), Cell("int6", "int8", True), Cell("int6_g64", "int8", True)]
    path = written(TARGETS["onnxruntime"], cells, tmp_path)
    wanted = {cell.name: cell.layer() for cell in cells}
    if branched:
        path = in_a_branch(path, tmp_path / "branch.onnx")
    model = onnx.load(path, load_external_data=False)
    codes = take_out_unpacking(model, path.parent)
    assert not [node.op_type for node in walk.nodes(model.graph) if node.op_type.startswith("Unpack_")]
    assert not [each.name for each in walk.initializers(model.graph) if each.name.endswith(".codes")]
    for name, layer in wanted.items():
        (found,) = (values for key, values in codes.items() if f".{name}." in key)
        expected = unpack(layer.codes, format_named(layer.config.weights)).numpy()
        assert found.dtype == np.int8 and np.array_equal(found, expected.T)


def saved_alone(layer: QuantLinear, x: Tensor, folder: Path) -> None:
    """A graph of that layer for ONNX Runtime, and an empty folder for the engine."""
    single = Side([])
    single.cells["only"] = layer
    module = InComputeDtype(single, torch.float32)
    program = write_graph(module, (x,), None, TARGETS["onnxruntime"], ["x"])
    program.save(str(folder / "model.onnx"), external_data=True)
    (folder / "engine").mkdir()


@pytest.mark.parametrize("weights", ["int8", "int6"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("exact", [None, False, True], ids=["as it is here", "overflow", "exact"])
def test_products_of_integers_do_not_overflow(tmp_path, monkeypatch, weights, engine, exact):
    """The largest codes everywhere: where two products are added in 16 bits they are cut off. Each way of computing is taken on
    every processor; the one for exact products overflows where the library's do, which is what it is not taken for."""
    here = integer_products.exact(engine)
    if exact is not None:
        monkeypatch.setattr(integer_products, "exact", lambda library: exact)
    layer = Cell(weights, "int8").layer()
    signs = torch.ones(ROWS, COLUMNS, dtype=torch.int8)
    signs[1::2] = -1
    layer.codes = pack(signs * int(format_named(weights).largest), format_named(weights))
    x = torch.full((3, 5, COLUMNS), 4.0)
    with torch.no_grad():
        expected = layer(x)
    saved_alone(layer, x, tmp_path)
    result = outputs(tmp_path / "model.onnx", engine, tmp_path / "engine", 1, {"x": x})[0]
    if exact and not here and weights == "int8":
        assert sqnr_db(expected, result) < 20, "then there would be no need for the other way"
    else:
        assert sqnr_db(expected, result) > 80


def test_weights_of_six_bits_take_little_memory_to_load(tmp_path):
    rows, columns = 6144, 1536
    layer = QuantLinear(QuantLinearConfig(columns, rows, False, "int6", "int8"))
    layer.codes = torch.randint(0, 256, layer.codes.shape, dtype=torch.uint8)
    layer.input_scale = torch.tensor(4 / 127).half().float()
    saved_alone(layer, torch.randn(1, 4, columns), tmp_path)
    program = (
        "import resource, sys; from pathlib import Path; import onnx, onnxruntime, torch\n"
        "from qdiff.engines import BuildOptions, choose_engine\n"
        "engine, options, folder = choose_engine('onnxruntime'), BuildOptions(threads=1), Path(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "engine.version(); before = peak(); engine.build(folder / 'model.onnx', folder / 'engine', options)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 * rows * columns, "it took 37 bytes a weight"


@pytest.mark.parametrize(
    ("architecture", "fp4"), [pytest.param("12.0", True, id="blackwell"), pytest.param("8.9", False, id="ada")]
)
def test_tensorrt_builds_an_engine(tmp_path, architecture, fp4):
    engine = choose_engine("tensorrt_rtx")
    if engine.missing_for_build():
        pytest.skip(engine.missing_for_build())
    target = TARGETS["tensorrt"]
    cells = [cell for cell in cells_of(target) if fp4 or "nvfp4" not in (cell.weights, cell.activations)]
    path = written(target, cells, tmp_path)
    shapes = ((1, 4, COLUMNS), (2, 64, COLUMNS), (4, 256, COLUMNS))
    options = BuildOptions((Profile("usual", {"x": shapes}),), architecture)
    (tmp_path / "engine").mkdir()
    facts = engine.build(path, tmp_path / "engine", options)
    types = {"int8", "fp8", "int4"} | ({"fp4"} if fp4 else set())
    assert types <= set(facts["tensors"]), facts["tensors"]


def test_what_a_target_cannot_run_is_no_cell():
    tensorrt, cpu = TARGETS["tensorrt"], TARGETS["onnxruntime"]
    assert not tensorrt.takes("int4_g64", "int8") and not tensorrt.takes("int8", "int8", per_token=True)
    assert not cpu.takes("fp6_e3m2", "float32") and cpu.takes("int4_g64", "int8", per_token=True)
    assert all(tensorrt.takes("int8", name) for name in FORMATS if not FORMATS[name].quantized)


def test_the_support_matrix_is_the_codes():
    page = (Path(__file__).parents[2] / "docs/reference/support-matrix.md").read_text(encoding="utf-8")
    stale = [table for table in support.tables().split("\n\n") if table not in page]
    assert not stale, "docs/reference/support-matrix.md is stale; it has to hold:\n\n" + "\n\n".join(stale)


def test_a_format_without_a_function_is_refused():
    from qdiff.export.functions import text_of

    with pytest.raises(InputError, match="no mantissa"):
        text_of("BlockQuantizeDequantize_fp4_e3m0_g128")
    with pytest.raises(InputError, match="no ONNX function"):
        text_of("Nothing_nvfp4")
