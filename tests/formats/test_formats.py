"""The contract of every number format, and INT8's numbers against ONNX Runtime, ONNX's reference and torch."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qdiff.errors import InputError
from qdiff.formats import scales as numerics
from qdiff.formats.dynamic import effective, quantize_dequantize_blocks, quantize_dequantize_tokens
from qdiff.formats.packing import pack, unpack
from qdiff.formats.table import ELEMENTS, FORMATS, SCALE_STORAGE, format_named, low_rank_bits
from qdiff.formats.weight import QuantizedWeight, quantize_weight

QUANTIZED = [name for name in FORMATS if FORMATS[name].quantized]
BLOCKS = [name for name in QUANTIZED if FORMATS[name].block]
WHOLE = [name for name in QUANTIZED if not FORMATS[name].block]
PAGE = Path(__file__).parents[2] / "docs/reference/formats.md"


def all_codes(format) -> torch.Tensor:
    """Every code of the format that stands for a number, in its storage dtype."""
    patterns = [code for code in range(2**format.bits) if math.isfinite(format.element.value(code))]
    codes = torch.tensor(patterns, dtype=torch.uint8)
    if format.kind == "integer":
        return (codes.to(torch.int16) - 2**format.bits * (codes >= 2 ** (format.bits - 1))).to(torch.int8)
    return codes.view(getattr(torch, format.storage))


def as_bits(codes: torch.Tensor) -> torch.Tensor:
    """Codes as bytes, so that -0 and 0 differ and float8 can be compared."""
    return codes.view(torch.uint8)


def a_weight(rows: int = 7, columns: int = 256) -> torch.Tensor:
    """Rows of very different size, one of zeros, one with a block of zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 2, rows)[:, None]
    weight[2] = 0
    weight[4, :128] = 0
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_agrees_with_its_storage(name):
    row = format_named(name)
    assert row.name == name and row.about
    storage = torch.zeros(1, dtype=torch.uint8).view(getattr(torch, row.storage)) if row.quantized else None
    if row.quantized:
        assert storage.element_size() == 1 and row.bits <= 8
        assert row.scale_bits == {"float32": 16}.get(row.scale_storage, 8)  # numbers of the float16 grid
        getattr(torch, SCALE_STORAGE[row.scale])
    else:
        assert row.bits == torch.zeros(1, dtype=getattr(torch, row.storage)).element_size() * 8
        assert not row.block and not row.scale_bits and row.scale_storage is None
    assert row.tensor_scale == (row.scale == "e4m3")
    assert row.effective_bits(64) == row.bits + row.scale_bits / (row.block or 64)
    assert ELEMENTS[row.element.name] is row.element


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4_g64", 4.25), ("int4_g128", 4.125), ("mxfp8", 8.25), ("mxint8", 8.25)],
)
def test_effective_bits_are_the_published_ones(name, bits):
    assert format_named(name).effective_bits(1152) == bits


@pytest.mark.parametrize("name", QUANTIZED)
def test_stored_bits_are_those_of_the_tensors(name):
    row, weight = format_named(name), a_weight()
    quantized = quantize_weight(weight, row)
    packed = quantized.packed()
    assert packed.shape == row.packed_shape(weight.shape) and packed.dtype == getattr(torch, row.packed_storage)
    assert quantized.scale.shape == row.scale_shape(weight.shape)
    assert quantized.scale.dtype == getattr(torch, row.scale_storage)
    assert (quantized.tensor_scale is not None) == row.tensor_scale
    bits = packed.numel() * packed.element_size() * 8 + quantized.scale.numel() * row.scale_bits
    bits += 32 if row.tensor_scale else 0
    assert row.stored_bits(weight.shape) == bits
    assert row.effective_bits(weight.shape[1], weight.numel()) == pytest.approx(bits / weight.numel(), rel=1e-12)


def test_low_rank_branches_count():
    """The numbers of PixArt, FLUX and Wan, arithmetic of 16 r (m + n) / (m n)."""
    got = [low_rank_bits(*shape, 32) for shape in [(1152, 1152), (1152, 4608), (3072, 3072), (5120, 5120)]]
    assert [round(bits, 2) for bits in got] == [0.89, 0.56, 0.33, 0.20]


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_comes_back(name):
    row = format_named(name)
    codes = all_codes(row)
    reserved = {"e4m3": 2, "e5m2": 8}.get(row.element.name, 0)
    assert len(codes) == 2**row.bits - reserved
    for scale in (1.0, 0.0371, 3e-5, 812.5):
        scale = torch.tensor(scale)
        values = numerics.dequantize(codes, scale, row)
        again = numerics.quantize(values, scale, row)
        assert again.dtype == codes.dtype and torch.equal(as_bits(again), as_bits(codes))
        assert torch.equal(numerics.quantize_dequantize(values, scale, row), values)
    assert torch.equal(numerics.dequantize(codes, torch.ones(()), row).double(), row_values(row))


def row_values(row) -> torch.Tensor:
    """Values of :func:`all_codes` from the table's own arithmetic in Python."""
    values = [row.element.value(code) for code in range(2**row.bits)]
    return torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_ties_and_saturation(name):
    row = format_named(name)
    one = torch.ones(())
    for zero in (torch.tensor([0.0, -0.0]), torch.full((2,), 1e-30)):
        assert numerics.quantize_dequantize(zero, one, row).tolist() == [0, 0]
    # Halfway between neighbours the one with the even code wins, on both sides of zero.
    top = 2 ** (row.bits - 1) - 1
    magnitudes = [row.element.value(code) for code in range(top + 1) if math.isfinite(row.element.value(code))]
    ties = torch.tensor([(low + high) / 2 for low, high in zip(magnitudes, magnitudes[1:], strict=False)])
    even = torch.tensor(
        [magnitudes[code if code % 2 == 0 else code + 1] for code in range(len(magnitudes) - 1)], dtype=torch.float32
    )
    assert torch.equal(numerics.quantize_dequantize(ties, one, row), even)
    assert torch.equal(numerics.quantize_dequantize(-ties, one, row), -even)
    above, below = torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9))
    assert numerics.quantize_dequantize(above, one, row).tolist() == magnitudes[1:]
    assert numerics.quantize_dequantize(below, one, row).tolist() == magnitudes[:-1]

    far = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), row.highest * 1.01 + 1, row.lowest * 1.01 - 1])
    expected = [row.highest, row.lowest] * 3
    assert numerics.quantize_dequantize(far, one, row).tolist() == expected
    assert numerics.dequantize(numerics.quantize(far, one, row), one, row).tolist() == expected


@pytest.mark.parametrize("name", WHOLE)
def test_scales(name):
    row = format_named(name)
    amax = torch.tensor([0.0, 1e-30, 1e-7, 0.3, 127.0, 6e4, 1e8, 1e38])
    scale = numerics.choose_scale(amax, row)
    assert scale[0] == 1, "a tensor of zeros must not divide by zero"
    assert torch.isfinite(scale).all() and (scale > 0).all()
    beyond = scale > 65504
    assert torch.equal(scale[~beyond], scale[~beyond].half().float()), "scales are numbers that float16 holds"
    assert torch.equal(scale[beyond], scale[beyond].bfloat16().float()), "or bfloat16, where float16 ends"
    # The largest value gets the largest code, however large it is.
    largest = numerics.quantize(amax[3:], scale[3:], row)
    assert numerics.dequantize(largest, torch.ones(()), row).tolist() == [row.largest] * 5
    values = numerics.quantize_dequantize(amax[3:], scale[3:], row)
    assert ((values - amax[3:]).abs() <= amax[3:] * 2**-8).all(), "nothing is cut without a word"
    assert torch.isfinite(numerics.quantize_dequantize(torch.tensor(torch.inf), scale[-1], row))
    usual = slice(3, 6)
    # Half a unit of float16's 11 bits, or of its subnormals.
    ideal = amax[usual] / row.largest
    assert ((scale[usual] - ideal).abs() <= torch.clamp(ideal * 2**-11, min=2.0**-25)).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_err_by_half_a_step(name):
    row, weight = format_named(name), a_weight()
    quantized = quantize_weight(weight, row)
    assert quantized.codes.shape == weight.shape and quantized.codes.dtype == getattr(torch, row.storage)
    values = quantized.dequantize()
    assert (values[2] == 0).all() and (values[4, :128] == 0).all()
    blocks = weight.unflatten(1, (-1, row.block or weight.shape[1]))
    error = (values.reshape(blocks.shape) - blocks).abs()
    scale = effective(quantized.scale, quantized.tensor_scale).reshape(*blocks.shape[:2], 1)
    gaps = torch.tensor(sorted({abs(value) for value in row_values(row).tolist()})).diff()
    # Half a step; and where the scale was rounded down, what is above the largest value: half a unit of a float16 or E4M3
    # scale (2^-10 where E4M3 is subnormal) times the largest code, or with a power of two all up to the next binade.
    excess = {
        "float16": scale * row.largest * 2**-11,
        "e4m3": torch.maximum(scale * 2**-4, 2**-10 * torch.as_tensor(quantized.tensor_scale or 0.0)) * row.largest,
        "e8m0": scale * (2 * 2**row.element.largest_exponent - row.largest),
    }[row.scale]
    assert (error <= torch.maximum(scale * gaps.max() / 2, excess) * (1 + 1e-5) + 1e-12).all()


def test_int8_is_today_what_it_was():
    """Plans and checkpoints of INT8 hold these numbers; the arithmetic is written out here once more."""
    weight = (
        torch.randn(64, 3, 7, generator=torch.Generator().manual_seed(5)) * torch.logspace(-4, 3, 64)[:, None, None]
    )
    weight[9] = 0
    flat = weight.reshape(64, -1)
    amax = flat.abs().amax(dim=1)
    scale = (amax / 127).clamp(min=2.0**-20, max=65504.0).to(torch.float16).to(torch.float32)
    scale = torch.where(amax > 0, scale, torch.ones_like(amax))
    codes = torch.round(flat / scale[:, None]).clamp_(-128, 127).to(torch.int8).reshape(weight.shape)
    row = format_named("int8")
    quantized = quantize_weight(weight, row)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.scale, scale) and quantized.scale.dtype == torch.float32
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = flat.to(dtype)
        step = torch.tensor(0.0371, dtype=dtype)
        expected = torch.round(x / step).clamp_(-128, 127) * step
        got = numerics.quantize_dequantize(x, step, row)
        assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_that_do_not_divide_are_refused_by_name(name):
    row = format_named(name)
    columns = row.block + 2
    message = f"{name} has blocks of {row.block}, and {columns} columns"
    for call in (
        lambda: quantize_weight(torch.ones(2, columns), row),
        lambda: quantize_dequantize_blocks(torch.ones(2, columns), row, torch.ones(())),
        lambda: row.scale_shape((2, columns)),
        lambda: row.stored_bits((2, columns)),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match=r"a matrix \[out, in\], not of shape \(2, 64, 3\)"):
        quantize_weight(torch.ones(2, 64, 3), row)
    with pytest.raises(InputError, match=f"{name} has blocks"):
        quantize_dequantize_tokens(torch.ones(2, row.block), row)


@pytest.mark.parametrize("name", WHOLE)
def test_formats_without_blocks_say_so(name):
    with pytest.raises(InputError, match=f"{name} has no blocks"):
        quantize_dequantize_blocks(torch.ones(2, 64), format_named(name))


@pytest.mark.parametrize(("name", "columns"), [("int4", 7), ("fp6_e3m2", 6), ("fp6_e2m3", 5)])
def test_rows_fill_whole_bytes(name, columns):
    row = format_named(name)
    codes = quantize_weight(torch.ones(2, columns), row).codes
    with pytest.raises(InputError, match=f"{name} packs . codes into . bytes, and {columns} columns"):
        pack(codes, row)


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].quantized])
def test_kept_formats_are_not_quantized_to(name):
    with pytest.raises(InputError, match=f"{name} is not a quantized format"):
        quantize_weight(torch.ones(2, 2), format_named(name))
    with pytest.raises(InputError, match=f"{name} has no scale"):
        numerics.choose_scale(torch.ones(()), format_named(name))


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), -float("inf")], [float("inf"), 0.0]])
def test_nan_and_infinity_are_refused_with_their_count(bad):
    count = sum(not np.isfinite(x) for x in bad)
    with pytest.raises(InputError, match=f"the weight w holds {count} NaN"):
        numerics.require_finite(torch.tensor(bad), "the weight w")
    with pytest.raises(InputError, match=f"holds {count} NaN"):
        quantize_weight(torch.tensor([bad]), format_named("int8"))
    numerics.require_finite(torch.full((1000,), 3e38), "large values whose sum float32 cannot hold")
    numerics.require_finite(torch.arange(5), "integers")


@pytest.mark.parametrize("name", QUANTIZED)
def test_nan_has_no_code_and_stays_nan(name):
    row = format_named(name)
    x = torch.linspace(-3, 3, 128)
    x[5] = float("nan")
    one = torch.ones(())
    with pytest.raises(InputError, match=f"1 of 128 values are NaN, which has no {name} code"):
        numerics.quantize(x, one, row)
    values = [numerics.quantize_dequantize(x, one, row)]
    values += [quantize_dequantize_blocks(x, row, one)] if row.block else [quantize_dequantize_tokens(x, row)]
    for got in values:
        assert torch.isnan(got[5]) and torch.isfinite(got[torch.arange(128) != 5]).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_is_rebuilt_from_what_is_stored(name):
    row, weight = format_named(name), a_weight()
    quantized = quantize_weight(weight, row)
    again = QuantizedWeight.from_packed(row, quantized.packed(), quantized.scale, quantized.tensor_scale)
    assert torch.equal(as_bits(again.codes), as_bits(quantized.codes))
    values = again.dequantize()
    assert torch.equal(values, quantized.dequantize())
    assert torch.equal(as_bits(again.with_values(values).codes), as_bits(quantized.codes))
    moved = values + 0.2 * weight.abs().amax() * torch.sign(weight)
    assert torch.equal(again.with_values(moved).scale.float(), quantized.scale.float())
    assert not torch.equal(again.with_values(moved).dequantize(), values)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_can_be_packed_and_unpacked(name):
    """Every code in every place of a group of bytes."""
    row = format_named(name)
    codes = all_codes(row)
    table = torch.stack([as_bits(codes).roll(shift) for shift in range(4)], dim=1).view(codes.dtype)
    packed = pack(table, row)
    assert packed.numel() * packed.element_size() * 8 == table.numel() * row.bits
    assert torch.equal(as_bits(unpack(packed, row)), as_bits(table))
    assert torch.equal(as_bits(pack(unpack(packed, row), row)), as_bits(packed))


def test_an_unknown_format_gets_the_nearest_names():
    with pytest.raises(InputError, match="did you mean int8"):
        format_named("int9")


def test_a_new_row_is_enough():
    """A format that is no row works everywhere: nothing but the table knows names."""
    row = replace(format_named("int4_g64"), name="e3m2_g8", element=ELEMENTS["e3m2"], block=8)
    weight = a_weight()
    quantized = quantize_weight(weight, row, "mse")
    assert quantized.packed().shape == (7, 192) and row.effective_bits(256) == 8
    assert torch.equal(quantize_dequantize_blocks(weight, row), quantize_weight(weight, row).dequantize())


def table() -> str:
    """The table of docs/reference/formats.md, from the table of the code."""
    lines = [
        "| format | code | magnitudes | shares a scale | scale | bits | about |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in FORMATS.values():
        element = row.element
        if element.kind == "plain":
            code, magnitudes = "", ""
        elif element.kind == "integer":
            code, magnitudes = f"{row.bits}-bit integer", f"0 … {element.largest:g}"
        else:
            values = sorted({abs(value) for value in row_values(row).tolist()})
            code = element.name.upper()
            few = values if len(values) <= 8 else [*values[:2], "…", values[-1]]
            magnitudes = " ".join(
                value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:g}" for value in few
            )
        shares = f"block of {row.block}" if row.block else "channel, token or tensor" if row.quantized else ""
        scale = {"float16": "float16", "e4m3": "E4M3 × FP32 of the tensor", "e8m0": "E8M0"}.get(row.scale, "")
        exact = row.block or not row.quantized
        bits = f"{row.effective_bits(1152):g}" if exact else f"{row.bits} + 16/n"
        lines.append(f"| `{row.name}` | {code} | {magnitudes} | {shares} | {scale} | {bits} | {row.about} |")
    return "\n".join(lines)


def test_the_guide_has_this_table():
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page, f"docs/reference/formats.md is stale; its table has to be:\n\n{table()}\n"
    named = set(re.findall(r"`((?:int|fp|mx|nv)[a-z0-9_]*\d[a-z0-9_]*)`", page.replace(table(), "")))
    assert named <= set(FORMATS), f"the page names formats that do not exist: {named - set(FORMATS)}"


def _quantize_graph(scale: float) -> onnx.ModelProto:
    scales = [helper.make_tensor("s", TensorProto.FLOAT, [], [scale])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["codes"], output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["values"]),
    ]
    graph = helper.make_graph(
        nodes,
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info("codes", TensorProto.INT8, [None]),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, [None]),
        ],
        scales,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("scale", [0.0078125, 0.0371, 1.7e-4, 3.0])
def test_int8_is_what_onnx_computes_bit_for_bit(scale):
    row = format_named("int8")
    scale = float(np.float32(scale))
    generator = torch.Generator().manual_seed(1)
    steps = torch.arange(-140, 140, 0.25)  # every tie, and beyond both ends
    x = torch.cat([steps * scale, torch.randn(20_000, generator=generator) * 60 * scale])
    model = _quantize_graph(scale)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = numerics.quantize(x, torch.tensor(scale), row).numpy()
    values = numerics.quantize_dequantize(x, torch.tensor(scale), row).numpy()
    for got_codes, got_values in (
        session.run(None, {"x": x.numpy()}),
        onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()}),
    ):
        np.testing.assert_array_equal(codes, got_codes)
        np.testing.assert_array_equal(values, got_values)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_is_what_torch_quantizes_to():
    """torch multiplies by 1/scale, so the two agree on ties where that is exact: at powers of two."""
    scale = 2.0**-5
    x = torch.cat(
        [torch.arange(-140, 140, 0.25) * scale, torch.randn(5000, generator=torch.Generator().manual_seed(2))]
    )
    ours = numerics.quantize(x, torch.tensor(scale), format_named("int8"))
    assert torch.equal(ours, torch.quantize_per_tensor(x, scale, 0, torch.qint8).int_repr())
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    quantized = quantize_weight(weight, format_named("int8"))
    codes, scales = quantized.codes, quantized.scale
    theirs = torch.quantize_per_channel(weight, scales, torch.zeros(6, dtype=torch.int64), 0, torch.qint8).int_repr()
    assert (codes.int() - theirs.int()).abs().max() <= 1 and (codes != theirs).float().mean() < 1e-3
