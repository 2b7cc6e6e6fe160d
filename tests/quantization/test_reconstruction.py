"""Learned rounding: what the variables are, and that a block comes nearer to float on calls that it was not fitted on."""

from __future__ import annotations

import json

import pytest
import torch

from qdiff.errors import InputError
from qdiff.formats import elements
from qdiff.formats.table import FORMATS, format_named
from qdiff.formats.weight import QuantizedWeight, quantize_weight
from qdiff.methods import RECONSTRUCTIONS, check_reconstruction
from qdiff.methods.adaround import RoundedUpOrDown
from qdiff.methods.flexround import Divided
from qdiff.methods.learned import candidates, code_values
from qdiff.nn.quant_linear import QuantLinear, TimestepIndex
from qdiff.quantization import reconstruction
from qdiff.quantization.block_walk import BlockWalk
from qdiff.quantization.edited_plan import settle
from qdiff.quantization.quantize import quantize
from qdiff.quantization.reconstruction import BlockFit, codes_of, split
from qdiff.recipes import load_recipe
from qdiff.runs.partial import Scratch

FLOATS = ["nvfp4", "mxfp6_e3m2", "mxfp8", "fp4_e1m2_g128", "fp4_e3m0_g128"]
GRIDS = ["int4_g32", "int8", "nvint4", *FLOATS]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str) -> tuple[torch.Tensor, QuantizedWeight]:
    weight = randn(16, 256)
    return weight, quantize_weight(weight, format_named(name))


def on_scale_one(name: str, ratios: torch.Tensor) -> tuple[torch.Tensor, QuantizedWeight]:
    """A weight ``[1, n]`` whose values are ``ratios``, with a scale of 1 in a format with one scale a channel."""
    format = next(f for f in FORMATS.values() if f.element.name == name and not f.block and f.quantized)
    start = QuantizedWeight(format, torch.zeros(1, len(ratios), dtype=getattr(torch, format.storage)), torch.ones(1))
    return ratios[None], start.with_values(ratios[None])


def finite_values(name: str) -> torch.Tensor:
    element = format_named(name).element
    values = sorted({value for value in element.values() if element.lowest <= value <= element.highest})
    return torch.tensor(values)


@pytest.mark.parametrize("scale_aware", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_the_soft_weight_is_the_float_weight_at_first(name, scale_aware):
    weight, start = weight_of(name)
    variable = RoundedUpOrDown(weight, start, scale_aware)
    inside = (weight / variable.scale).abs() <= start.format.largest
    error = (variable() - weight).abs() / (variable.gap * variable.scale).clamp(min=1e-12)
    assert inside.float().mean() > 0.9  # the rest saturates: scales are rounded down
    # Of a step: sigmoid and logit of float32 numbers, and the ratio's own rounding next to the largest code.
    assert error[inside & (variable.gap > 0)].max() <= 8 * 2**-23 * max(1, start.format.largest)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp6_e3m2", "fp6_e2m3"])
def test_the_soft_weight_is_exact_at_and_between_all_codes(name):
    """Every code, every middle, and a quarter on either side of each, from the lowest to the highest."""
    values = finite_values(name)
    steps = values.diff()
    points = torch.cat([values, *(values[:-1] + share * steps for share in (0.25, 0.5, 0.75))])
    weight, start = on_scale_one(format_named(name).element.name, points)
    variable = RoundedUpOrDown(weight, start)
    assert ((variable() - weight).abs() <= 2**-20 * variable.unit).all()
    on_grid = torch.isin(points, values)
    assert torch.equal(variable.gap[0] == 0, on_grid)


@pytest.mark.parametrize("name", GRIDS)
def test_hard_values_are_one_of_the_two_neighbours_and_on_the_grid(name):
    weight, start = weight_of(name)
    variable = RoundedUpOrDown(weight, start)
    with torch.no_grad():
        variable.variable += 3 * randn(*weight.shape, seed=1) * variable.unit
    done = variable.finished()
    values = code_values(done)
    assert torch.equal(done.scale.float(), start.scale.float()) and done.codes.dtype == start.codes.dtype
    assert ((values == variable.lower) | (values == variable.upper)).all()
    assert torch.equal(values, elements.round_to_grid(values, start.format.element))
    below, above = elements.neighbours(weight / variable.scale, start.format.element)
    assert ((values == below) | (values == above)).all(), "rounded to nearest first: floor or ceiling of the weight"
    assert (values != code_values(start)).any(), "a step of three moves something"


def test_neighbours_across_a_border_of_binades_lie_on_different_steps():
    """E2M1: 0 0.5 1 1.5 2 3 4 6. Chosen 2: the other is 1.5 for a smaller weight, 3 for a larger one."""
    ratio = torch.tensor([1.9, 2.1, -1.9, -2.1, 3.9, 4.1, 0.1, -0.1, 2.0, 9.0])
    chosen = torch.tensor([2.0, 2.0, -2.0, -2.0, 4.0, 4.0, 0.0, 0.0, 2.0, 6.0])
    _, start = weight_of("nvfp4")
    below, above = candidates(ratio, chosen, start)
    assert below.tolist() == [1.5, 2, -2, -3, 3, 4, 0, -0.5, 2, 6]
    assert above.tolist() == [2, 3, -1.5, -2, 4, 6, 0.5, 0, 2, 6]


def test_a_code_that_is_no_neighbour_of_the_weight_stays_possible():
    """GPTQ went from 3 up to 6: learned rounding chooses between 6 and 4, the next towards the weight."""
    _, start = weight_of("nvfp4")
    below, above = candidates(torch.tensor([3.2, -0.1]), torch.tensor([6.0, 1.5]), start)
    assert (below.tolist(), above.tolist()) == ([4.0, 1.0], [6.0, 1.5])


@pytest.mark.parametrize("scale_aware", [True, False])
def test_all_binades_move_at_one_rate_where_the_variable_knows_the_step(scale_aware):
    """FP4DiT: dw/dV' has no step in it. The plain variable's gradient is as large as the step."""
    weight, start = on_scale_one("e3m2", torch.tensor([1.0, 2.0, 4.0, 8.0]) * 1.0625)  # a quarter into the step
    variable = RoundedUpOrDown(weight, start, scale_aware)
    variable().sum().backward()
    assert variable.variable.grad is not None
    gradient = variable.variable.grad[0]
    expected = torch.ones(4) if scale_aware else torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert torch.allclose(gradient / gradient[0], expected, rtol=1e-5)


def test_straight_through_computes_on_the_grid_with_the_gradient_of_the_soft_weight():
    weight, start = weight_of("nvfp4")
    soft, hard = RoundedUpOrDown(weight, start), RoundedUpOrDown(weight, start, straight_through=True)
    assert torch.allclose(hard(), hard.finished().dequantize(), rtol=1e-6)
    assert torch.equal(code_values(hard.finished()), code_values(start)), "half and above is up: the nearest, at first"
    for variable in (soft, hard):
        (variable() * randn(*weight.shape, seed=2)).sum().backward()
    assert torch.equal(soft.variable.grad, hard.variable.grad)
    assert hard.penalty(0.9) is None


def test_the_penalty_waits_and_then_drives_to_either_side():
    variable = RoundedUpOrDown(*weight_of("int4_g32"))
    assert variable.penalty(0.1) is None
    started = variable.soft().detach()
    optimizer = torch.optim.Adam(variable.parameters(), lr=0.1)
    for step in range(100):
        penalty = variable.penalty(0.2 + 0.8 * step / 100)
        assert penalty is not None
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    soft = variable.soft().detach()
    free = variable.gap > 0
    first, last = (((2 * h - 1).abs()[free]).mean() for h in (started, soft))
    assert last > 0.95 > 0.6 > first


@pytest.mark.parametrize("name", GRIDS)
def test_divisors_of_one_are_rounding_to_nearest(name):
    weight, start = weight_of(name)
    variable = Divided(weight, start)
    assert torch.equal(code_values(variable.finished()), code_values(start))
    assert torch.equal(variable(), start.dequantize())


def test_divisors_may_move_a_weight_by_more_than_a_step():
    weight, start = on_scale_one("int8", torch.tensor([40.0, -40.0]))
    variable = Divided(weight, start)
    target, optimizer = torch.tensor([[45.0, -33.0]]), torch.optim.Adam(variable.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (variable() - target).square().sum().backward()
        optimizer.step()
    assert code_values(variable.finished()).tolist() == [[45.0, -33.0]]


def test_divisors_begin_at_the_codes_that_exist():
    weight, start = on_scale_one("int8", torch.tensor([10.4, -10.4, 3.0, 0.2, 0.2]))
    moved = start.with_values(torch.tensor([[12.0, -9.0, 3.0, 1.0, -1.0]]))
    assert code_values(Divided(weight, moved).finished()).tolist() == [
        [12.0, -9.0, 3.0, 1.0, 0.0]
    ]  # no factor turns a sign


def settings(method: str, iterations: int = 40, **options: object) -> list[str]:
    from_nearest = {"lean": 0.0} if method == "adaround" else {}
    chosen = {"method": method, "iterations": iterations, **from_nearest, **options}
    return ["sequential.tokens=64", f"sequential.reconstruct={json.dumps(chosen)}"]


def plain(weights: str, activations: str = "nvfp4") -> list[str]:
    """Rounding to nearest in that format, nothing else; the tiny model is 32 wide."""
    return [f"scheme.weights={weights}", f"scheme.activations={activations}", "methods={}"]


def run(model, recorded, overrides: list[str], scratch: Scratch | None = None, recipe: str = "nvfp4"):
    trajectory, statistics = recorded
    plan = quantize(model, load_recipe(recipe, overrides), statistics, trajectory, scratch)
    return plan, model.backbone.state_dict()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def watched(monkeypatch) -> dict[str, list[tuple[float, float]]]:
    """Errors of every block on fitting and on held-out calls, whenever the held-out calls are judged."""
    seen: dict[str, list[tuple[float, float]]] = {}
    error = BlockFit.error

    def spy(self, numbers):
        result = error(self, numbers)
        if numbers is self.held_out:
            seen.setdefault(self.block, []).append((error(self, self.fitting), result))
        return result

    monkeypatch.setattr(BlockFit, "error", spy)
    return seen


@pytest.mark.parametrize("method", sorted(RECONSTRUCTIONS))
@pytest.mark.parametrize(("weights", "activations"), [("int4_g32", "float16"), ("nvfp4", "nvfp4")])
def test_a_block_comes_nearer_to_float_than_nearest_on_seen_and_unseen_calls(
    tiny, recorded, watched, method, weights, activations
):
    plan, _ = run(tiny(), recorded, [*plain(weights, activations), *settings(method)])
    assert set(watched) == {"transformer_blocks.0", "transformer_blocks.1"}
    for block, (before, after) in watched.items():
        assert after[0] < before[0] and after[1] < before[1], block
    rounded = {layer.rounding for layer in plan.quantized if layer.name.startswith("transformer_blocks")}
    assert rounded == {method}
    assert all(method in layer.why and "dB on held-out calls" in layer.why for layer in plan.quantized)


def test_every_method_gives_other_codes_than_every_other_and_than_none(tiny, recorded):
    overrides = [[*plain("nvfp4"), *settings(name, 20)] for name in RECONSTRUCTIONS]
    states = [run(tiny(), recorded, chosen)[1] for chosen in [*overrides, [*plain("nvfp4"), "sequential.tokens=64"]]]
    assert not any(same(states[i], states[j]) for i in range(len(states)) for j in range(i))


def test_what_is_judged_is_what_the_model_then_computes(tiny, recorded, monkeypatch):
    """The finished layers are plain quantized layers on the grid, and the block's error is that of the deployed block."""
    model, judged = tiny(), []
    reconstruct = reconstruction.reconstruct

    def spy(how, walk, reference, block, groups, place):
        reconstruct(how, walk, reference, block, groups, place)
        judged.append((block, [walk.run(block, call) for call in walk.calls[:1]]))

    monkeypatch.setattr("qdiff.quantization.quantize.reconstruct", spy)
    plan, _ = run(model, recorded, [*plain("nvfp4"), *settings("adaround", 8, rate=0.05, bias_rate=1e-3)])
    seen = []
    for block, _ in judged:
        model.backbone.get_submodule(block).register_forward_hook(lambda module, args, result: seen.append(result))
    step = next(iter(recorded[0]))
    with torch.no_grad():
        model.family.call(model.backbone, step.inputs)
    for (_, (walked,)), deployed in zip(judged, seen, strict=True):
        assert (walked - deployed).abs().max() <= 1e-5 * deployed.abs().max()
    assert all(type(model.backbone.get_submodule(layer.name)) is QuantLinear for layer in plan.quantized)


@pytest.mark.parametrize("recipe", ["int8", "w4a8", "nvfp4-svd"])
def test_every_form_of_activations_is_trained_through(tiny, recorded, recipe):
    """Static with scales by timestep and quantized outputs, per token, run-time blocks with a low-rank branch."""
    extra = {"nvfp4-svd": ["methods.low_rank.rank=2"], "w4a8": ["scheme.weights=int4_g32"]}.get(recipe, [])
    plan, _ = run(tiny(), recorded, [*extra, *settings("adaround", 6, rate=0.05)], recipe=recipe)
    assert all("on held-out calls" in layer.why for layer in plan.quantized)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, recorded, tmp_path, monkeypatch):
    overrides = [*plain("nvfp4"), *settings("adaround", 5, rate=0.05, bias_rate=1e-3)]
    whole_plan, whole = run(tiny(), recorded, overrides)
    scratch = Scratch(tmp_path / "blocks", "mine")
    learn = BlockFit.learn

    def killed(self, *args, **kwargs):
        if self.block.endswith(".1"):
            raise KeyboardInterrupt
        learn(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFit, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), recorded, overrides, scratch)
    assert len(list(scratch.folder.iterdir())) == 1
    plan, state = run(tiny(), recorded, overrides, scratch)
    assert plan == whole_plan and same(state, whole)


def test_a_block_that_is_not_helped_stays_as_it_was_and_says_so(tiny, recorded):
    _, before = run(tiny(), recorded, [*plain("nvfp4"), "sequential.tokens=64"])
    plan, after = run(tiny(), recorded, [*plain("nvfp4"), *settings("flexround", 3, rate=1.0)])
    assert same(before, after)
    assert all("flexround not kept: block " in layer.why and layer.rounding == "nearest" for layer in plan.quantized)


def test_the_target_is_the_float_models_block_on_the_float_prefix(tiny, recorded, monkeypatch):
    targets = {}
    error = BlockFit.error

    def spy(self, numbers):
        targets[self.block] = self.targets[0]
        return error(self, numbers)

    monkeypatch.setattr(BlockFit, "error", spy)
    run(tiny(), recorded, [*plain("nvfp4"), *settings("adaround", 1)])
    floating, seen = tiny(), []
    for block in targets:
        floating.backbone.get_submodule(block).register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        floating.family.call(floating.backbone, next(iter(recorded[0])).inputs)
    for target, expected in zip(targets.values(), seen, strict=True):
        # What is kept outside of the blocks is in 16 bit: 2^-11 of its values.
        assert (target - expected).norm() <= 2**-9 * expected.norm()


def test_calls_of_other_prompts_are_held_out(tiny, recorded):
    trajectory, statistics = recorded
    walk = BlockWalk(tiny(), TimestepIndex(), trajectory, statistics.timesteps, 64)
    fitting, held = split(walk.calls)
    assert {walk.calls[n].shard for n in fitting} == {0} and {walk.calls[n].shard for n in held} == {1}
    assert sorted(fitting + held) == list(range(len(walk.calls)))
    one = [call for call in walk.calls if call.shard == 0]
    fitting, held = split(one)
    assert held and fitting and not set(held) & set(fitting)


def test_codes_of_a_layer_are_what_it_multiplies_with(tiny, recorded):
    model = tiny()
    run(model, recorded, [*plain("nvfp4"), "sequential.tokens=64"])
    layer = model.backbone.get_submodule("transformer_blocks.1.attn1.to_q")
    x = randn(2, 3, 32)
    expected = torch.nn.functional.linear(layer._quantized(x), codes_of(layer).dequantize(), layer.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "adarond"}, "did you mean adaround"),
        ({"method": "adaround", "iteration": 5}, "did you mean iterations"),
        ({"method": "adaround", "iterations": 0}, "iterations = 0"),
        ({"method": "flexround", "penalty": 0.1}, "has no option 'penalty'"),
        ({"iterations": 5}, "names no method"),
        ({"method": "flexround", "weighting": "gradients"}, "weighting = 'gradients'"),
        ({"method": "adaround", "input_scale_rates": 1}, "did you mean input_scale_rate"),
    ],
)
def test_a_wrong_reconstruction_is_refused_before_anything_runs(given, words):
    with pytest.raises(InputError, match=words):
        check_reconstruction(given)
    with pytest.raises(InputError, match=words):
        load_recipe("nvfp4", [f"sequential.reconstruct={json.dumps(given)}"])


def test_a_plan_by_hand_cannot_ask_for_it(tiny, recorded, tmp_path):
    plan = quantize(tiny(), load_recipe("int8"), recorded[1])
    name = plan.quantized[0].name
    layers = [
        layer.model_copy(update={"rounding": "adaround"}) if layer.name == name else layer for layer in plan.layers
    ]
    asked = plan.model_copy(update={"layers": layers})
    with pytest.raises(
        InputError, match=f"{name}: rounding is adaround, which only a recipe can do; by hand it is nearest"
    ):
        settle(asked, tiny(), recorded[1], plan, tmp_path / "plan.json")


def test_recipes_take_a_reconstruction_and_leave_it_out():
    on = load_recipe("nvfp4", ["sequential.reconstruct.method=adaround", "sequential.reconstruct.iterations=7"])
    assert on.sequential is not None and on.sequential.reconstruct == {"method": "adaround", "iterations": 7}
    off = load_recipe("nvfp4", ["sequential.reconstruct=null"])
    assert off.sequential is not None and off.sequential.reconstruct is None
