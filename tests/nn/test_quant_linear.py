"""The ops and layers: what is exact stays exact, and time is a value, not a count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qdiff.export.translations import custom_ops
from qdiff.formats.table import format_named
from qdiff.formats.weight import quantize_weight
from qdiff.methods import Decisions, LayerGroup
from qdiff.methods.base import Rows
from qdiff.nn import quant_linear
from qdiff.nn.quant_linear import KeptLinear, QuantLinear, QuantLinearConfig, TimestepIndex
from qdiff.recording.activation_statistics import InputStatistics

G = torch.Generator


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=G().manual_seed(seed), dtype=dtype)


def example(name: str) -> tuple:
    """Arguments for an op of the vocabulary; a new op needs a line here."""
    codes = torch.randint(-128, 128, (6, 4), generator=G().manual_seed(0)).to(torch.int8)
    order, blocks, bounds = (
        torch.arange(64).expand(2, -1),
        torch.zeros(4, 3, dtype=torch.int32),
        torch.tensor([0, 1, 3]),
    )
    return {
        "quantize_dequantize": (randn(2, 3, 8), torch.tensor(0.02), "int8"),
        "token_quantize_dequantize": (randn(2, 3, 8), "int8"),
        "block_quantize_dequantize": (randn(2, 3, 32), torch.tensor(0.001), "nvfp4"),
        "sparse_attention": (*[randn(1, 2, 64, 8)] * 3, order, blocks, bounds, 0, 0, 16, 16, "float", 0.35),
        "choose": (torch.tensor(1), [randn(2, 3, seed=1), randn(2, 3, seed=2)]),
        "shaped_like": (randn(2, 6, seed=1), randn(4, 3, seed=2)),
        "dequantize_weight": (codes, randn(6).abs() + 0.1, None, "int8", torch.float32),
    }[name]


@pytest.mark.parametrize("name", sorted(custom_ops()))
def test_an_op_is_well_formed(name):
    """Schema, fake (shapes, dtypes, strides) and dynamic shapes agree with the implementation."""
    torch.library.opcheck(custom_ops()[name], example(name))


@pytest.mark.parametrize("name", sorted(custom_ops()))
def test_an_op_computes_in_the_dtype_that_it_was_given(name):
    def half(value):
        if isinstance(value, list):
            return [half(each) for each in value]
        return value.half() if torch.is_tensor(value) and value.dim() > 1 and value.is_floating_point() else value

    given = tuple(half(value) for value in example(name))
    given = tuple(torch.float16 if value is torch.float32 else value for value in given)
    assert custom_ops()[name](*given).dtype == torch.float16


@pytest.fixture
def no_rounding(monkeypatch):
    """The two quantizers as the identity: what is left of a quantized layer is its float arithmetic."""

    def install(weight: torch.Tensor) -> None:
        monkeypatch.setattr(quant_linear.ops, "quantize_dequantize", lambda x, scale, format: x)
        monkeypatch.setattr(
            quant_linear.ops, "dequantize_weight", lambda codes, scale, tensor_scale, format, dtype: weight
        )

    return install


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_smoothing_and_timestep_scales_change_nothing_but_the_rounding(no_rounding, smooth, timed, bias):
    timestep_index = TimestepIndex()
    timestep_index.set(torch.tensor([900.0, 3.0, 500.0]), torch.tensor([999.0, 500.0, 1.0]))
    form = QuantLinearConfig(16, 8, bias, "int8", "int8", input_multiplier=smooth, timesteps=3 if timed else 0)
    layer = QuantLinear(form, timestep_index).double()
    multiplier = torch.exp(randn(16, seed=1, dtype=torch.float64) * 2)
    weight, x = randn(8, 16, seed=2, dtype=torch.float64), randn(3, 5, 16, seed=3, dtype=torch.float64)
    if smooth:
        layer.input_multiplier = multiplier
    if timed:
        layer.timestep_scales = torch.tensor([1.0, 3.7, 812.5], dtype=torch.float64)
    if bias:
        layer.bias = randn(8, seed=4, dtype=torch.float64)
    no_rounding(weight / multiplier if smooth else weight)
    expected = F.linear(x, weight, layer.bias)
    assert ((layer(x) - expected).abs() / expected.abs().clamp(min=1)).max() <= 1e-10


def test_the_index_is_that_of_the_nearest_calibrated_value():
    timestep_index = TimestepIndex()
    calibrated, table = torch.tensor([999.0, 750.5, 500.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="no timestep was set"):
        timestep_index.gather(table)
    timestep_index.set(torch.tensor([1.0, 999.0, 626.0, 625.0, -5.0, 5000.0]), calibrated)
    assert timestep_index.gather(table).tolist() == [3, 0, 1, 2, 3, 0]
    timestep_index.set(torch.tensor(500), calibrated)  # 0-dim, integer
    assert timestep_index.gather(table).tolist() == [2]


def timed_layer() -> tuple[QuantLinear, TimestepIndex, torch.Tensor]:
    timestep_index, calibrated = TimestepIndex(), torch.tensor([900.0, 100.0])
    layer = QuantLinear(QuantLinearConfig(16, 8, True, "int8", "int8", timesteps=2), timestep_index)
    layer.codes = torch.randint(-127, 128, (8, 16), generator=G().manual_seed(5)).to(torch.int8)
    layer.scale, layer.input_scale = torch.full((8,), 0.01), torch.tensor(4.0 / 127)
    layer.timestep_scales = torch.tensor([1.0, 50.0])
    return layer, timestep_index, calibrated


def test_every_row_of_a_batch_has_its_own_timestep():
    layer, timestep_index, calibrated = timed_layer()
    x = randn(4, 6, 16) * torch.tensor([1, 0.02, 1, 0.02])[:, None, None]
    times = torch.tensor([900.0, 100.0, 900.0, 100.0])
    timestep_index.set(times, calibrated)
    together = layer(x)
    for row, time in enumerate(times):
        timestep_index.set(time, calibrated)
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_the_order_of_calls_is_forgotten():
    layer, timestep_index, calibrated = timed_layer()
    x = randn(1, 6, 16)
    seen: dict[float, torch.Tensor] = {}
    for time in (900.0, 100.0, 100.0, 900.0, 100.0, 850.0, 899.0, 900.0):
        timestep_index.set(torch.tensor([time]), calibrated)
        near = 900.0 if time > 500 else 100.0
        assert torch.equal(layer(x), seen.setdefault(near, layer(x)))
    assert not torch.equal(seen[900.0], seen[100.0])


def test_a_half_layer_stores_16_bit_and_computes_in_its_inputs_dtype():
    layer = KeptLinear(8, 4, True, torch.bfloat16)
    layer.weight = randn(4, 8).bfloat16()
    x = randn(2, 8)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), F.linear(x, layer.weight.float(), layer.bias))


def centered_layer(bias: bool = True) -> QuantLinear:
    layer = QuantLinear(QuantLinearConfig(32, 8, bias, "nvfp4", "nvfp4", centered=True))
    weight = quantize_weight(randn(8, 32, seed=1), format_named("nvfp4"))
    layer.codes, layer.scale, layer.tensor_scale = weight.packed(), weight.scale, weight.tensor_scale
    layer.input_scale = torch.tensor(8 / (6 * 448))
    if bias:
        layer.bias = randn(8, seed=4)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_centering_changes_nothing_but_the_rounding(monkeypatch, bias):
    layer = centered_layer(bias).double()
    weight, x = randn(8, 32, seed=2, dtype=torch.float64), 5 + randn(3, 20, 32, seed=3, dtype=torch.float64)
    monkeypatch.setattr(quant_linear.ops, "block_quantize_dequantize", lambda x, scale, format: x)
    monkeypatch.setattr(quant_linear.ops, "dequantize_weight", lambda *_: weight)
    expected = F.linear(x, weight, layer.bias)
    assert ((layer(x) - expected).abs() / expected.abs().clamp(min=1)).max() <= 1e-10


def test_a_centered_picture_does_not_depend_on_its_batch():
    layer = centered_layer()
    x = randn(4, 20, 32) + 3 * randn(4, 1, 32, seed=9)
    together = layer(x)
    assert together.shape == (4, 20, 8)
    for number in range(4):
        torch.testing.assert_close(layer(x[number : number + 1])[0], together[number], rtol=1e-5, atol=1e-5)


def test_a_centered_layer_computes_what_its_method_reckons_with():
    """LayerGroup.quantized_inputs, on which GPTQ and all decisions stand, is the layer's own arithmetic."""
    layer, x = centered_layer(), randn(4, 20, 32) + 3 * randn(4, 1, 32, seed=9)
    rows = Rows(x.flatten(0, 1), torch.zeros(80, dtype=torch.int64), x.mean(1).repeat_interleave(20, dim=0))
    nothing = torch.zeros(1, 32)
    tables = (nothing - 8, nothing + 8, nothing, nothing, rows.x, rows.timestep)
    means = {"means": x.mean(1), "rows_sample": torch.arange(4).repeat_interleave(20)}
    statistics = InputStatistics(["layer"], *tables, **means)
    given = LayerGroup(["layer"], [randn(8, 32)], statistics, *[format_named("nvfp4")] * 2)
    scale = (layer.input_scale, None)
    reckoned = given.quantized_inputs(Decisions(centered=True, input_scale=scale), rows)
    got = layer(x).flatten(0, 1)
    torch.testing.assert_close(got, F.linear(reckoned, layer._weight(x.dtype), layer.bias), rtol=1e-4, atol=1e-4)
    plain = given.quantized_inputs(Decisions(input_scale=scale), rows)
    assert (reckoned - rows.x).square().mean() < (plain - rows.x).square().mean() / 2
