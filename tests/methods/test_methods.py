"""What every quantization method has to do, and that each wins on the trouble that it is for."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from qdiff.errors import InputError
from qdiff.formats.table import format_named
from qdiff.methods import METHODS, Decisions, LayerGroup, apply_method
from qdiff.methods.element import sisters
from qdiff.methods.gptq import inverse_factor, round_columns
from qdiff.methods.rotate import fluctuation, rotated
from qdiff.nn.rotations import hadamard, zigzag
from qdiff.recording.activation_statistics import HISTOGRAM_BINS, InputStatistics


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_group(
    x: torch.Tensor, layers: int = 2, seed: int = 9, weights: str = "int8", activations: str = "int8"
) -> LayerGroup:
    """A group of layers that reads ``x [T, tokens, channels]``; all tokens are fitting or held-out ones."""
    timesteps, tokens, channels = x.shape
    statistics = InputStatistics(
        layers=[f"layer{i}" for i in range(layers)],
        low=x.amin(1),
        high=x.amax(1),
        square=x.square().mean(1),
        histogram=torch.zeros(timesteps, HISTOGRAM_BINS),
        rows=x.reshape(-1, channels),
        rows_timestep=torch.arange(timesteps).repeat_interleave(tokens),
    )
    values = [randn(24, channels, seed=seed + i) for i in range(layers)]
    return LayerGroup(statistics.layers, values, statistics, format_named(weights), format_named(activations))


def plain() -> LayerGroup:
    return layer_group(randn(4, 64, 32))


def outlier_channels() -> LayerGroup:
    x = randn(4, 64, 32)
    x[..., 5] *= 80
    x[..., 11] *= 40
    return layer_group(x)


def moving_range() -> LayerGroup:
    return layer_group(randn(4, 64, 32).clamp(-3, 3) * torch.tensor([50.0, 10.0, 3.0, 1.0])[:, None, None])


def heavy_tail() -> LayerGroup:
    # One value of half a million is five times as large as all others: the cut costs less than the finer grid gains.
    x = randn(4, 4096, 32).clamp(-2, 2)
    x[0, 0, 3] = 10.0
    return layer_group(x)


def correlated() -> LayerGroup:
    x = randn(4, 64, 3) @ randn(3, 32, seed=1) + 0.05 * randn(4, 64, 32, seed=2)
    return layer_group(x, weights="int4_g32", activations="float16")


def coarse_blocks() -> LayerGroup:
    return layer_group(randn(4, 64, 32), weights="nvfp4", activations="float16")


def few_directions() -> LayerGroup:
    given = layer_group(randn(4, 64, 32), weights="int4_g32", activations="float16")
    for i, weight in enumerate(given.weights):
        weight += 30 * randn(24, 2, seed=i) @ randn(2, 32, seed=i + 5)
    return given


def large_on_average() -> LayerGroup:
    """Few channels carry the signal: their weights' rounding is what counts."""
    x = randn(4, 64, 32)
    x[..., 5] *= 30
    x[..., 11] *= 20
    return layer_group(x, weights="int4_g32", activations="float16")


def one_sided() -> LayerGroup:
    """As after a GELU: nothing below -0.2."""
    return layer_group(torch.nn.functional.gelu(randn(4, 64, 32) * 4))


def unequal_channels() -> LayerGroup:
    return layer_group(randn(4, 64, 32) * torch.logspace(-1.5, 1, 32) + 3 * torch.logspace(-1.5, 1, 32))


def outlier_values() -> LayerGroup:
    """One large value a token, each time in another channel: no scale a channel helps."""
    x = randn(4, 64, 32)
    where = torch.randint(32, (4, 64, 1), generator=torch.Generator().manual_seed(3))
    return layer_group(x.scatter(-1, where, 40.0), weights="int8")


def powers_of_two() -> LayerGroup:
    """Weights that lie on E3M0's grid, in a recipe that says E2M1."""
    given = layer_group(randn(4, 64, 128), weights="fp4_e2m1_g128", activations="float16")
    for i, weight in enumerate(given.weights):
        weight.copy_(torch.exp2(-randn(24, 128, seed=i).abs().mul(2).floor().clamp(max=5)) * weight.sign())
    return given


def off_centre() -> LayerGroup:
    """Weights of few bits under inputs with a mean: their error moves every output one way."""
    return layer_group(randn(4, 64, 32) * 0.1 + 2, weights="int4_g32", activations="float16")


def own_means() -> LayerGroup:
    """Four pictures, of which the tokens have much in common, each picture's its own."""
    x = randn(4, 64, 32) + 5 * randn(4, 1, 32, seed=1)
    given = layer_group(x, activations="nvfp4")
    given.statistics.means, given.statistics.rows_sample = x.mean(dim=1), torch.arange(4).repeat_interleave(64)
    return given


TROUBLES = {
    "bias": off_centre,
    "element": powers_of_two,
    "awq": large_on_average,
    "repq": unequal_channels,
    "rotate": outlier_values,
    "shift": one_sided,
    "smooth": outlier_channels,
    "timestep_scales": moving_range,
    "clip": heavy_tail,
    "center": own_means,
    "dgq": outlier_channels,
    "gptq": correlated,
    "scales": coarse_blocks,
    "low_rank": few_directions,
}


def trouble_of(method: str) -> LayerGroup:
    """The layer group that a method is for."""
    assert method in TROUBLES, f"{method} has no row in TROUBLES: name the layer group that it is for (CONTRIBUTING.md)"
    return TROUBLES[method]()


OPTIONS: dict[str, dict] = {"clip": {"ratios": (1.0, 0.8, 0.6, 0.4, 0.3)}, "low_rank": {"rank": 4}}
# What a method has to win where its trouble is. Of the scale search it is known: 6.67e-3 for 9.03e-3 on Gaussian weights, 1.3 dB.
GAINS_DB = {"scales": 1.0}


@pytest.mark.parametrize("make", [plain, outlier_channels, moving_range, heavy_tail])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_never_worse_on_the_fitting_tokens_and_says_why(name, make):
    given = make()
    others = [other for other in METHODS if other != name]
    starts = [Decisions(), *(apply_method(other, OPTIONS.get(other, {}), given, Decisions()) for other in others)]
    for start in starts:
        found = apply_method(name, OPTIONS.get(name, {}), given, start)
        assert given.error(found) <= given.error(start) * (1 + 1e-9)
        assert found.methods == (*start.methods, name)
        assert len(found.notes) == len(start.notes) + 1 and found.notes[-1].strip()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_unknown_option_is_refused_with_the_nearest(name):
    with pytest.raises(InputError, match="has no option 'minimum_gain'"):
        apply_method(name, {"minimum_gain": 1}, plain(), Decisions())


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean smooth"):
        apply_method("smoth", {}, plain(), Decisions())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_wins_where_its_trouble_is(name):
    """By 3 dB at least, which is half a bit, or what it can (GAINS_DB), and on tokens that it did not see."""
    given = trouble_of(name)
    found = apply_method(name, OPTIONS.get(name, {}), given, Decisions())
    before, after = given.errors(Decisions(), held_out=True), given.errors(found, held_out=True)
    assert sum(after) < sum(before) / 10 ** (GAINS_DB.get(name, 3.0) / 10), found.notes
    assert found != Decisions().decide(name, found.notes[-1])


def made_to_act(method: str) -> dict:
    """Return options with which a method acts even where it gains nothing, where it has an option for that."""
    known = inspect.signature(METHODS[method]).parameters
    return {**({"minimum_gain_db": -100.0} if "minimum_gain_db" in known else {}), **OPTIONS.get(method, {})}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_another_result_than_every_other(name):
    """A method that does nothing, or what another does, is a bug. Where a method's trouble is, each of the others, made to act,
    gives another error than it, and so does no method at all."""
    given = trouble_of(name)
    errors = {"none": given.error(Decisions())}
    for method in METHODS:
        errors[method] = given.error(apply_method(method, made_to_act(method), given, Decisions()))
    same = [other for other, error in errors.items() if other != name and error == errors[name]]
    assert not same, errors


def test_smoothing_moves_the_range_into_the_weight_and_keeps_the_product():
    given = outlier_channels()
    found = apply_method("smooth", {"strengths": (0.5,)}, given, Decisions())
    assert found.smoothing == 0.5 and found.input_multiplier is not None
    assert found.input_multiplier[5] < found.input_multiplier.median() / 4
    x, weight, m = (t.double() for t in (given.statistics.rows, given.weights[0], found.input_multiplier))
    assert ((x * m) @ (weight / m).T - x @ weight.T).abs().max() <= 1e-10
    assert torch.equal(given.ranges(found), (given.statistics.amax * found.input_multiplier).amax(1))


def test_timestep_scales_bring_every_timestep_to_the_widest_range():
    given = moving_range()
    found = apply_method("timestep_scales", {}, given, Decisions())
    scale, stretch = given.activation_scale(found)
    assert stretch is not None and float(stretch.min()) == 1
    assert torch.allclose(given.ranges(found) * stretch, given.ranges(found).max().expand(4), rtol=2**-10)
    assert torch.allclose(scale, given.ranges(found).max() / 127, rtol=2**-10)


@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-6])
def test_a_timestep_without_a_signal_makes_no_nan(small):
    x = randn(3, 64, 32)
    x[1] *= small
    given = layer_group(x)
    for name in METHODS:
        found = apply_method(name, made_to_act(name), given, Decisions())
        assert all(error == error and error < 1 for error in given.errors(found)), (name, found.notes)
        _, stretch = given.activation_scale(found)
        assert stretch is None or torch.isfinite(stretch.half()).all()


@pytest.mark.parametrize("kind", ["hadamard", "randomised", "outlier"])
def test_a_rotation_keeps_the_product(kind):
    """In float64 to 1e-10; the fitted factors lie on the float16 grid, and the weight carries their exact inverse."""
    given = outlier_values()
    start = Decisions().decide(
        "smooth", "", input_multiplier=(randn(32).abs() + 0.5).half().float(), shift=randn(32).half().float()
    )
    found = rotated(given, start, kind, 16)
    assert found.rotation is not None and (found.rotation.first is not None) == (kind == "outlier")
    x = given.statistics.rows.double()
    moved = found.rotation.forward(x * found.input_multiplier.double() - found.shift.double())
    for weight in given.weights:
        turned = found.rotation.weight(weight.double() / found.input_multiplier.double())
        constant = (weight.double() / found.input_multiplier.double()) @ found.shift.double()
        assert (moved @ turned.T + constant - x @ weight.double().T).abs().max() <= 1e-10
    assert found.inputs(x.float()).abs().max() < start.inputs(x.float()).abs().max() / 1.5


def test_the_regular_hadamard_matrix_makes_no_outlier_of_a_constant():
    """The all-ones column of Sylvester's matrix sums a constant row up to sqrt(block) times itself (ConvRot)."""
    matrix = hadamard(64)
    assert torch.equal(matrix @ matrix, torch.eye(64)) and torch.equal(matrix, matrix.T)
    assert (torch.ones(64) @ matrix).abs().max() == 1


def test_channels_are_dealt_in_a_zigzag():
    order = zigzag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), 4)
    assert sorted(order.tolist()) == list(range(8))
    assert order[:4].tolist() == [7, 4, 3, 0] and order[4:].tolist() == [6, 5, 2, 1]


def test_fluctuation_chooses_the_kind():
    """LRQ-DiT's rule: J below 1 a Hadamard matrix, above it the rotation fitted to outliers."""
    small, large = outlier_values(), outlier_values()
    small.statistics.rows /= 100
    large.statistics.rows *= 100
    for given, fitted in ((small, False), (large, True)):
        given.statistics.low, given.statistics.high = (
            t * (0.01 if not fitted else 100) for t in (given.statistics.low, given.statistics.high)
        )
        assert (fluctuation(given.statistics.rows) >= 1) == fitted
        found = apply_method("rotate", {"choice": "fluctuation", "minimum_gain_db": -100}, given, Decisions())
        assert (found.rotation.first is not None) == fitted, found.notes


def test_a_layer_that_no_block_divides_is_named():
    with pytest.raises(InputError, match="divides the 30 columns of layer layer0"):
        apply_method("rotate", {}, layer_group(randn(4, 64, 30)), Decisions())


@pytest.mark.parametrize("name", ["shift", "repq"])
def test_the_bias_gives_back_what_a_shift_takes(name):
    """Through the weight as it is in the layer, so the weight's own error meets the input and not the shifted input."""
    given = unequal_channels()
    found = apply_method(name, {"minimum_gain_db": -100.0}, given, Decisions())
    assert found.shift is not None
    x = given.rows(held_out=True).x
    moved, plain = found.inputs(x), replace(found, shift=None)
    for weight, bias in zip(given.quantized_weights(found), given.biases(found), strict=True):
        expected = plain.inputs(x) @ weight.dequantize().T
        torch.testing.assert_close(moved @ weight.dequantize().T + bias, expected, rtol=1e-4, atol=1e-4)
    if name == "repq":
        low, high = (found.inputs(end) for end in (given.statistics.low.amin(0), given.statistics.high.amax(0)))
        torch.testing.assert_close(-low, high, rtol=0.01, atol=0.01 * float(high.max()))
        torch.testing.assert_close(high, high.mean().expand(32), rtol=0.01, atol=0.01 * float(high.max()))


def test_a_corrected_bias_leaves_no_mean_error():
    given = off_centre()
    found = apply_method("bias", {}, given, Decisions())
    rows = given.rows(held_out=False)
    for weight, output in zip(given.weights, given.outputs(found, rows), strict=True):
        assert (output - rows.x @ weight.T).mean(0).abs().max() < 1e-4


def test_ranges_after_a_shift_are_those_of_all_values_not_of_the_tokens():
    given = one_sided()
    found = apply_method("shift", {}, given, Decisions())
    given.statistics.rows = given.statistics.rows[:2]
    given.statistics.rows_timestep = given.statistics.rows_timestep[:2]
    low, high = given.statistics.low - found.shift, given.statistics.high - found.shift
    assert torch.equal(given.ranges(found), torch.maximum(low.abs(), high.abs()).amax(1))


def test_a_centered_token_keeps_its_mean_and_its_range():
    """The mean, quantized twice, is nearly what it was; every value that meets the quantizer is within the range; and codes for
    the weights that were chosen before stay."""
    given = own_means()
    chosen = apply_method("gptq", {}, given, Decisions())
    found = apply_method("center", {}, given, chosen)
    assert found.centered and found.rounded is chosen.rounded
    rows = given.rows(held_out=True)
    reach = given.ranges(found)[rows.timestep]
    assert ((rows.x - rows.means).abs().amax(1) <= reach).all() and (rows.means.abs().amax(1) <= reach).all()
    alone = rows._replace(x=rows.means)
    lost = (given.quantized_inputs(found, alone) - rows.means).square().mean() / rows.means.square().mean()
    once = (given.quantized_inputs(chosen, alone) - rows.means).square().mean() / rows.means.square().mean()
    assert lost < once / 50


@pytest.mark.parametrize(("activations", "known", "why"), [("int8", True, "blocks"), ("nvfp4", False, "no mean")])
def test_what_cannot_be_centered_is_not(activations, known, why):
    given = own_means()
    given.activation_format = format_named(activations)
    if not known:
        given.statistics.means = None
    found = apply_method("center", {"minimum_gain_db": -100.0}, given, Decisions())
    assert not found.centered and why in found.notes[-1]


def test_blocks_scaled_at_run_time_are_shifted_by_means():
    """Middles of ranges are where rare large values pull them; with scales by block the others are nearer to their mean."""
    x = randn(4, 64, 32) + 2 * randn(32, seed=3)
    x[0, 0] += 40
    given = layer_group(x, weights="nvfp4", activations="nvfp4")
    found = apply_method("shift", {}, given, Decisions())
    torch.testing.assert_close(found.shift, x.mean((0, 1)), rtol=1e-3, atol=1e-3)
    assert "by its mean gain" in found.notes[-1]


def test_the_element_is_chosen_among_formats_of_one_size():
    found = apply_method("element", {}, powers_of_two(), Decisions())
    assert found.weight_format is not None and found.weight_format.name == "fp4_e3m0_g128", found.notes
    assert sisters(format_named("fp4_e2m1_g128")) == ["int4_g128", "fp4_e1m2_g128", "fp4_e3m0_g128"]
    assert sisters(format_named("int8")) == ["fp8", "fp8_e5m2"] and sisters(format_named("mxfp4")) == []
    with pytest.raises(InputError, match="nvfp4 has other bits, blocks or scales than fp4_e2m1_g128"):
        apply_method("element", {"candidates": ("nvfp4",)}, powers_of_two(), Decisions())
    searched = apply_method(
        "scales", {"rules": ("four_over_six",), "minimum_gain_db": -100}, coarse_blocks(), Decisions()
    )
    changed = apply_method("element", {"minimum_gain_db": -100}, coarse_blocks(), searched)
    assert changed.weight_format is not None and changed.weight_format.name == "nvint4" and changed.scale_rule == "amax"


def test_gptq_with_uncorrelated_inputs_rounds_to_nearest():
    """H = 1: no column can make up for another."""
    given = correlated()
    weight, nearest = given.weights[0], given.nearest_weights(Decisions())[0]
    values = round_columns(weight, nearest, torch.eye(32, dtype=torch.float64), torch.arange(32), 8)
    assert torch.equal(nearest.with_values(values).codes, nearest.codes)


@pytest.mark.parametrize("weights", ["int8", "int4_g32", "fp8", "nvfp4", "mxfp4"])
def test_gptq_never_loses_on_its_hessian_and_stays_on_the_grid(weights):
    given = layer_group(correlated().statistics.rows.reshape(4, 64, 32), weights=weights, activations="float16")
    x = given.rows(held_out=False).x.double()
    hessian = x.T @ x
    found = apply_method("gptq", {}, given, Decisions())
    assert found.rounding == "gptq" and found.rounded is not None, found.notes
    for weight, nearest, rounded in zip(given.weights, given.nearest_weights(Decisions()), found.rounded, strict=True):
        losses = [
            torch.trace(d @ hessian @ d.T) for d in (q.dequantize().double() - weight for q in (nearest, rounded))
        ]
        assert losses[1] < losses[0]
        assert torch.equal(rounded.scale.float(), nearest.scale.float()) and rounded.codes.dtype == nearest.codes.dtype


def test_gptq_does_not_depend_on_how_it_is_blocked():
    given = correlated()
    results = [apply_method("gptq", {"width": width}, given, Decisions()).rounded for width in (1, 5, 32)]
    assert all(torch.equal(r[0].codes, results[0][0].codes) for r in results)


def test_gptq_says_which_layer_has_too_little():
    few = layer_group(randn(1, 2, 32))
    with pytest.raises(InputError, match="layer layer0 has 1 tokens"):
        apply_method("gptq", {}, few, Decisions())
    with pytest.raises(InputError, match="layer0 have no positive definite Hessian"):
        inverse_factor(torch.full((4, 4), float("nan"), dtype=torch.float64), 0.01, ["layer0"])
    still = layer_group(torch.zeros(2, 8, 32))
    assert apply_method("gptq", {}, still, Decisions()).rounding == "nearest"


@pytest.mark.parametrize("weighted", [False, True])
def test_branch_and_rest_are_the_weight(weighted):
    given = few_directions()
    found = apply_method("low_rank", {"rank": 4, "weighted": weighted}, given, Decisions())
    assert found.low_rank is not None and found.rank == 4
    for weight, rest, (down, up) in zip(given.weights, given.residuals(found), found.low_rank, strict=True):
        assert ((up @ down + rest) - weight).abs().max() <= 1e-5 * weight.abs().max()
        assert torch.equal(down, down.half().float()) and torch.equal(up, up.half().float())


def test_a_rank_as_large_as_the_layer_is_refused_by_name():
    with pytest.raises(InputError, match=r"rank 24 is not smaller than layer layer0 of shape \[24, 32\]"):
        apply_method("low_rank", {"rank": 24}, plain(), Decisions())


def test_a_later_transform_drops_codes_that_were_rounded_for_an_earlier_one():
    rounded = apply_method("gptq", {}, correlated(), Decisions())
    moved = rounded.decide("smooth", "", input_multiplier=torch.ones(32))
    assert rounded.rounded is not None and moved.rounded is None and moved.rounding == "nearest"
