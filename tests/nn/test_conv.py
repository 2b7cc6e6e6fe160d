"""Convolutions as products of windows, the two structures that U-Nets need, and one U-Net quantized, stored and read back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qdiff.calib.first_token import FirstToken
from qdiff.errors import InputError, IntegrityError
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup, apply_method
from qdiff.methods.base import LINEAR_ONLY
from qdiff.models import FAMILIES
from qdiff.models.layers import quantizable_layers
from qdiff.nn.conv import Window, is_plain, sample_windows, tokens
from qdiff.nn.surgery import FirstTokenLinear, SplitConv2d, divide, restructure
from qdiff.plan.plan import Plan, Structure
from qdiff.quantization.checkpoint import load_quantized, save_quantized
from qdiff.quantization.quantize import quantize
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import InputStatistics, Statistics
from qdiff.recording.trajectory import Trajectory

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "down": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
}


def table(rows: torch.Tensor, channels: torch.Tensor, layers: list[str]) -> InputStatistics:
    """Statistics of one timestep from rows ``[N, columns]`` and tokens ``[M, channels]``."""
    ends = [channels.amin(0, keepdim=True).clamp(max=0), channels.amax(0, keepdim=True).clamp(min=0)]
    index = torch.zeros(len(rows), dtype=torch.int64)
    return InputStatistics(layers, *ends, channels.square().mean(0, keepdim=True), torch.zeros(1, 4), rows, index)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows_times_the_weights_matrix_are_the_convolution(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, **CONVOLUTIONS[name]).double()
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    y = layer(x)
    count = y[:, 0].numel()
    windows = sample_windows(layer, x, count, torch.Generator().manual_seed(1))
    assert windows.shape == (count, layer.weight[0].numel()) and is_plain(layer)
    got = windows @ layer.weight.flatten(1).T + layer.bias
    wanted = y.movedim(1, -1).reshape(count, 7)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(got, wanted[order], atol=1e-12)
    assert torch.equal(tokens(layer, x)[8 + 3], x[0, :, 1, 3])


def test_patch_embeddings_and_groups_are_left_alone():
    assert not is_plain(nn.Conv2d(4, 8, 2, stride=2)) and is_plain(nn.Conv2d(4, 8, 1))
    assert not is_plain(nn.Conv2d(4, 8, 3, groups=2)) and not is_plain(nn.Conv2d(4, 8, 3, padding_mode="reflect"))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_split_convolution_is_exact(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(10, 6, **CONVOLUTIONS[name]).double()
    x = torch.randn(2, 10, 9, 8, dtype=torch.float64)
    split = SplitConv2d.of(layer, 4)
    assert (split(x) - layer(x)).abs().max() <= 1e-10
    assert split.skip.bias is None and Window.of(split.skip) == Window.of(layer)
    with pytest.raises(InputError, match="cannot be split at channel 10"):
        SplitConv2d.of(layer, 10)


def test_a_bimodal_input_gains_ten_decibels_where_it_is_small():
    """Q-Diffusion's case: hidden states 200 times as large as the skip connection, and weights that make both count as much."""
    torch.manual_seed(0)
    hidden, skip = 200 * torch.randn(1, 32, 16, 16), torch.randn(1, 32, 16, 16)
    layer = nn.Conv2d(64, 32, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight[:, :32] /= 200
    x = torch.cat([hidden, skip], dim=1)

    def quantized(conv: nn.Conv2d, seen: torch.Tensor) -> torch.Tensor:
        windows = sample_windows(conv, seen, 64, torch.Generator().manual_seed(0))
        entry = table(windows, tokens(conv, seen), ["conv"])
        int8 = format_named("int8")
        layer_group = LayerGroup(
            ["conv"], [conv.weight.detach().flatten(1)], entry.columns(), int8, int8, False, "Conv2d", 9
        )
        decisions = Decisions()
        weight = layer_group.quantized_weights(decisions)[0].dequantize().view_as(conv.weight)
        scale, _ = layer_group.activation_scale(decisions)
        rounded = (seen / scale).round().clamp(-128, 127) * scale
        return F.conv2d(rounded, weight, padding=1)

    split = SplitConv2d.of(layer, 32)
    exact = layer(x).detach()
    whole = (quantized(layer, x) - exact).square().mean()
    halves = (quantized(split.hidden, hidden) + quantized(split.skip, skip) - exact).square().mean()
    assert 10 * math.log10(whole / halves) >= 10


def test_the_first_token_apart_is_exact_whatever_it_is():
    torch.manual_seed(0)
    layer = nn.Linear(8, 5).double()
    state = 50 * torch.randn(8, dtype=torch.float64)
    apart = FirstTokenLinear.of(layer, state)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    x[0, 0], x[1, 0] = state, 0  # a prompt of CLIP's, an empty prompt of SDXL's, and neither
    assert (apart(x) - layer(x)).abs().max() <= 1e-10
    seen = []
    apart.rest.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    apart(x)
    assert seen[0][0, 0].abs().max() <= 1e-12 and seen[0][1, 0].abs().max() == 0, (
        "its own share never meets the quantizer"
    )


def test_calibration_keeps_a_constant_first_token_apart_and_gives_another_back():
    token = torch.tensor([30.0, -2.0])
    calls = [torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    entry = table(torch.zeros(8, 2), torch.ones(1, 2), ["to_k", "to_v"])
    first = FirstToken(2)
    for x in calls:
        x[:, 0] = token
    calls[1][1, 0] = 0  # says nothing
    assert all(first.take(x).shape == (2, 3, 2) for x in calls)
    again = FirstToken(2)
    again.restore(first.state())
    kept = again.into(entry)
    assert torch.equal(kept.first, token) and kept.tokens == 4 and kept.high.tolist() == [[1, 1]]
    joined = kept.with_first()
    assert joined.high.tolist() == [[30, 1]] and joined.low.tolist() == [[0, -2]]
    assert joined.rows[::4].equal(token.expand(2, 2)) and not joined.rows[1:4].any()
    first.take(torch.ones(1, 4, 2))
    lost = first.into(entry)
    assert lost.first is None and lost.high.tolist() == [[30, 1]]


def test_statistics_follow_the_structure():
    torch.manual_seed(0)
    conv = table(torch.randn(6, 9 * 5), torch.randn(20, 5), ["conv"])
    text = table(torch.randn(6, 3), torch.randn(9, 3), ["to_k", "to_v"])
    text.first, text.tokens = 40 * torch.ones(3), 3
    outputs = {name: torch.ones(1) for name in ("conv", "to_k", "to_v")}
    whole = Statistics([5.0], {"conv": conv, "to_k": text}, outputs)
    changed = divide(whole, Structure(split={"conv": 2}, first_token=["to_k", "to_v"]))
    assert list(changed.inputs) == ["conv.hidden", "conv.skip", "to_k.rest"]
    assert changed.inputs["conv.skip"].low.equal(conv.low[:, 2:])
    assert changed.inputs["conv.skip"].rows.equal(conv.rows[:, 18:]) and changed.inputs["conv.hidden"].taps == 9
    assert changed.inputs["to_k.rest"].layers == ["to_k.rest", "to_v.rest"]
    assert set(changed.outputs) == {"conv.hidden", "conv.skip", "to_k.rest", "to_v.rest"}
    plain = divide(whole, Structure())
    assert plain.inputs["to_k"].high.max() == 40 and plain.inputs["conv"] is conv


def test_smoothing_factors_of_a_convolution_belong_to_its_channels():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 12, 12) * torch.tensor([1.0, 30, 1, 1])[:, None, None]
    layer = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    entry = table(sample_windows(layer, x, 64, torch.Generator()), tokens(layer, x), ["conv"])
    int8 = format_named("int8")
    layer_group = LayerGroup(
        ["conv"], [layer.weight.detach().flatten(1)], entry.columns(), int8, int8, False, "Conv2d", 9
    )
    decisions = apply_method("smooth", {}, layer_group, Decisions())
    factors = decisions.input_multiplier.view(4, 9)
    assert factors.amin(1).equal(factors.amax(1)) and factors[1, 0] == factors.min()
    for name in LINEAR_ONLY:
        assert apply_method(name, {}, layer_group, decisions).input_multiplier is decisions.input_multiplier, name


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A random U-Net's trajectory and statistics, and how to load it."""
    from qdiff.calib.collect import Collector
    from qdiff.calib.record import Recording, record

    folder = tmp_path_factory.mktemp("unet")

    def load():
        return FAMILIES["stable-diffusion"].load("random:sd-tiny")

    model = load()
    record(model, Recording(["a cat", "a red apple"], steps=3, keep=3, batch=2), folder)
    trajectory = Trajectory(folder)
    statistics = Collector(model, trajectory, "").collect(folder / "partial.safetensors")
    statistics.save(folder / "statistics.safetensors")
    return load, trajectory, Statistics.load(folder / "statistics.safetensors"), folder


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def test_calibration_finds_what_a_unet_has(unet):
    load, _, statistics, _ = unet
    backbone = load().backbone
    layers = quantizable_layers(backbone)
    firsts = [name for entry in statistics.inputs.values() if entry.first is not None for name in entry.layers]
    assert sorted(firsts) == sorted(name for name in layers if name.endswith((".attn2.to_k", ".attn2.to_v")))
    splits = FAMILIES["stable-diffusion"].splits(backbone)
    assert set(splits) == {n for n in layers if n.startswith("up_blocks") and n.endswith((".conv1", ".conv_shortcut"))}
    assert statistics.inputs["conv_in"].taps == 9 and statistics.inputs["conv_in"].low.shape[1] == 4


def test_the_changed_float_model_is_the_model(unet):
    load, trajectory, statistics, _ = unet
    step = next(iter(trajectory))
    model, changed = load(), load()
    splits = model.family.splits(model.backbone)
    states = {n: e.first for e in statistics.inputs.values() if e.first is not None for n in e.layers}
    for each in (model, changed):
        each.backbone.double()
    doubles = {name: state.double() for name, state in states.items()}
    restructure(changed.backbone, Structure(split=splits, first_token=list(states)), doubles)
    inputs = {name: value.double() for name, value in step.inputs.items()}
    with torch.inference_mode():
        wanted, got = model.family.call(model.backbone, inputs), model.family.call(changed.backbone, inputs)
    assert (wanted - got).abs().max() <= 1e-10 * wanted.abs().max()


def test_a_quantized_unet_comes_back_from_its_file(unet, tmp_path):
    load, trajectory, statistics, _ = unet
    step = next(iter(trajectory))
    model = load()
    with torch.inference_mode():
        wanted = model.family.call(model.backbone, step.inputs)
    plan = quantize(model, load_recipe("int8"), statistics, trajectory)
    with torch.inference_mode():
        got = model.family.call(model.backbone, step.inputs)
    assert 20 < sqnr(wanted, got) < 70
    kinds = {layer.kind for layer in plan.quantized}
    assert kinds == {"Linear", "Conv2d"} and plan.structure.split and plan.structure.first_token
    names = {layer.name for layer in plan.quantized}
    assert all({f"{name}.hidden", f"{name}.skip"} <= names for name in plan.structure.split)
    assert not names & {"conv_in", "conv_out"} and all(".rest" in n for n in names if "attn2.to_k" in n)
    plan.save(tmp_path / "plan.json")
    save_quantized(model.backbone, plan, tmp_path / "model.safetensors")
    again = load_quantized(Plan.load(tmp_path / "plan.json"), tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(model.family.call(again, step.inputs), got)
    wrong = plan.model_copy(update={"structure": Structure(split={"conv_nowhere": 3})})
    with pytest.raises(IntegrityError, match="conv_nowhere"):
        load_quantized(wrong, tmp_path / "model.safetensors")


def test_structures_can_be_left_out_and_change_the_result(unet):
    load, trajectory, statistics, _ = unet
    step = next(iter(trajectory))
    results = []
    for off in ([], ["split_shortcuts=false"], ["first_token=false"]):
        model = load()
        plan = quantize(model, load_recipe("int8", off), statistics, trajectory)
        assert bool(plan.structure.split) == ("split_shortcuts=false" not in off)
        assert bool(plan.structure.first_token) == ("first_token=false" not in off)
        with torch.inference_mode():
            results.append(model.family.call(model.backbone, step.inputs))
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_convolution_refuses_formats_that_its_input_cannot_have(unet):
    load, trajectory, statistics, _ = unet
    for change, words in (
        ("scheme={weights: int8, activations: int8, per_token: true}", "cannot have scales per token"),
        ("scheme={weights: int8, activations: mxfp8}", "cannot have mxfp8's blocks"),
    ):
        with pytest.raises(InputError, match=words):
            quantize(load(), load_recipe("int8", [change, "quantize_outputs={}"]), statistics, trajectory)


def test_scales_by_token_leave_convolutions_their_constant_ones(unet):
    load, trajectory, statistics, _ = unet
    model = load()
    plan = quantize(model, load_recipe("int8-token", ["sequential.tokens=64"]), statistics, trajectory)
    assert {layer.kind for layer in plan.quantized if layer.per_token} == {"Linear"}
    for layer in plan.quantized:
        assert (model.backbone.get_submodule(layer.name).input_scale is None) == layer.per_token


def test_a_unet_is_distilled_with_its_convolutions(unet):
    load, trajectory, statistics, _ = unet
    recipe = load_recipe(
        "int8", ["scheme={weights: int4_g32, activations: int8}", "distil={iterations: 12, rate: 0.05}"]
    )
    model = load()
    plan = quantize(model, recipe, statistics, trajectory)
    convolutions = [layer for layer in plan.quantized if layer.kind == "Conv2d"]
    assert convolutions and all("distil" in layer.methods for layer in plan.quantized)
    kinds = {type(model.backbone.get_submodule(layer.name)).__name__ for layer in convolutions}
    assert kinds == {"QuantConv2d"}


def test_the_blocks_of_a_unet_are_listed_in_the_order_of_their_calls(unet):
    load, trajectory, _, _ = unet
    model = load()
    blocks = model.family.blocks(model.backbone)
    called: list[str] = []
    for name in blocks:
        hook = model.backbone.get_submodule(name).register_forward_pre_hook
        hook(lambda module, args, name=name: called.append(name))
    with torch.inference_mode():
        model.family.call(model.backbone, next(iter(trajectory)).inputs)
    assert called == blocks and not model.family.chain
    inside = {n for n in quantizable_layers(model.backbone) if any(n.startswith(f"{block}.") for block in blocks)}
    assert {n.rpartition(".")[2] for n in set(quantizable_layers(model.backbone)) - inside} <= {
        "conv_in", "conv_out", "linear_1", "linear_2", "proj_in", "proj_out", "conv"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_a_unet_is_quantized_block_by_block_and_goes_on_after_a_kill(unet, tmp_path, learned):
    from qdiff.runs.partial import Scratch

    load, trajectory, statistics, _ = unet
    changes = ["scheme={weights: int4_g32, activations: int8}", "sequential={tokens: 64}"]
    if learned:
        changes += ["methods={}", "sequential.reconstruct={method: adaround, iterations: 12, rate: 0.1}"]
    else:
        changes.append("methods={gptq: {damping: 0.1}}")
    recipe = load_recipe("int8", changes)

    class Killed(Exception):
        pass

    class Dying(Scratch):
        kept = 0

        def save(self, name, tensors, facts):
            super().save(name, tensors, facts)
            Dying.kept += 1
            if Dying.kept == 3:
                raise Killed

    whole = load()
    plan = quantize(whole, recipe, statistics, trajectory, Scratch(tmp_path / "whole", "x"))
    with pytest.raises(Killed):
        quantize(load(), recipe, statistics, trajectory, Dying(tmp_path / "parts", "x"))
    resumed = load()
    again = quantize(resumed, recipe, statistics, trajectory, Scratch(tmp_path / "parts", "x"))
    assert again == plan
    state, other = whole.backbone.state_dict(), resumed.backbone.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    roundings = {layer.rounding for layer in plan.quantized if layer.kind == "Conv2d"}
    assert ("adaround" in roundings) == learned and roundings - {"nearest"}
