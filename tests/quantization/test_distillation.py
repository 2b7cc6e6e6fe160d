"""The quantized model as a whole learns to predict what the float model predicts; what was learned is kept where it is better."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import InputError
from qdiff.plan.recipe import Distillation
from qdiff.quantization.checkpoint import load_quantized, save_quantized
from qdiff.quantization.distillation import distil, float_predictions
from qdiff.quantization.quantize import quantize
from qdiff.quantization.reconstruction import split
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.partial import Scratch

BASE = ["sequential=null", "methods={}", "quantize_outputs={}"]


@pytest.fixture
def recorded(finished):
    folder = finished.path / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")


def quantized(tiny, recorded, distil_setting="null", scratch=None):
    trajectory, statistics = recorded
    model = tiny()
    plan = quantize(model, load_recipe("nvfp4", [*BASE, f"distil={distil_setting}"]), statistics, trajectory, scratch)
    return model, plan


def error(model, targets, steps, numbers) -> float:
    with torch.no_grad():
        outputs = [model.family.call(model.backbone, steps[number].inputs) for number in numbers]
    pairs = zip(outputs, (targets[number] for number in numbers), strict=True)
    return sum(float((y - target).square().mean() / target.square().mean()) for y, target in pairs) / len(numbers)


def test_it_comes_nearer_to_float_on_prompts_that_it_has_not_seen(tiny, recorded, tmp_path):
    targets, steps = float_predictions(tiny(), recorded[0]), list(recorded[0])
    _, held_out = split(steps)
    before, _ = quantized(tiny, recorded)
    after, plan = quantized(tiny, recorded, "{iterations: 60, rate: 0.02, bias_rate: 0.001}")
    assert error(after, targets, steps, held_out) < 0.8 * error(before, targets, steps, held_out)
    one = plan.quantized[0]
    assert (
        one.rounding == "distil"
        and one.sqnr_db is None
        and "held-out prompts" in one.why
        and one.methods[-1] == "distil"
    )
    state, start = after.backbone.state_dict(), before.backbone.state_dict()
    changed = {key.rpartition(".")[2] for key in state if not torch.equal(state[key].float(), start[key].float())}
    assert changed == {"codes", "bias"}, "scales and everything else stay"
    save_quantized(after.backbone, plan, tmp_path / "model.safetensors")
    loaded = load_quantized(plan, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = after.family.call(after.backbone, steps[0].inputs)
        assert torch.equal(after.family.call(loaded, steps[0].inputs), expected), "what was saved is what was trained"


def block_outputs(model, step) -> list[torch.Tensor]:
    seen = []
    layers = [model.backbone.get_submodule(name) for name in model.family.blocks(model.backbone)]
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    with torch.no_grad():
        model.family.call(model.backbone, step.inputs)
    for handle in handles:
        handle.remove()
    return seen


def block_error(model, teacher, steps, numbers) -> float:
    """Mean relative error of the blocks' outputs."""
    pairs = [
        pair
        for number in numbers
        for pair in zip(block_outputs(model, steps[number]), block_outputs(teacher, steps[number]), strict=True)
    ]
    return sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs) / len(pairs)


def test_blocks_come_nearer_to_the_teachers_where_they_are_part_of_the_loss(tiny, recorded):
    targets, steps, float_model = float_predictions(tiny(), recorded[0]), list(recorded[0]), tiny()
    _, held_out = split(steps)
    found = {}
    for share in (0.0, 0.5):
        model, _ = quantized(tiny, recorded, f"{{iterations: 60, rate: 0.02, bias_rate: 0.001, blocks: {share}}}")
        assert not any(module._forward_hooks for module in model.backbone.modules()), "hooks are taken off again"
        found[share] = block_error(model, float_model, steps, held_out), error(model, targets, steps, held_out)
    untrained, _ = quantized(tiny, recorded)
    start = block_error(untrained, float_model, steps, held_out), error(untrained, targets, steps, held_out)
    assert found[0.5][0] < found[0.0][0] and found[0.5][0] < 0.95 * start[0]
    assert found[0.5][1] < 0.85 * start[1]


def test_a_rate_of_zero_leaves_the_codes(tiny, recorded):
    before, _ = quantized(tiny, recorded)
    after, plan = quantized(tiny, recorded, "{iterations: 20, rate: 0, bias_rate: 0.003}")
    assert "distillation: prediction" in plan.quantized[0].why
    state, start = after.backbone.state_dict(), before.backbone.state_dict()
    changed = {key.rpartition(".")[2] for key in state if not torch.equal(state[key].float(), start[key].float())}
    assert changed == {"bias"}
    with pytest.raises(InputError, match="both rates are 0"):
        load_recipe("nvfp4", ["distil={rate: 0, bias_rate: 0}"])


def test_what_does_not_help_is_not_kept(tiny, recorded):
    before, _ = quantized(tiny, recorded)
    after, plan = quantized(tiny, recorded, "{iterations: 3, rate: 1.0, bias_rate: 0.5}")
    assert "distillation not kept" in plan.quantized[0].why and plan.quantized[0].rounding == "nearest"
    first, second = before.backbone.state_dict(), after.backbone.state_dict()
    assert all(torch.equal(first[key].float(), second[key].float()) for key in first)


def test_more_recorded_calls_mean_more_steps(tiny, recorded, monkeypatch):
    assert [Distillation(passes=3).steps(8), Distillation(passes=0.01).steps(8), Distillation().steps(8)] == [24, 1, 16]
    assert Distillation(iterations=7, passes=2).steps(8) == 7
    seen = []
    monkeypatch.setattr(
        "qdiff.quantization.distillation._Work._call", lambda self, iteration: seen.append(iteration) or self.fitting[0]
    )
    quantized(tiny, recorded, "{passes: 0.5}")
    fitting, _ = split(list(recorded[0]))
    assert len(seen) == round(len(fitting) / 2)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.quantization.distillation.KEEP_EVERY", 4)
    how = Distillation(iterations=11, rate=0.02)
    targets = float_predictions(tiny(), recorded[0])

    def train(scratch: Scratch | None):
        model, _ = quantized(tiny, recorded)
        distil(model, recorded[0], targets, how, scratch, tiny().backbone)
        return model.backbone.state_dict()

    whole = train(None)
    scratch, saved = Scratch(tmp_path / "parts", "mine"), []
    save = Scratch.save

    def killed(self, part, tensors, facts):
        save(self, part, tensors, facts)
        saved.append(facts["iteration"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(scratch)
    assert saved == [4, 8]
    resumed = train(scratch)
    assert all(torch.equal(whole[key].float(), resumed[key].float()) for key in whole)


def test_layers_that_are_not_named_stay_as_they_are(tiny, recorded):
    before, _ = quantized(tiny, recorded)
    after, plan = quantized(
        tiny, recorded, "{iterations: 20, rate: 0.05, bias_rate: 0.01, layers: {pixart: ['*.attn1.*']}}"
    )
    state, start = after.backbone.state_dict(), before.backbone.state_dict()
    changed = {key for key in state if not torch.equal(state[key].float(), start[key].float())}
    assert changed and all(".attn1." in key for key in changed)
    trained = {layer.name for layer in plan.quantized if layer.rounding == "distil"}
    assert trained == {layer.name for layer in plan.quantized if ".attn1." in layer.name}
    assert all(layer.sqnr_db is not None for layer in plan.quantized if layer.name not in trained)
    with pytest.raises(InputError, match="matches no layer"):
        quantized(tiny, recorded, "{iterations: 1, layers: {pixart: ['*.attn9.*']}}")


@pytest.mark.parametrize("moment", ["blocks", "training"])
def test_no_hook_outlives_an_interrupt(tiny, recorded, monkeypatch, moment):
    model, _ = quantized(tiny, recorded)
    teacher, targets = tiny().backbone, float_predictions(tiny(), recorded[0])

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    place = {"blocks": "_Blocks.errors", "training": "_Work._call"}[moment]
    monkeypatch.setattr(f"qdiff.quantization.distillation.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(model, recorded[0], targets, Distillation(iterations=5, blocks=0.5), teacher=teacher)
    for backbone in (model.backbone, teacher):
        assert not any(module._forward_hooks for module in backbone.modules())
