"""The benchmark of post-training methods: its guard, its count of bits, its fairness, and that it goes on where it stopped.

Fairness has a number here: round to nearest with max calibration is the same thing in ModelOpt and in qdiff, so the two rows
have to agree much better with each other than either does with float."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.ptq import __main__ as ptq
from bench.ptq import bits, score
from bench.ptq.guard import FLOAT, EqualRowsError, check_different
from bench.ptq.material import NotTheSameLayersError
from bench.ptq.report import markdown
from bench.ptq.rows import ROWS, Row, named
from bench.ptq.shared import Settings, Shared
from qdiff.evaluation.metrics import sqnr_db
from qdiff.formats.table import FORMATS
from qdiff.nn import ops
from qdiff.recipes import built_in

TINY = Settings(weights="random:pixart-tiny", pictures=1, samples=2, held_out=1, steps=3)
PLAIN = {"overrides": ["methods={}", "sequential=null"]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """The shared part, of the smallest model."""
    shared = Shared(tmp_path_factory.mktemp("ptq"), TINY)
    shared.prepare()
    return shared


def need(*modules: str) -> None:
    """Skips where a peer is not installed: CI installs none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            pytest.importorskip(
                module, reason=f"{module} is not installed: pip install -e '.[bench]'", exc_type=ImportError
            )


def predictions(shared: Shared, row: Row) -> torch.Tensor:
    """The row's predictions on the held-out calls; no pictures."""
    material = shared.material(shared.folder / "scratch")
    with torch.no_grad():
        row.make(material)
    return score.predictions(material.model, shared.held_out)


def test_equal_rows_are_refused():
    one, other = torch.zeros(3, 2), torch.ones(3, 2)
    check_different({FLOAT: one, "a": other, "b": other + 1})
    with pytest.raises(EqualRowsError, match="'float' and 'idle'"):
        check_different({FLOAT: one, "a": other, "idle": one.clone()})
    with pytest.raises(EqualRowsError, match="'a' and 'copy'"):
        check_different({FLOAT: one, "a": other, "copy": other.clone()})
    check_different({FLOAT: one, "a": other, "copy": other.clone()}, {"copy": "a"})


def test_a_row_that_does_nothing_fails(shared, monkeypatch):
    monkeypatch.setattr("bench.ptq.by_qdiff.make", lambda material: bits_of_nothing(material))
    with pytest.raises(EqualRowsError, match="'float' and 'qdiff-int8-idle'"):
        ptq.run_row(shared, Row("qdiff", "INT8", "idle"))


def bits_of_nothing(material):
    from bench.ptq.material import Made

    return Made(dict.fromkeys(material.layers, bits.Storage(8)))


def test_other_layers_are_refused(shared):
    row = Row(
        "qdiff", "INT8", "all", {"recipe": "int8", "overrides": ["methods={}", "quantize_outputs={}", "ignore={}"]}
    )
    with pytest.raises(NotTheSameLayersError, match="proj_out"):
        row.make(shared.material(shared.folder / "scratch"))


@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4", "int4_g64", "mxfp4"])
def test_bits_are_those_of_the_format(name):
    format, shape = FORMATS[name], (48, 128)
    storage = bits.Storage(format.bits, format.block, format.scale_bits, format.tensor_scale)
    assert storage.total(shape) == format.stored_bits(shape)
    branch = replace(storage, rank=4)
    assert branch.total(shape) == format.stored_bits(shape) + 16 * 4 * (48 + 128)


def test_bits_of_a_shorter_last_block_and_of_zero_points():
    assert bits.Storage(4, 128).total((2, 192)) == 2 * 192 * 4 + 2 * 2 * 16
    assert bits.Storage(4, 64, zero_point=True).total((2, 192)) == 2 * 192 * 4 + 2 * 3 * (16 + 4)
    assert bits.Storage(8, per_tensor=True).total((2, 192)) == 2 * 192 * 8 + 16


def test_every_recipe_has_a_row_and_every_name_is_one_of_a_kind():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    own = {row.options["recipe"] for row in ROWS if row.library == "qdiff" and "recipe" in row.method}
    assert own == set(built_in()) - {"mixed", "mixed-token", "routed", "routed-token"}, (
        "their tables are bench.mixed and the report of a run"
    )
    with pytest.raises(KeyError, match="no row"):
        named("nothing")


def test_no_held_out_prompt_was_calibrated_on(shared):
    calibration = set((shared.calibration.file("calibration", "prompts.txt")).read_text().split("\n"))
    held_out = set((shared.folder / "held-out-prompts.txt").read_text().split("\n")) - {""}
    pictures = set(shared.request(shared.model()).prompts)
    assert held_out and pictures and not calibration & (held_out | pictures)


def test_rows_resume(shared, monkeypatch):
    row = Row("qdiff", "INT8", "a test's", {"recipe": "int8", **PLAIN})
    assert ptq.finished(shared, row) is None
    first = ptq.run_row(shared, row)
    monkeypatch.setattr(ptq, "in_own_process", lambda *_: pytest.fail("a finished row was run again"))
    assert ptq.run_all(shared, [row]) == [first]
    other = replace(row, options={"recipe": "int8", "overrides": []})
    assert ptq.finished(shared, other) is None, "other options under the same name are another row"
    table = markdown([first, {**ptq.identity(other), "error": "it is not there"}], shared.facts)
    assert "\n| INT8 | qdiff | a test's |" in table and "it is not there" in table


@pytest.mark.slow
def test_a_row_runs_in_its_own_process(shared, monkeypatch):
    row = named("qdiff-nvfp4-w4a4-to-nearest")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    result = ptq.in_own_process(shared, row)
    assert result == ptq.finished(shared, row)
    assert result["peak_memory_bytes"] > 100e6 and result["seconds"] > 0


def test_a_row_that_cannot_run_says_why(shared, monkeypatch, tmp_path):
    cause = tmp_path / "python"
    cause.write_text("#!/bin/sh\necho 'ImportError: there is no such peer' >&2\nexit 1\n")
    cause.chmod(0o755)
    monkeypatch.setattr(ptq.sys, "executable", str(cause))
    (result,) = ptq.run_all(shared, [Row("torchao", "INT8", "none")])
    assert result["error"] == "ImportError: there is no such peer"
    assert "torchao INT8, none: ImportError" in markdown([result], shared.facts)


@pytest.mark.parametrize(
    ("format", "margin"),
    [("nvfp4-w4a4", 6), ("fp8-w8a8", 6), ("int8-w8a8", 2)],
)
def test_to_nearest_is_max_calibration_of_modelopt(shared, format, margin):
    """The two rows are ``margin`` dB nearer to each other than to float, and as far from float as each other.

    Between them lie q, k and v's shared tensor scales, 16-bit storage of what is kept, scales on the float16 grid, and the order
    of float32 operations. A scale that differs by 2^-12 moves up to 127 / 2^12 = 3 % of the INT8 codes by one step, and
    a step squared is 12 times the rounding's: 4 dB below it. Codes of 4 bits, and of floats, are moved far more rarely.
    """
    need("modelopt")
    reference = shared.float_answers()[0]
    a, b = (predictions(shared, named(name)) for name in (f"qdiff-{format}-to-nearest", f"modelopt-{format}-max"))
    between, error = sqnr_db(a, b), min(sqnr_db(reference, a), sqnr_db(reference, b))
    assert between > error + margin, f"{between:.1f} dB between the rows, {error:.1f} dB to float"
    assert abs(sqnr_db(reference, a) - sqnr_db(reference, b)) < 1


def test_layers_that_share_no_scale_get_modelopts_numbers(shared):
    """NVFP4 to nearest, layer by layer: where no neighbour shares its tensor scale in qdiff, a layer's weight has the same values
    in every bit, and its input the same tensor scale to the last float32 bits."""
    need("modelopt")
    ours, theirs = shared.material(shared.folder / "scratch"), shared.material(shared.folder / "scratch")
    with torch.no_grad():
        named("qdiff-nvfp4-w4a4-to-nearest").make(ours)
        named("modelopt-nvfp4-w4a4-max").make(theirs)
    alone = [entry.layers[0] for entry in ours.statistics.inputs.values() if len(entry.layers) == 1]
    alone = [name for name in alone if name in ours.layers]
    assert len(alone) >= 6
    for name in alone:
        a, b = ours.model.backbone.get_submodule(name), theirs.model.backbone.get_submodule(name)
        values = ops.dequantize_weight(a.codes, a.scale, a.tensor_scale, a.form.weights, torch.float32)
        assert torch.equal(values, b.weight), name
        torch.testing.assert_close(a.input_scale, b.input_quantizer.amax / (6 * 448), rtol=1e-5, atol=0)


def test_our_nvfp4_for_modelopt_is_modelopts(shared):
    """The dynamic backend against ModelOpt's storage class, the static one against the same scales written out: bit for bit."""
    need("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from bench.ptq.nvfp4_cpu import dynamic_blocks, static_blocks

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 128)
    x[3, :16] = 0

    class Quantizer:
        amax = x.abs().amax() * 0.9  # what exceeds the calibrated amax saturates

    tensor_scale = Quantizer.amax / (6 * 448)
    packed, block_scale, _ = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=tensor_scale)
    theirs = packed.dequantize(scale=block_scale, double_scale=tensor_scale, block_sizes={-1: 16})
    assert torch.equal(dynamic_blocks(x, Quantizer()), theirs)
    amax = x.reshape(-1, 16).abs().amax(dim=1)
    ours = static_blocks(x.reshape(-1, 16), amax, x.abs().amax()).reshape(x.shape)
    assert torch.equal(ours[3, :16], torch.zeros(16))
    Quantizer.amax = x.abs().amax()
    assert sqnr_db(dynamic_blocks(x, Quantizer()), ours) > 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("modelopt-int8-w8a8-smoothquant-0.5", bits.Storage(8)),
        ("modelopt-nvfp4-w4a4-svdquant-16", bits.Storage(4, 16, 8, tensor_scale=True, rank=16)),
        ("modelopt-int4-w4a8-max", bits.Storage(4, 64)),
        ("modelopt-int4-w4a8-awq_lite-g128-fp8-w4a8_awq_beta", bits.Storage(4, 128, tensor_scale=True)),
        ("modelopt-fp8-w8a8-max-per-tensor-fp8_default", bits.Storage(8, per_tensor=True)),
        ("torchao-int8-w8a8-per-token", bits.Storage(8)),
        ("torchao-mxfp4-w4a4-emulated", bits.Storage(4, 32, 8)),
        ("quanto-int8-w8a8-static", bits.Storage(8)),
    ],
)
def test_peers_store_what_their_rows_say(shared, name, expected):
    row = named(name)
    need({"ModelOpt": "modelopt", "torchao": "torchao", "quanto": "optimum.quanto"}[row.library])
    material = shared.material(shared.folder / "scratch")
    with torch.no_grad():
        made = row.make(material)
    assert set(made.storage) == set(material.layers) and set(made.storage.values()) == {expected}
    assert not torch.equal(score.predictions(material.model, shared.held_out), shared.float_answers()[0])


@pytest.mark.slow
def test_a_unets_rows_quantize_the_same_layers_whatever_is_split(tmp_path):
    settings = Settings(model="stable-diffusion", weights="random:sd-tiny", pictures=1, samples=2, held_out=1, steps=2)
    shared = Shared(tmp_path, settings)
    shared.prepare()
    rows = {row.method: row for row in ptq.chosen(None, settings.model) if row.format == "U-Net INT8 W8A8"}
    nearest, split = (ptq.run_row(shared, rows[name]) for name in ("to nearest", "split shortcuts"))
    assert nearest["layers"] == split["layers"] and nearest["bits"] < split["bits"] < nearest["bits"] + 0.1
    pytest.importorskip("modelopt")
    peer = ptq.run_row(shared, rows["max"])
    assert peer["layers"] == nearest["layers"] and peer["bits"] == pytest.approx(nearest["bits"])
