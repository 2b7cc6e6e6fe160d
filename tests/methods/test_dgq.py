"""DGQ: the axis that outliers lie on, groups of channels as a multiplier, and scales per token from the decision to the graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qdiff.export.parity import COSINE
from qdiff.files import read_json
from qdiff.formats.dynamic import quantize_dequantize_tokens
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup, apply_method
from qdiff.methods.dgq import Division, choose_division, group_ranges, k_means, levelled, spreads
from qdiff.plan.plan import Plan
from qdiff.recording.activation_statistics import HISTOGRAM_BINS, InputStatistics


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_group(x: torch.Tensor, activations: str = "int8", kind: str = "Linear", taps: int = 1) -> LayerGroup:
    """A layer that reads the tokens ``x [N, in]`` of two timesteps."""
    halves = x.unflatten(0, (2, -1))
    timestep = torch.arange(2).repeat_interleave(len(x) // 2)
    tables = (halves.amin(1), halves.amax(1), halves.square().mean(1), torch.zeros(2, HISTOGRAM_BINS))
    statistics = InputStatistics(["layer"], *tables, x, timestep)
    int8 = format_named("int8")
    return LayerGroup(
        ["layer"], [randn(24, x.shape[1], seed=9)], statistics, int8, format_named(activations), False, kind, taps
    )


def outlier_channels() -> torch.Tensor:
    """Channels that are large in every token."""
    x = randn(256, 32)
    x[:, 5] += 80
    x[:, [11, 20]] -= 30
    return x


def outlier_tokens() -> torch.Tensor:
    """Tokens that are large in every channel, among the fitting ones (even) and the held-out ones (odd)."""
    x = randn(256, 32)
    x[[10, 77, 140, 201]] += 80
    return x


def smoothed() -> Decisions:
    multiplier, shift = (randn(32, seed=3).abs() + 0.5).half().float(), randn(32, seed=4).half().float()
    return Decisions(smoothing=0.5, input_multiplier=multiplier, shift=shift)


def test_d_adds_the_spreads_of_the_largest_and_of_the_least_values():
    given = layer_group(torch.tensor([[0.0, 1], [-2, 8]]).repeat_interleave(2, 0))  # each once among the fitting tokens
    assert spreads(given, Decisions()) == {"channel": (8 - 0) + (1 + 2), "token": (8 - 1) + (0 + 2)}
    assert spreads(given, Decisions(input_multiplier=torch.tensor([2.0, 1])))["channel"] == (8 - 0) + (1 + 4)


def test_d_is_wide_on_the_axis_of_the_outliers():
    for make, wide, narrow in ((outlier_channels, "channel", "token"), (outlier_tokens, "token", "channel")):
        found = spreads(layer_group(make()), Decisions())
        assert found[wide] > 4 * found[narrow], make.__name__


@pytest.mark.parametrize(
    ("make", "won"), [(outlier_channels, "8 groups of channels"), (outlier_tokens, "scales per token")]
)
def test_each_trouble_is_cured_on_its_axis(make, won):
    given = layer_group(make())
    found = apply_method("dgq", {"tokens": True}, given, Decisions())
    assert found.notes[0].startswith(won) and "D " in found.notes[0] and "by channel" in found.notes[0]
    assert (found.per_token is True) == (make is outlier_tokens) and (found.input_multiplier is None) == (
        found.per_token is True
    )
    before, after = given.errors(Decisions(), held_out=True), given.errors(found, held_out=True)
    assert after[0] < before[0] / 2


def test_d_settles_what_the_outputs_leave_open():
    channel, token = (Division(axis, "", {}, gain) for axis, gain in (("channel", 2.0), ("token", 2.05)))
    assert (
        choose_division([channel, token], "channel", 0.1) is channel
        and choose_division([channel, token], "token", 0.1) is token
    )
    clearly = replace(token, gain=3.0)
    assert choose_division([channel, clearly], "channel", 0.1) is clearly
    barely = [replace(channel, gain=0.05), replace(token, gain=0.12)]
    assert choose_division(barely, "channel", 0.1) is barely[1], "what gains too little is no choice"
    assert choose_division([channel, token], "channel", -100) is token


def test_one_group_is_the_scale_of_the_tensor():
    given = layer_group(outlier_channels())
    changes = levelled(Decisions(), group_ranges(given, Decisions(), 1), 1.0)
    assert torch.equal(changes["input_multiplier"], torch.ones(32))
    found = apply_method("dgq", {"groups": 1}, given, Decisions())
    assert found.input_multiplier is None and found.notes[0].startswith("scales not divided")
    rows = given.rows(held_out=True)
    one = Decisions(input_multiplier=changes["input_multiplier"])
    for plain, grouped in zip(given.outputs(Decisions(), rows), given.outputs(one, rows), strict=True):
        assert torch.equal(plain, grouped)


@pytest.mark.parametrize("count", [1, 3, 8, 50])
def test_groups_are_a_partition_and_the_same_every_time(count):
    points = torch.cat([randn(40, 2), torch.tensor([[-90.0, 100], [-91, 101], [0, 60]])])
    labels = k_means(points, count)
    assert (
        labels.shape == (43,)
        and set(labels.tolist()) <= set(range(count))
        and torch.equal(labels, k_means(points, count))
    )
    order = torch.randperm(43, generator=torch.Generator().manual_seed(5))
    moved = k_means(points[order], count)
    assert torch.equal(moved[:, None] == moved, labels[order][:, None] == labels[order]), "whatever their order"
    if 1 < count < 43:
        assert labels[40] == labels[41] and (labels == labels[40]).sum() == 2, "outliers stand apart"
    assert k_means(torch.ones(5, 2), count).tolist() == [0] * 5


def test_groups_have_one_factor_each_and_come_to_one_range():
    given = layer_group(outlier_channels())
    ranges = group_ranges(given, Decisions(), 4)
    multiplier = levelled(Decisions(), ranges, 1.0)["input_multiplier"]
    assert 2 <= len(multiplier.unique()) == len(ranges.unique()) <= 4
    amax = (given.statistics.amax.amax(0) * multiplier).double()
    widest = torch.stack([amax[ranges == value].max() for value in ranges.unique()])
    assert (widest / widest.max() - 1).abs().max() < 2**-10, "what float16 leaves"
    assert abs(float(multiplier.log().mean())) < 2**-10


@pytest.mark.parametrize("start", [Decisions(), smoothed()], ids=["alone", "on smoothing and shift"])
def test_groups_change_nothing_without_rounding(start):
    """In float64 to 1e-10: weight and bias carry the inverse of what is on the input."""
    given = layer_group(outlier_channels())
    found = replace(start, **levelled(start, group_ranges(given, start, 8), 1.0))
    assert found.smoothing is None and len(found.input_multiplier.unique()) > 1
    x, weight, m = (t.double() for t in (given.statistics.rows, given.weights[0], found.input_multiplier))
    shift = torch.zeros(32).double() if found.shift is None else found.shift.double()
    got = (x * m - shift) @ (weight / m).T + (weight / m) @ shift
    wanted = x @ weight.T
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    if found.shift is not None:
        ratio = found.input_multiplier / start.input_multiplier
        torch.testing.assert_close(found.shift, start.shift * ratio, rtol=2**-10, atol=2**-24)


def test_tokens_are_asked_for_and_only_of_linear_layers_with_a_constant_scale():
    tokens = {"tokens": True, "groups": 1}
    x = outlier_tokens()
    assert apply_method("dgq", {"groups": 1}, layer_group(x), Decisions()).per_token is None
    assert apply_method("dgq", tokens, layer_group(x), Decisions()).per_token is True
    convolution = apply_method("dgq", tokens, layer_group(x, kind="Conv2d", taps=4), Decisions())
    assert convolution.per_token is None
    for activations in ("mxfp8", "float16"):
        found = apply_method("dgq", tokens, layer_group(x, activations=activations), Decisions())
        assert found.per_token is None and found.notes == ("its input has no scale that could be divided",)
    already = apply_method("dgq", tokens, layer_group(x), Decisions(per_token=True))
    assert already.notes[0].startswith("scales not divided")


def test_groups_of_a_convolution_are_of_channels_and_not_of_taps():
    given = layer_group(outlier_channels(), kind="Conv2d", taps=4)
    given.statistics.low, given.statistics.high = (
        end.unflatten(1, (-1, 4))[:, :, :1].expand(-1, -1, 4).flatten(1)
        for end in (given.statistics.low, given.statistics.high)
    )
    multiplier = levelled(Decisions(), group_ranges(given, Decisions(), 3), 0.5)["input_multiplier"].unflatten(
        0, (-1, 4)
    )
    assert torch.equal(multiplier, multiplier[:, :1].expand(-1, 4)) and len(multiplier.unique()) > 1


def test_what_is_scaled_by_token_is_computed_so_and_has_no_constant_scale():
    given = layer_group(outlier_tokens())
    constant = Decisions(timestep_scales=True, clip=0.9)
    found = apply_method("dgq", {"tokens": True}, given, constant)
    assert found.per_token is True and found.clip == 1 and not found.timestep_scales
    assert given.static(constant) and not given.static(found) and given.activation_scale(found) == (None, None)
    rows = given.rows(held_out=True)
    expected = quantize_dequantize_tokens(rows.x, given.activation_format)
    assert torch.equal(given.quantized_inputs(found, rows), expected)
    for options in ({"minimum_gain_db": 0.0}, {"minimum_gain_db": -100.0}):
        after = apply_method("timestep_scales", options, given, found)
        assert not after.timestep_scales and after.per_token and "no constant scale" in after.notes[-1]
    back = replace(given, per_token=True)
    assert back.static(Decisions(per_token=False)) and not back.static(Decisions())


@pytest.mark.slow
def test_a_decision_for_tokens_reaches_plan_checkpoint_and_graph(cli, fails, spoilt):
    """On both sides of an attention with quantized outputs; ONNX Runtime agrees with torch, TensorRT is refused by name."""
    methods = (
        "methods={timestep_scales: {minimum_gain_db: -100}, dgq: {groups: 1, tokens: true, minimum_gain_db: -100}}"
    )
    assert cli("quantize", spoilt, "--recipe", "int8", "--set", methods, "--force").code == 0
    plan = Plan.load(spoilt / "plan.json")
    chosen = [layer for layer in plan.quantized if layer.per_token]
    assert chosen and any(layer.output for layer in chosen), "q and k among them"
    assert all("scales per token gain" in layer.why and not layer.timestep_scales for layer in chosen)
    tensors = load_file(spoilt / "model.safetensors")
    assert not any(
        f"{layer.name}.{table}" in tensors for layer in chosen for table in ("input_scale", "timestep_scales")
    )
    assert cli("export", spoilt, "--target", "onnxruntime", "--force").code == 0
    exported = read_json(spoilt / "run.json", "the manifest")["stages"]["export:onnxruntime"]
    realised = {name for name, found in exported["realised"].items() if found["per_token"]}
    assert realised == {layer.name for layer in chosen} and exported["parity"]["worst_cosine"] >= COSINE
    assert all(exported["realised"][layer.name]["output"] == layer.output for layer in chosen)
    fails(
        3,
        [chosen[0].name, "int8 x int8 with scales per token", "a constant scale"],
        "export",
        spoilt,
        "--target",
        "tensorrt",
        "--force",
    )
