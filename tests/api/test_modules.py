"""quantize_module: any torch module from example calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qdiff
from qdiff.errors import InputError, UsageError
from qdiff.nn.quant_linear import QuantLinear


class Denoiser(nn.Module):
    """A residual network that reads a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x, timestep, gain: float = 1.0):
        x = self.first(x) + timestep.reshape(-1, 1, 1) / 1000
        for block in self.blocks:
            x = x + gain * block(x)
        return self.last(x)


@pytest.fixture(scope="module")
def denoiser():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Denoiser().eval().requires_grad_(False)
        calls = [{"x": torch.randn(2, 20, 32), "timestep": torch.tensor([900.0 - 100 * (i % 4)])} for i in range(12)]
    return module, calls


def sqnr(module, quantized, call) -> float:
    expected, got = module(**call), quantized(**call)
    return float(10 * torch.log10(expected.square().mean() / (got - expected).square().mean()))


@pytest.mark.parametrize(
    ("recipe", "settings", "least"),
    [("int8", [], 30), ("int8-gptq", [], 30), ("w4a8", ["scheme.weights=int4_g32"], 15), ("nvfp4", [], 10)],
)
def test_a_module_is_quantized_from_calls(denoiser, recipe, settings, least):
    module, calls = denoiser
    quantized = qdiff.quantize_module(module, calls, recipe, settings=settings, progress=False)
    assert sum(isinstance(part, QuantLinear) for part in quantized.modules()) == 6
    assert type(module.first) is nn.Linear, "the original stays"
    assert least < sqnr(module, quantized, calls[5]) < 80
    assert quantized.qdiff_plan.timesteps == [900.0, 800.0, 700.0, 600.0]


def test_a_module_without_a_timestep_has_one(denoiser):
    linear = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    calls = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    quantized = qdiff.quantize_module(linear, calls, "int8", progress=False)
    assert quantized.qdiff_plan.timesteps == [0.0]
    with torch.no_grad():
        error = (quantized(calls[0]) - linear(calls[0])).square().mean() / linear(calls[0]).square().mean()
    assert 0 < error < 1e-2


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([], "no call"),
        ([{"y": torch.zeros(1, 2, 32)}], "does not fit"),
        ([{"x": [torch.zeros(1)], "timestep": torch.zeros(1)}], "as a list"),
        ([{"x": torch.zeros(1, 2, 32), "timestep": torch.zeros(1), "gain": gain} for gain in (1.0, 2.0)], "call 1"),
        (
            [{"x": torch.ones(1, 2, size), "timestep": torch.zeros(1)} for size in (32, 31)],
            "call 1 .*layer 'first'.* 31",
        ),
        ([{"x": torch.ones(2, 2, 32), "timestep": torch.zeros(3)}], "call 0 .*Denoiser.forward"),
        ([{"x": torch.full((1, 2, 32), float("nan")), "timestep": torch.zeros(1)}], "call 0: 'x' holds NaN"),
        ([{"x": torch.full((1, 2, 32), float("inf")), "timestep": torch.zeros(1)}], "call 0: the float module itself"),
        ([{"x": torch.ones(1, 2, 32), "timestep": torch.zeros(0)}], "call 0: 'timestep' holds no value"),
    ],
)
def test_calls_that_are_none_are_refused(denoiser, calls, words):
    with pytest.raises(InputError, match=words):
        qdiff.quantize_module(denoiser[0], calls, progress=False)


def test_recipes_that_make_pictures_are_refused(denoiser):
    with pytest.raises(InputError, match="chooses by pictures"):
        qdiff.quantize_module(*denoiser, "mixed", progress=False)


def test_a_module_that_reads_the_weights_of_its_layers_is_refused():
    fused = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True).eval()
    with pytest.raises(InputError, match="TransformerEncoderLayer reads what a quantized layer does not have"):
        qdiff.quantize_module(fused, [torch.randn(1, 8, 32) for _ in range(4)], progress=False)


def test_what_is_no_module_or_no_list_of_calls_is_refused(denoiser):
    for module, calls, words in (
        ("pixart", [], "no torch module"),
        (denoiser[0], torch.zeros(1, 2, 32), "one tensor"),
        (nn.ReLU(), [torch.zeros(2, 2)], "no linear layer"),
    ):
        with pytest.raises((UsageError, InputError), match=words):
            qdiff.quantize_module(module, calls, progress=False)


def test_a_method_may_call_its_first_arguments_as_it_likes():
    from qdiff.methods.base import METHODS, check_options

    METHODS.register("of-this-test")(lambda group, so_far, ratio=0.5: so_far)
    try:
        with pytest.raises(InputError) as caught:
            check_options("of-this-test", {"x": 1})
        assert "group" not in (caught.value.fix or "") and "so_far" not in (caught.value.fix or "")
    finally:
        del METHODS._entries["of-this-test"]
