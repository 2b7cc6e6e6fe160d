"""Constant scales of inputs that are learned: LSQ's gradient, how a spoilt scale is mended, and what travels."""

from __future__ import annotations

import json

import pytest
import torch

from qdiff.errors import InputError
from qdiff.formats import scales as numerics
from qdiff.formats.table import format_named
from qdiff.methods import LayerGroup
from qdiff.methods.base import LARGEST_STRETCH
from qdiff.nn import ops
from qdiff.nn.quant_linear import QuantLinear, QuantLinearConfig
from qdiff.quantization.checkpoint import load_quantized, save_quantized
from qdiff.quantization.edited_plan import settle
from qdiff.quantization.learned_input_scales import LearnedInputScale
from qdiff.quantization.quantize import quantize
from qdiff.quantization.reconstruction import BlockFit
from qdiff.recipes import load_recipe
from qdiff.runs.partial import Scratch


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(ratio: torch.Tensor, name: str) -> torch.Tensor:
    """The grid's nearest values, by torch's own rounding."""
    if name == "fp8":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return ratio.round().clamp(-128, 127)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_gradient_of_a_scale_is_lsqs(name):
    """arXiv 1902.08153, eq. 3: Q(x/s) - x/s within the range, the end of the grid outside; to x it is 1 and 0."""
    format = format_named(name)
    x = (randn(512) * format.largest * 0.6 * 0.25).requires_grad_()
    scale, upstream = torch.tensor(0.25, requires_grad=True), randn(512, seed=1)
    ratio = x.detach() / 0.25
    within = (ratio >= format.lowest) & (ratio <= format.highest)
    assert 0.05 < (~within).float().mean() < 0.5
    (ops.quantize_dequantize(x, scale, name) * upstream).sum().backward()
    slope = on_grid(ratio, name) - torch.where(within, ratio, torch.zeros(512))
    assert scale.grad is not None and scale.grad.shape == ()
    assert torch.allclose(scale.grad, (upstream * slope).sum(), rtol=1e-4)
    assert torch.equal(x.grad, upstream * within)


def test_outside_of_the_range_the_gradient_is_the_difference_quotient():
    x, step = torch.tensor([-90.0, 90.0]), 0.125  # all numbers are exact in float32
    scale = torch.tensor(0.5, requires_grad=True)
    ops.quantize_dequantize(x, scale, "int8")[1].backward()
    ends = [ops.quantize_dequantize(x, torch.tensor(0.5 + sign * step), "int8")[1] for sign in (-1, 1)]
    assert float(scale.grad) == float((ends[1] - ends[0]) / (2 * step)) == 127


@pytest.mark.parametrize("spoilt", [0.25, 6.0])
def test_a_spoilt_scale_comes_back_to_where_the_error_is_smallest(spoilt):
    """Two layers that read one tensor: both compute with the one scale, also where it does not begin well."""
    layers = [QuantLinear(QuantLinearConfig(8, 8, False, "int8", "int4")) for _ in range(2)]
    x = randn(1024, 8)
    best = min((0.1 + 0.01 * k for k in range(90)), key=lambda s: float((on_four_bits(x, s) - x).square().mean()))
    for layer in layers:
        layer.input_scale = torch.tensor(best * spoilt)
    learned = LearnedInputScale(layers)
    optimizer = torch.optim.Adam([learned.variable], lr=0.02)
    for _ in range(500):  # Adam remembers for long how large the first gradients were
        learned.install()
        assert layers[0].input_scale is layers[1].input_scale
        optimizer.zero_grad()
        sum((layer._quantized(x) - x).square().mean() for layer in layers).backward()
        optimizer.step()
    scale, table = learned.finished()
    assert table is None and abs(float(scale) / best - 1) < 0.05
    assert torch.equal(scale, numerics.to_half_grid(scale))


def on_four_bits(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).round().clamp(-8, 7) * scale


def test_scales_stay_positive_and_finite_wherever_the_variable_goes():
    layer = QuantLinear(QuantLinearConfig(8, 8, False, "int8", "int8", timesteps=2))
    for table in (False, True):
        layer.timestep_scales = torch.ones(2) if table else None
        learned = LearnedInputScale([layer])
        for end in (-1e3, 1e3):
            with torch.no_grad():
                learned.variable.fill_(end)
            for value in learned.finished():
                assert value is None or ((value > 0) & torch.isfinite(value * 127)).all()
    assert learned.finished()[1].max() == LARGEST_STRETCH


def spoil(monkeypatch, factor: float) -> None:
    """Makes ranges too wide, so that codes are wasted, or too narrow, so that much is cut off."""
    ranges = LayerGroup.ranges
    monkeypatch.setattr(LayerGroup, "ranges", lambda self, decisions: ranges(self, decisions) * factor)


def learning(iterations: int = 60, rate: float = 0.05, recipe_methods: str = "{}", **options: object) -> list[str]:
    course = {"input_scale_iterations": iterations, "input_scale_rate": rate} if iterations else {}
    chosen = {"method": "flexround", "iterations": 2, "rate": 1e-4, **course, **options}
    # spoilt scales are far below a layer's floor before they are learned
    settings = [f"methods={recipe_methods}", "sequential={tokens: 64}", "floors={layer: -100}"]
    return [*settings, f"sequential.reconstruct={json.dumps(chosen)}"]


def run(model, recorded, overrides: list[str], recipe: str = "int8", scratch: Scratch | None = None):
    trajectory, statistics = recorded
    plan = quantize(model, load_recipe(recipe, overrides), statistics, trajectory, scratch)
    return plan, model.backbone.state_dict()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def errors(monkeypatch) -> dict[str, list[float]]:
    """Errors of every block on held-out calls, as they are judged: before and after rounding, before and after scales."""
    seen: dict[str, list[float]] = {}
    error = BlockFit.error

    def spy(self, numbers):
        result = error(self, numbers)
        if numbers is self.held_out:
            seen.setdefault(self.block, []).append(result)
        return result

    monkeypatch.setattr(BlockFit, "error", spy)
    return seen


BY_TIMESTEP = "{timestep_scales: {minimum_gain_db: -99}}"


@pytest.mark.parametrize(
    ("recipe", "methods", "factor"),
    [("int8", "{}", 6), ("int8", BY_TIMESTEP, 6), ("int8", "{}", 0.1), ("fp8", "{}", 0.1)],
)
def test_spoilt_scales_are_learned_on_unseen_calls_too(tiny, recorded, monkeypatch, tmp_path, recipe, methods, factor):
    spoil(monkeypatch, factor)
    seen, model = errors(monkeypatch), tiny()
    plan, state = run(model, recorded, learning(recipe_methods=methods), recipe)
    _, before = run(tiny(), recorded, learning(0, recipe_methods=methods), recipe)
    assert len(seen) == 2 and all(before > 1.5 * after for _, _, before, after, *_ in seen.values())
    inside = [layer for layer in plan.quantized if layer.name.startswith("transformer_blocks")]
    assert {layer.input_scale_rule for layer in inside} == {"learned"}
    assert all("; lsq: block " in layer.why and layer.methods[-1] == "lsq" for layer in inside)
    name = "input_scale" if methods == "{}" else "timestep_scales"
    values = {layer.name: state[f"{layer.name}.{name}"] for layer in inside}
    assert all((value > 0).all() and torch.equal(value, numerics.to_half_grid(value)) for value in values.values())
    query, key, value = (values[f"transformer_blocks.1.attn1.{part}"] for part in ("to_q", "to_k", "to_v"))
    assert torch.equal(query, key) and torch.equal(query, value) and query.data_ptr() != key.data_ptr()
    # The first block reads the same with and without: nothing else of it changed.
    first = [
        key for key in state if key.startswith("transformer_blocks.0.") and not torch.equal(state[key], before[key])
    ]
    assert first and {key.rpartition(".")[2] for key in first} == {name}
    save_quantized(model.backbone, plan, tmp_path / "model.safetensors")
    assert same(load_quantized(plan, tmp_path / "model.safetensors").state_dict(), state)


def test_scales_that_are_not_better_stay_and_the_plan_says_so(tiny, recorded, monkeypatch):
    _, before = run(tiny(), recorded, learning(0))
    learn = BlockFit.learn_input_scales

    def spoil(self, scales, iterations, rate):
        learn(self, scales, iterations, rate)
        for scale in scales:
            scale.variable.data += 4

    monkeypatch.setattr(BlockFit, "learn_input_scales", spoil)
    plan, after = run(tiny(), recorded, learning(3))
    assert same(before, after)
    assert all("lsq not kept: block " in layer.why for layer in plan.quantized)
    assert {layer.input_scale_rule for layer in plan.quantized} == {"range"}


def test_scales_that_are_made_at_run_time_are_left_alone(tiny, recorded):
    overrides = ["scheme={weights: nvfp4, activations: nvfp4}", *learning(3)]
    plan, state = run(tiny(), recorded, overrides, "nvfp4")
    _, without = run(tiny(), recorded, [overrides[0], *learning(0)], "nvfp4")
    assert same(state, without) and not any("lsq" in layer.why for layer in plan.quantized)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, recorded, tmp_path, monkeypatch):
    spoil(monkeypatch, 6)
    whole_plan, whole = run(tiny(), recorded, learning(8))
    assert "learned" in {layer.input_scale_rule for layer in whole_plan.quantized}
    scratch = Scratch(tmp_path / "blocks", "mine")
    learn = BlockFit.learn_input_scales

    def killed(self, *args):
        if self.block.endswith(".1"):
            raise KeyboardInterrupt
        learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFit, "learn_input_scales", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), recorded, learning(8), scratch=scratch)
    assert len(list(scratch.folder.iterdir())) == 1
    plan, state = run(tiny(), recorded, learning(8), scratch=scratch)
    assert plan == whole_plan and same(state, whole)


def test_a_plan_by_hand_cannot_ask_for_it(tiny, recorded, tmp_path):
    plan = quantize(tiny(), load_recipe("int8"), recorded[1])
    first = plan.quantized[0].model_copy(update={"input_scale_rule": "learned"})
    asked = plan.model_copy(update={"layers": [first if x.name == first.name else x for x in plan.layers]})
    words = f"{first.name}: input_scale_rule is learned, which only a recipe can do; by hand it is range"
    with pytest.raises(InputError, match=words):
        settle(asked, tiny(), recorded[1], plan, tmp_path / "plan.json")
