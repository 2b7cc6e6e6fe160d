"""How scales are chosen: by amax, by search, by four over six; for blocks at run time; at the ends of their ranges."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch

from qdiff.errors import InputError
from qdiff.formats import elements, scales
from qdiff.formats.dynamic import effective, quantize_dequantize_blocks, quantize_dequantize_tokens, split
from qdiff.formats.table import ELEMENTS, FORMATS, format_named
from qdiff.formats.weight import choose_weight_tensor_scale, quantize_weight, stretches

MX = [name for name in FORMATS if FORMATS[name].scale == "e8m0"]
TWO_LEVELS = [name for name in FORMATS if FORMATS[name].scale == "e4m3"]
BLOCKS = [name for name in FORMATS if FORMATS[name].block]
WHOLE = [name for name in FORMATS if FORMATS[name].quantized and not FORMATS[name].block]


def sizes(count: int = 3000) -> torch.Tensor:
    """Largest magnitudes of every size, powers of two and their neighbours among them."""
    powers = torch.arange(-60, 60, dtype=torch.float32).exp2()
    near = [torch.nextafter(powers, torch.full((), end)) for end in (0.0, 1e30)]
    spread = torch.exp2(torch.rand(count, generator=torch.Generator().manual_seed(0)) * 120 - 60)
    return torch.cat([powers, *near, powers * 1.5, powers * 1.75, powers * 6, powers * 448, spread])


def error_of(values: torch.Tensor, x: torch.Tensor) -> float:
    return float((values.double() - x.double()).square().sum() / x.double().square().sum())


@pytest.mark.parametrize("name", MX)
def test_powers_of_two_are_those_of_the_definitions(name):
    """In exact fractions: OCP MX v1.0 section 6.3 (floor), the next power above amax / largest (up), and the even rule."""
    row, element = format_named(name), format_named(name).element
    emax = math.floor(math.log2(element.largest))
    fraction = element.mantissa_bits or element.bits - 2
    amax = sizes()[::7]
    got = {rounding: scales.choose_scale(amax, row, rounding=rounding).tolist() for rounding in ("floor", "up", "even")}
    for index, value in enumerate(amax.tolist()):
        exponent = math.frexp(value)[1] - 1
        assert got["floor"][index] == 2.0 ** (exponent - emax)
        carries = Fraction(value) + Fraction(2) ** (exponent - fraction - 1) >= Fraction(2) ** (exponent + 1)
        assert got["even"][index] == 2.0 ** (exponent - emax + carries)
        # amax / largest is a float32, so the smallest power above it may be missed by its last place.
        up = Fraction(got["up"][index])
        ideal = Fraction(value) / Fraction(element.largest)
        assert ideal <= up * (1 + Fraction(1, 2**23)) and up / 2 < ideal
    largest = min(
        2.0 ** (127 - emax), scales.largest_power(element)
    )  # -128 of MXINT8 is half of what the rule would give
    assert scales.choose_scale(torch.tensor([0.0, 1e-45, 3e38]), row).tolist() == [1, 2.0**-126, largest]
    with pytest.raises(InputError, match="unknown rounding 'down'"):
        scales.choose_scale(amax, row, rounding="down")


@pytest.mark.parametrize("name", MX)
def test_rounding_up_never_saturates_and_floor_may(name):
    row = format_named(name)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    amax = x.abs().amax(1, keepdim=True)
    step = {rounding: amax / scales.choose_scale(amax, row, rounding=rounding) for rounding in ("floor", "up")}
    assert (step["up"] <= row.largest * (1 + 2**-23)).all()
    cut = (step["floor"] > row.largest).float().mean()
    assert step["floor"].max() < 2 * 2**row.element.largest_exponent
    # Mantissas of a normal's largest value are spread over the binade, so every format with room above loses some.
    assert cut > 0.05 if row.largest < 1.9 * 2**row.element.largest_exponent else cut < 0.05


def test_block_scales_of_two_levels():
    row = format_named("nvfp4")
    tensor_scale = scales.choose_tensor_scale(torch.tensor(5.0), row)
    assert tensor_scale == torch.tensor(5.0) / (6 * 448)
    assert scales.choose_scale(torch.tensor(5.0), row, tensor_scale) == 448
    # Every block scale is an E4M3 number, positive, at least the smallest: a block far below the tensor's amax is kept coarsely.
    amax = torch.tensor([5.0, 4.9, 1.0, 1e-3, 1e-5, 1e-6, 1e-30, 0.0])
    scale = scales.choose_scale(amax, row, tensor_scale)
    assert torch.equal(scale, scale.to(torch.float8_e4m3fn).float())
    assert scale[-4:].tolist() == [2**-9, 2**-9, 2**-9, 1]
    block = torch.zeros(1, 32)
    block[0, 0], block[0, 16:] = 5.0, 1e-5  # the second block's scale would round to 0
    quantized = quantize_weight(block, row)
    assert quantized.scale.float().tolist() == [[448, 2**-9]]
    step = 2**-9 * tensor_scale
    assert quantized.dequantize()[0, 16:].tolist() == [float(3 * step)] * 16  # 1e-5 is 2.75 of those
    with pytest.raises(InputError, match="nvfp4 needs the tensor's scale"):
        scales.choose_scale(amax, row)


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_tensor_scales_at_the_ends(name):
    row = format_named(name)
    assert scales.choose_tensor_scale(torch.zeros(()), row) == 1
    for size in (1e-38, 1e-30, 1e30, 3e38):
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).clamp(-3, 3) / 3 * size
        values = quantize_weight(weight, row).dequantize()
        assert torch.isfinite(values).all()
        if size > 1e-37:
            assert error_of(values, weight) < 0.02


@pytest.mark.parametrize("name", [*BLOCKS, *WHOLE])
def test_zeros_stay_zeros(name):
    row = format_named(name)
    quantized = quantize_weight(torch.zeros(3, 128), row)
    assert (quantized.scale.float() == 1).all() and (quantized.dequantize() == 0).all()
    assert (quantized.packed().view(torch.uint8) == 0).all()
    run = quantize_dequantize_blocks if row.block else lambda x, row, _: quantize_dequantize_tokens(x, row)
    assert (run(torch.zeros(2, 128), row, torch.ones(())) == 0).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rounding", ["floor", "up", "even"])
def test_weights_and_activations_are_one_arithmetic(name, rounding):
    row = format_named(name)
    x = torch.randn(6, 3, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 6)[:, None, None]
    quantized = quantize_weight(x.flatten(0, 1), row, rounding=rounding)
    values = quantize_dequantize_blocks(x, row, quantized.tensor_scale, rounding)
    assert torch.equal(values.flatten(0, 1), quantized.dequantize())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_know_nothing_of_each_other(name):
    row = format_named(name)
    x = torch.randn(4, 5, 256, generator=torch.Generator().manual_seed(4))
    scale = torch.tensor(1e-3) if row.tensor_scale else None
    whole = quantize_dequantize_blocks(x, row, scale)
    assert torch.equal(whole[2:3, 1:2, : row.block], quantize_dequantize_blocks(x[2:3, 1:2, : row.block], row, scale))
    assert torch.equal(whole[:, :, -row.block :], quantize_dequantize_blocks(x[:, :, -row.block :], row, scale))
    assert torch.equal(whole.transpose(0, 1), quantize_dequantize_blocks(x.transpose(0, 1), row, scale))


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_know_nothing_of_each_other(name):
    row = format_named(name)
    x = torch.randn(4, 5, 96, generator=torch.Generator().manual_seed(5)) * torch.logspace(-2, 2, 5)[:, None]
    whole = quantize_dequantize_tokens(x, row)
    assert torch.equal(whole[2:3, 1:2], quantize_dequantize_tokens(x[2:3, 1:2], row))
    for token, got in zip(x.flatten(0, 1), whole.flatten(0, 1), strict=True):
        scale = scales.choose_scale(token.abs().max(), row)
        assert torch.equal(got, scales.quantize_dequantize(token, scale, row))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int4_g32", "fp8", "int8"])
def test_dynamic_scales_compute_in_float32_whatever_comes_in(name, dtype):
    row = format_named(name)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    scale = torch.tensor(2e-3) if row.tensor_scale else None
    run = (
        (lambda x: quantize_dequantize_blocks(x, row, scale))
        if row.block
        else lambda x: quantize_dequantize_tokens(x, row)
    )
    got = run(x)
    assert got.dtype == dtype and torch.equal(got, run(x.float()).to(dtype))


def test_an_activation_beyond_what_was_calibrated_is_cut():
    """The tensor scale of NVFP4 is a constant; the block scale then saturates at 448."""
    row = format_named("nvfp4")
    tensor_scale = scales.choose_tensor_scale(torch.tensor(2.0), row)
    x = torch.tensor([[5.0, *[0.3] * 15, *[float("inf")] * 16]])
    values = quantize_dequantize_blocks(x, row, tensor_scale)
    assert values[0, 0] == pytest.approx(2.0) and values[0, 16:].tolist() == pytest.approx([2.0] * 16)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.quantized])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_saturates_where_scales_are_chosen_at_run_time(name, sign):
    """The scale that an infinite amax gets is one under which every code is a finite number; a block's neighbours are not
    touched."""
    row = format_named(name)
    x = torch.ones(2, 2 * (row.block or 16))
    x[0, 0] = sign * torch.inf
    run = partial(quantize_dequantize_blocks, tensor_scale=torch.tensor(2e-3) if row.tensor_scale else None)
    values = (run if row.block else quantize_dequantize_tokens)(x, row)
    assert torch.isfinite(values).all()
    assert values[0, 0] * sign == values[0].abs().max() > 1, "the largest code times the largest scale"
    assert (values[1] > 0).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int4_g64", "fp6_e2m3", "mxfp4", "mxint8", "fp4_e3m0_g128", "fp8"])
def test_a_searched_scale_is_never_worse_in_any_block(name):
    row = format_named(name)
    weight = _heavy_tailed(16, 512)
    blocks = split(weight, row)

    def errors(rule: str) -> torch.Tensor:
        values = quantize_weight(weight, row, rule).dequantize().reshape(blocks.shape)
        return (values - blocks).square().sum(-1)

    searched, plain = errors("mse"), errors("amax")
    assert (searched <= plain * (1 + 1e-6)).all()
    if row.bits <= 6 and name != "fp6_e2m3":
        assert searched.sum() < 0.97 * plain.sum()


def _heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(7)
    squares = torch.randn(4, rows, columns, generator=generator).square().mean(0)
    return torch.randn(rows, columns, generator=generator) / squares.sqrt()


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_the_search_finds_what_trying_every_scale_finds(name):
    """All 126 E4M3 numbers as block scales, as modelopt's sweep does: the search may miss 1 % of the error."""
    row = format_named(name)
    weight = _heavy_tailed(32, 256)
    quantized = quantize_weight(weight, row, "mse")
    blocks = split(weight, row)
    every = ELEMENTS["e4m3"].values()[1:127]
    least = torch.stack(
        [
            (scales.quantize_dequantize(blocks, quantized.tensor_scale * value, row) - blocks).square().sum(-1)
            for value in every
        ]
    ).amin(0)
    found = (quantized.dequantize() - weight).square().sum()
    assert least.sum() <= found <= 1.01 * least.sum()
    assert found < 0.9 * (quantize_weight(weight, row).dequantize() - weight).square().sum()


def test_four_over_six_takes_the_better_of_both():
    """Written out from arXiv 2512.02010: tensor scale amax / (6 * 256), block scale amax_b / 6 or amax_b / 4."""
    row = format_named("nvfp4")
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(8))
    quantized = quantize_weight(weight, row, "four_over_six")
    tensor_scale = weight.abs().max() / (6 * 256)
    assert quantized.tensor_scale == tensor_scale
    blocks = weight.unflatten(1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    candidates = []
    for top in (6, 4):
        scale = (amax / top / tensor_scale).to(torch.float8_e4m3fn).float()
        values = elements.round_to_grid(blocks / (scale * tensor_scale), row.element) * scale * tensor_scale
        candidates.append((values - blocks).square().sum(-1))
    got = (quantized.dequantize().reshape(blocks.shape) - blocks).square().sum(-1)
    torch.testing.assert_close(got, torch.minimum(*candidates), rtol=1e-5, atol=0)
    fours = (candidates[1] < candidates[0]).float().mean()
    assert 0.2 < fours < 0.8, "both are used"


def test_rules_that_a_format_does_not_have():
    assert stretches("four_over_six", format_named("nvfp4")) == [1, 1.5]
    for name in FORMATS:
        row = format_named(name)
        if row.quantized:
            assert stretches("mse", row)[0] == 1 and len(set(stretches("mse", row))) == len(stretches("mse", row))
        if name != "nvfp4":
            with pytest.raises(InputError, match=f"'four_over_six' is not for {name}"):
                quantize_weight(torch.ones(2, 128), row, "four_over_six")
    with pytest.raises(InputError, match="unknown scale rule 'best'"):
        quantize_weight(torch.ones(2, 128), format_named("int8"), "best")


@pytest.mark.parametrize("rule", ["amax", "mse", "four_over_six"])
def test_fused_layers_can_share_a_tensor_scale(rule):
    row = format_named("nvfp4")
    generator = torch.Generator().manual_seed(9)
    layers = [torch.randn(16, 64, generator=generator) * size for size in (1.0, 0.3, 0.1)]
    largest = torch.stack([layer.abs().max() for layer in layers]).max()
    shared = choose_weight_tensor_scale(largest, row, rule)
    together = quantize_weight(torch.cat(layers), row, rule)
    assert torch.equal(together.tensor_scale, shared)
    apart = [quantize_weight(layer, row, rule, tensor_scale=shared).dequantize() for layer in layers]
    assert torch.equal(torch.cat(apart), together.dequantize())
    assert choose_weight_tensor_scale(largest, format_named("mxfp4"), "mse") is None


def test_a_scale_is_what_codes_are_multiplied_with():
    quantized = quantize_weight(torch.randn(4, 64, generator=torch.Generator().manual_seed(10)), format_named("nvfp4"))
    product = effective(quantized.scale, quantized.tensor_scale)
    assert torch.equal(quantized.element_scale(), product[..., None])
    assert torch.equal(product, quantized.scale.float() * quantized.tensor_scale)
    convolution = quantize_weight(torch.randn(4, 3, 5, 5), format_named("int8"))
    assert convolution.element_scale().shape == (4, 1, 1, 1) and convolution.dequantize().shape == (4, 3, 5, 5)
