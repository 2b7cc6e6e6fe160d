"""Whole formats against the libraries that models come from: torchao's MX and NVFP4, nvidia-modelopt's quantized tensors.

Each runs where it is installed: both are peers of the benchmarks (the extra ``bench``). Where we differ from them on purpose, a
test says where and by how much.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from qdiff.formats import scales
from qdiff.formats.packing import unpack
from qdiff.formats.table import format_named
from qdiff.formats.weight import quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore:Skipping extension modelopt")


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Rows of the sizes that weights have, some blocks of zeros, and values halfway between codes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 512, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator) * 0.7)
    rows[3] = 0
    rows[5, 32:64] = 0
    rows[7, :32] = torch.tensor(
        [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6] * 2
    )
    return rows


def nonzero(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Which blocks hold more than zeros: whoever chooses a scale for the others is free to."""
    return weight.unflatten(-1, (-1, block)).abs().amax(-1) > 0


def as_bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", exc_type=ImportError)
        nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    return mx, nvfp4


@pytest.mark.parametrize(("rounding", "theirs"), [("floor", "FLOOR"), ("up", "RCEIL"), ("even", "EVEN")])
@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("mxfp4", torch.float4_e2m1fn_x2),
        ("mxfp8", torch.float8_e4m3fn),
        ("mxfp6_e3m2", "fp6_e3m2"),
        ("mxfp6_e2m3", "fp6_e2m3"),
    ],
)
def test_mx_is_torchaos(torchao, weight, name, element, rounding, theirs):
    mx, _ = torchao
    row = format_named(name)
    scale, codes = mx.to_mx(weight, element, 32, getattr(mx.ScaleCalculationMode, theirs))
    ours = quantize_weight(weight, row, rounding=rounding)
    filled = nonzero(weight, 32)
    assert torch.equal(as_bits(scale)[filled], as_bits(ours.scale)[filled])
    # torchao keeps one 6-bit code a byte and packs 4-bit codes.
    assert torch.equal(as_bits(codes), as_bits(ours.packed() if row.bits == 4 else ours.codes))


def test_nvfp4_is_torchaos_but_for_its_lower_end(torchao, weight):
    """torchao's block scales end at E4M3's smallest normal number, 2^-6, ours at the smallest, 2^-9, as modelopt's do."""
    _, nvfp4 = torchao
    row = format_named("nvfp4")
    tensor_scale = nvfp4.per_tensor_amax_to_scale(weight.abs().max())
    assert torch.equal(tensor_scale, scales.choose_tensor_scale(weight.abs().max(), row))
    small = weight.clone()
    small[:32] *= 1e-5
    for given, subnormal in ((weight, 0), (small, 30 * 32)):
        scale, packed = nvfp4.nvfp4_quantize(given, 16, tensor_scale)
        ours = quantize_weight(given, row, tensor_scale=tensor_scale)
        filled = nonzero(given, 16)
        above = ours.scale.float() >= 2**-6
        assert (filled & ~above).sum() >= subnormal
        differ = as_bits(scale) != as_bits(ours.scale)
        assert not (differ & filled & above).any()
        assert (scale.float()[filled & ~above] == 2**-6).all()
        same = ~differ[..., None].expand(-1, -1, 16).flatten(1)
        assert torch.equal(unpack(packed, row)[same], ours.codes[same])


@pytest.fixture(scope="module")
def modelopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("modelopt")
        return pytest.importorskip("modelopt.torch.quantization.qtensor", exc_type=ImportError)


def test_nvfp4_is_modelopts(modelopt, weight):
    """Bit for bit: tensor scale, block scales (zero blocks and the smallest included), codes, packing and values."""
    row = format_named("nvfp4")
    small = weight.clone()
    small[:32] *= 1e-5
    for given in (weight, small):
        theirs, scale, tensor_scale = modelopt.NVFP4QTensor.quantize(given.clone(), 16)
        ours = quantize_weight(given, row)
        assert torch.equal(tensor_scale, ours.tensor_scale)
        assert torch.equal(as_bits(scale), as_bits(ours.scale))
        assert torch.equal(theirs._quantized_data, ours.packed())
        values = theirs.dequantize(scale=scale, double_scale=tensor_scale, block_sizes={-1: 16})
        assert torch.equal(values, ours.dequantize())


def test_mxfp8_is_modelopts_with_rounding_up(modelopt, weight):
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp8_tensor")
    theirs, scale = module.MXFP8QTensor.quantize(weight.clone())
    ours = quantize_weight(weight, format_named("mxfp8"), rounding="up")
    filled = nonzero(weight, 32)
    assert torch.equal(scale[filled], as_bits(ours.scale)[filled])
    assert torch.equal(as_bits(theirs._quantized_data), as_bits(ours.codes))


def test_mxfp4_is_modelopts_with_rounding_up_but_for_ties(modelopt, weight):
    """modelopt's MXFP4 breaks ties towards zero (its NVFP4 to even), and writes zeros as -0."""
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp4_tensor")
    row = format_named("mxfp4")
    theirs, scale = module.MXFP4QTensor.quantize(weight.clone(), 32)
    ours = quantize_weight(weight, row, rounding="up")
    filled = nonzero(weight, 32)
    assert torch.equal(scale.reshape(filled.shape)[filled], as_bits(ours.scale)[filled])
    one = torch.ones(())
    values = scales.dequantize(unpack(theirs._quantized_data, row), one, row)
    expected = scales.dequantize(ours.codes, one, row)
    differ = (values != expected).nonzero().tolist()
    # The row of ties: 0.75, 1.75 and 3.5 to the even 1, 2 and 4 by us, to 0.5, 1.5 and 3 by them, on both sides of zero.
    assert differ == [[7, column] for column in range(32) if weight[7, column].abs() in (0.75, 1.75, 3.5)]
    assert (values[7, :32].abs() < expected[7, :32].abs()).sum() == len(differ) == 12


def test_int4_differs_from_modelopts_by_the_rounding_of_scales_alone(modelopt, weight):
    """theirs are float32 reciprocals, ours numbers that float16 holds."""
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.int4_tensor")
    row = format_named("int4_g128")
    filled = weight[8:]
    theirs, scale = module.INT4QTensor.quantize(filled.clone(), 128)
    ours = quantize_weight(filled, row)
    torch.testing.assert_close(1 / scale.reshape(ours.scale.shape), ours.scale, rtol=2**-11, atol=0)
    high_first = torch.stack([theirs._quantized_data >> 4, theirs._quantized_data & 15], -1).flatten(-2)
    codes = high_first.to(torch.int8) - 8
    assert ((codes - ours.codes).abs() <= 1).all() and (codes != ours.codes).float().mean() < 2e-3


def test_fp8_is_modelopts_up_to_the_rounding_of_scales(modelopt, weight):
    fake = pytest.importorskip("modelopt.torch.quantization.tensor_quant").fp8_eager
    row = format_named("fp8")
    amax = torch.tensor(448 * 2.0**-7)  # its scale, 2^-7, lies on every grid
    ours = scales.quantize_dequantize(weight, scales.choose_scale(amax, row), row)
    assert torch.equal(ours, fake(weight, amax))
