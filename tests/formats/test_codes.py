"""Codes against other people's: torch's and ml_dtypes' types, ONNX's packing and its Q/DQ operators."""

from __future__ import annotations

import functools
import math

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdiff.formats import elements
from qdiff.formats import scales as numerics
from qdiff.formats.packing import pack
from qdiff.formats.table import ELEMENTS, FORMATS, format_named
from qdiff.formats.weight import quantize_weight

FLOATS = [name for name in ELEMENTS if ELEMENTS[name].kind == "float"]
THEIRS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


@functools.cache
def all_sizes() -> torch.Tensor:
    """Every float32 whose lower half is zero (all exponents, all short fractions), and a million others."""
    short = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.rand(1_000_000, generator=generator) * 40 - 22)
    signs = torch.randint(0, 2, spread.shape, generator=generator) * 2 - 1
    return torch.cat([short[~torch.isnan(short)], spread * signs])


def borders(element) -> torch.Tensor:
    """Every value of the grid, every middle between two, and their next neighbours in float32."""
    values = torch.tensor(sorted({value for value in element.values() if math.isfinite(value)}), dtype=torch.float64)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    return torch.cat([points, *(torch.nextafter(points, torch.full((), end)) for end in (-1e9, 1e9))])


@pytest.mark.parametrize("name", FLOATS)
def test_bit_patterns_mean_what_the_name_says(name):
    """Exponent and mantissa, enumerated by hand for the smallest, by ml_dtypes for the others."""
    element = ELEMENTS[name]
    known = {
        "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],  # even steps: INT4 without -8, halved
        "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],  # powers of two
    }
    half = 2 ** (element.bits - 1)
    if name in known:
        assert list(element.values()[:half]) == known[name]
    np.testing.assert_array_equal(np.negative(element.values()[:half]), element.values()[half:])
    if name in THEIRS:
        patterns = np.arange(2**element.bits, dtype=np.uint8).view(THEIRS[name]).astype(np.float64)
        np.testing.assert_array_equal(element.values(), patterns)
    codes = torch.arange(2**element.bits, dtype=torch.uint8).view(getattr(torch, element.storage))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(elements.decode(codes, element, dtype).float().numpy(), element.values())


@pytest.mark.parametrize("name", THEIRS)
def test_rounding_is_ml_dtypes_cast(name):
    """Their casts of 4 and 6 bits saturate too; those of 8 bits do not, so ratios are cut before."""
    element = ELEMENTS[name]
    x = torch.cat([all_sizes(), borders(element)])
    codes = elements.encode(x, element)
    theirs = x.clamp(element.lowest, element.highest).numpy().astype(THEIRS[name])
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), theirs.view(np.uint8))
    values = elements.round_to_grid(x, element)
    np.testing.assert_array_equal(values.numpy(), theirs.astype(np.float32))
    assert torch.equal(torch.signbit(values), torch.signbit(x))
    assert torch.equal(elements.decode(codes, element), values)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_rounding_is_torchs_cast(name):
    """What lies beyond the largest value becomes infinity in torch's E5M2, so ratios are cut before."""
    element = ELEMENTS[name]
    x = torch.cat([all_sizes(), borders(element)])
    theirs = x.clamp(element.lowest, element.highest).to(getattr(torch, element.storage))
    assert torch.equal(elements.encode(x, element).view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_the_nearest_by_definition(name):
    """Against a search over the table in float64; of two at the same distance the even code wins."""
    element = ELEMENTS[name]
    magnitudes = [value for value in element.values()[: 2 ** (element.bits - 1)] if math.isfinite(value)]
    table = torch.tensor(magnitudes, dtype=torch.float64)
    x = torch.cat([all_sizes()[::997], borders(element)])
    x = x[x.isfinite()]
    distance = (x.abs().clamp(max=element.largest).double()[:, None] - table).abs()
    odd = torch.arange(len(table)) % 2
    best = (distance.min(dim=1).values[:, None] == distance) * (
        2 - odd
    )  # 2 for even codes, 1 for odd, 0 for farther ones
    expected = table[best.argmax(dim=1)].float().copysign(x)
    assert torch.equal(elements.round_to_grid(x, element), expected)


@pytest.mark.parametrize("name", [*FLOATS, "int8", "int4"])
def test_neighbours_enclose(name):
    element = ELEMENTS[name]
    x = torch.cat([all_sizes()[::97], borders(element)])
    x = x[x.isfinite()]
    lower, upper = elements.neighbours(x, element)
    cut = x.clamp(element.lowest, element.highest)
    assert (lower <= cut).all() and (cut <= upper).all()
    for end in (lower, upper):
        assert torch.equal(elements.round_to_grid(end, element), end), "both are values of the grid"
    nearest = elements.round_to_grid(cut, element)
    assert ((nearest == lower) | (nearest == upper)).all(), "and no other lies between them"
    assert torch.equal(lower == upper, nearest == cut)
    on_grid = borders(element)[: len({value for value in element.values() if math.isfinite(value)})]
    steps = elements.step(on_grid, element)
    assert (torch.floor(on_grid / steps) * steps == on_grid).all()


def test_half_precision_and_doubles_round_as_float32():
    for name in FLOATS:
        element = ELEMENTS[name]
        x = torch.linspace(-1.1, 1.1, 4097, dtype=torch.float16) * element.largest
        x = x[x.isfinite()]
        for other in (x, x.double()):
            assert torch.equal(elements.round_to_grid(other, element), elements.round_to_grid(x.float(), element))


@pytest.mark.parametrize(
    ("name", "tensor_type"),
    [
        ("nvfp4", TensorProto.FLOAT4E2M1),
        ("mxfp4", TensorProto.FLOAT4E2M1),
        ("nvint4", TensorProto.INT4),
        ("int4_g32", TensorProto.INT4),
        ("mxfp6_e3m2", TensorProto.FLOAT6E3M2),
        ("mxfp6_e2m3", TensorProto.FLOAT6E2M3),
        ("fp8", TensorProto.FLOAT8E4M3FN),
        ("fp8_e5m2", TensorProto.FLOAT8E5M2),
    ],
)
def test_packed_bytes_are_onnx_raw_data(name, tensor_type):
    row = format_named(name)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    quantized = quantize_weight(weight, row)
    raw = quantized.packed().view(torch.uint8).numpy().tobytes()
    theirs = numpy_helper.to_array(helper.make_tensor("w", tensor_type, weight.shape, raw, raw=True))
    values = numerics.dequantize(quantized.codes, torch.ones(()), row)
    np.testing.assert_array_equal(theirs.astype(np.float32), values.numpy())
    assert numpy_helper.from_array(theirs).raw_data == raw


def test_packed_fp4_may_be_viewed_as_torchs_type():
    packed = pack(torch.arange(16, dtype=torch.uint8).repeat(2, 1), format_named("nvfp4"))
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]  # the even element in the low nibble
    assert packed.view(torch.float4_e2m1fn_x2).shape == (2, 8)


def test_packed_int4_is_twos_complement():
    packed = pack(torch.tensor([[-8, -1, 0, 7]], dtype=torch.int8), format_named("int4"))
    assert packed.tolist() == [[0xF8, 0x70]]


def test_packed_fp6_is_a_stream_of_bits():
    codes = torch.tensor([[0b000001, 0b000010, 0b000100, 0b111111]], dtype=torch.uint8)
    stream = 0b111111_000100_000010_000001
    assert pack(codes, format_named("mxfp6_e3m2")).tolist() == [list(stream.to_bytes(3, "little"))]


# Type of the codes in ONNX, and whether ONNX Runtime's CPU has Q/DQ for them.
ONNX_TYPES = {
    "int8": (TensorProto.INT8, True),
    "int4": (TensorProto.INT4, True),
    "e4m3": (TensorProto.FLOAT8E4M3FN, True),
    "e5m2": (TensorProto.FLOAT8E5M2, True),
    "e2m1": (TensorProto.FLOAT4E2M1, False),
}


def _quantizers(shape: tuple[int, int], block: int, tensor_type: int) -> onnx.ModelProto:
    where = {"axis": 1, "block_size": block} if block else {"axis": 0}
    scales = [shape[0], shape[1] // block] if block else [shape[0]]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["codes"], output_dtype=tensor_type, **where),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["values"], **where),
    ]
    inputs = [helper.make_tensor_value_info(*value) for value in (("x", 1, shape), ("s", 1, scales))]
    graph = helper.make_graph(nodes, "q", inputs, [helper.make_tensor_value_info("values", 1, shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].element.name in ONNX_TYPES])
def test_onnx_quantizes_to_the_same_values(name):
    """QuantizeLinear and DequantizeLinear with our scales: the reference for all types, ONNX Runtime for those it has."""
    row = format_named(name)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 8)[:, None]
    weight[3, :128] = 0
    quantized = quantize_weight(weight, row)
    scale = quantized.element_scale().squeeze(-1)
    tensor_type, in_runtime = ONNX_TYPES[row.element.name]
    model = _quantizers(tuple(weight.shape), row.block, tensor_type)
    feeds = {"x": weight.numpy(), "s": scale.numpy()}
    found = [onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]]
    if in_runtime:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, feeds)[0])
    for values in found:
        np.testing.assert_array_equal(values, quantized.dequantize().numpy())


def test_onnx_multiplies_both_scales_of_nvfp4_in_our_order():
    """What a graph holds: E4M3 block scales, dequantized by the tensor scale, which then dequantize the codes."""
    row = format_named("nvfp4")
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) * 0.03
    quantized = quantize_weight(weight, row)
    raw = {
        "codes": (TensorProto.FLOAT4E2M1, weight.shape, quantized.packed().numpy().tobytes()),
        "scale": (TensorProto.FLOAT8E4M3FN, (16, 4), quantized.scale.view(torch.uint8).numpy().tobytes()),
        "tensor_scale": (TensorProto.FLOAT, (), quantized.tensor_scale.numpy().tobytes()),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["scale", "tensor_scale"], ["product"]),
        helper.make_node("DequantizeLinear", ["codes", "product"], ["values"], axis=1, block_size=16),
    ]
    tensors = [helper.make_tensor(key, kind, shape, data, raw=True) for key, (kind, shape, data) in raw.items()]
    output = helper.make_tensor_value_info("values", TensorProto.FLOAT, weight.shape)
    model = helper.make_model(
        helper.make_graph(nodes, "q", [], [output], tensors), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    (values,) = onnx.reference.ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(values, quantized.dequantize().numpy())


def test_e8m0_scales_are_torchs_and_ml_dtypes():
    powers = torch.arange(-126, 128, dtype=torch.float32).exp2()
    stored = powers.to(torch.float8_e8m0fnu)
    assert torch.equal(stored.float(), powers)
    np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), np.arange(1, 255, dtype=np.uint8))
    theirs = powers.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), theirs)
