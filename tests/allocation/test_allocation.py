"""The solver against brute force and closed forms; costs by hand; sensitivities by hand; what a mixed recipe refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from qdiff.allocation.candidates import Candidates, shared_copy
from qdiff.allocation.costs import milliseconds
from qdiff.allocation.knapsack import _relaxed, _solve, allocate, best, equal_loss_bits, total
from qdiff.allocation.mixed import costs_of, decide_formats
from qdiff.allocation.sensitivity import measure_sensitivity, spread
from qdiff.errors import InputError, UsageError
from qdiff.nn.quant_linear import QuantLinear
from qdiff.plan.devices import DEVICES
from qdiff.plan.plan import LayerPlan
from qdiff.plan.recipe import Recipe
from qdiff.quantization.layer_plans import prepare
from qdiff.recipes import budget_override, load_recipe, members_of
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.partial import Scratch


def problem(items: int, formats: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors that fall with the cost, roughly, and some formats that are not to be had."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(items, formats, generator=generator, dtype=torch.float64).sort(dim=1).values
    errors = torch.rand(items, formats, generator=generator, dtype=torch.float64).square() / (0.1 + costs)
    gone = torch.rand(items, formats, generator=generator) < 0.15
    gone[:, 0] = False
    return errors.masked_fill(gone, math.inf), costs


def by_brute_force(errors, costs, budget) -> float:
    choices = (torch.tensor(choice) for choice in itertools.product(range(errors.shape[1]), repeat=len(errors)))
    return min(total(errors, choice) for choice in choices if total(costs, choice) <= budget)


@pytest.mark.parametrize(("items", "formats"), [(12, 2), (8, 3), (6, 4)])
def test_the_optimum_is_that_of_brute_force(items, formats):
    for seed in range(3):
        errors, costs = problem(items, formats, seed)
        budget = 1.5 * total(costs, torch.zeros(items, dtype=torch.int64))
        choice = allocate(errors, costs, budget)
        assert total(costs, choice) <= budget * (1 + 1e-9)
        assert total(errors, choice) == pytest.approx(by_brute_force(errors, costs, budget), rel=1e-9)


def test_more_budget_never_costs_quality_and_all_of_it_gives_the_best_formats():
    errors, costs = problem(40, 4, 7)
    cheapest = torch.where(errors.isfinite(), costs, math.inf).amin(dim=1).sum().item()
    found = [total(errors, allocate(errors, costs, cheapest * factor)) for factor in (1, 1.2, 1.5, 2, 4)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found))
    assert found[-1] <= found[0] / 2
    assert torch.equal(allocate(errors, costs, 1e9), errors.argmin(dim=1))


def test_the_best_few_are_different_and_in_order():
    errors, costs = problem(6, 3, 3)
    budget = total(costs, errors.argmin(dim=1)) * 0.8
    found = best(errors, costs, budget, 5)
    totals = [total(errors, choice) for choice in found]
    assert totals == sorted(totals) and len({tuple(choice.tolist()) for choice in found}) == 5


def test_large_programs_leave_out_what_cannot_be_in_the_optimum():
    """4,000 choices: the optimum among all of them, within the gap, though HiGHS sees a few hundred."""
    errors, costs = problem(1000, 4, 11)
    budget = 1.3 * total(costs, torch.zeros(1000, dtype=torch.int64))
    choice, reference = allocate(errors, costs, budget), _solve(errors, costs, budget, errors.isfinite(), [])
    assert reference is not None and total(costs, choice) <= budget * (1 + 1e-9)
    assert total(errors, choice) == pytest.approx(total(errors, reference), rel=3e-5)
    again = allocate(errors, costs, budget, [choice])
    assert not torch.equal(again, choice) and total(errors, again) == pytest.approx(total(errors, choice), rel=3e-5)


def test_the_relaxed_program_bounds_every_solution():
    for seed in range(3):
        errors, costs = problem(8, 3, seed)
        budget = 1.5 * total(costs, torch.zeros(8, dtype=torch.int64))
        reduced, bound = _relaxed(errors, costs, budget)
        for choice in (torch.tensor(each) for each in itertools.product(range(3), repeat=8)):
            if total(costs, choice) <= budget and math.isfinite(total(errors, choice)):
                assert total(errors, choice) >= bound + float(reduced.gather(1, choice[:, None]).max()) - 1e-9


def test_a_budget_that_nothing_meets_says_what_the_least_is():
    errors, costs = problem(5, 2, 0)
    with pytest.raises(InputError, match="below"):
        allocate(errors, costs, 1e-3)
    with pytest.raises(InputError, match="none of the formats"):
        allocate(torch.full((1, 2), math.inf), costs[:1], 1.0)


def test_the_closed_form_spends_the_budget_and_equalises_losses():
    sensitivities, sizes = torch.tensor([1.0, 4.0, 64.0]), torch.tensor([100.0, 300.0, 50.0])
    bits = equal_loss_bits(sensitivities, sizes, 5.0)
    assert float((bits * sizes).sum() / sizes.sum()) == pytest.approx(5.0)
    losses = sensitivities * 2.0 ** (-2 * bits)
    torch.testing.assert_close(losses, losses[0].expand(3))


def test_the_solver_rounds_the_closed_form():
    """With losses of that form and formats at every half bit, the program's bits are within a step of the closed form's."""
    sensitivities = torch.logspace(-2, 2, 9, dtype=torch.float64)
    formats = torch.arange(1, 10, 0.5, dtype=torch.float64)
    errors = sensitivities[:, None] * 2.0 ** (-2 * formats)
    choice = allocate(errors, formats.expand(9, -1) / 9, 5.0)
    assert (formats[choice] - equal_loss_bits(sensitivities, torch.ones(9), 5.0)).abs().max() <= 0.5


def layer(weights: str, activations: str) -> LayerPlan:
    return LayerPlan(
        name="l", kind="Linear", shape=(4096, 4096), bias=False, weights=weights, activations=activations
    )  # fmt: skip


def test_milliseconds_are_the_larger_of_arithmetic_and_memory():
    device = DEVICES["rtx-5090"]
    many, one = 65536, 1
    assert milliseconds(layer("int8", "int8"), many, device) == pytest.approx(2 * 4096**2 * many / 838e12 * 1e3)
    weights = layer("nvfp4", "nvfp4").weight_bytes()
    moved = weights + one * (4096 * 4 / 8 + 2 * 4096)
    assert milliseconds(layer("nvfp4", "nvfp4"), one, device) == pytest.approx(moved / 1792e9 * 1e3)
    # a format that a GPU has no arithmetic for runs in 16 bit
    assert milliseconds(layer("nvfp4", "nvfp4"), many, DEVICES["h100"]) == pytest.approx(
        milliseconds(layer("float16", "float16"), many, DEVICES["h100"])
    )


@pytest.mark.parametrize("text", ["5.5", "bits", "bits=", "bits=five", "bits=-1", "bits=nan", "words=3", "latency=inf"])
def test_a_wrong_budget_is_a_usage_error(text):
    with pytest.raises(UsageError, match="budget="):
        budget_override(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["mixed.recipes=[int8]"], "recipes"),
        (["mixed.recipes=[int8, int8]"], "twice"),
        (["mixed.budget={bits: 5, bytes: 3}"], "budget"),
        (["mixed.budget={latency: 1}"], "device"),
        (["mixed.minimum={pixart: {'*': fp8}}"], "not among"),
        (["methods={smooth: {}}"], "beside mixed"),
        (["scheme={weights: int8, activations: int8}"], "either a scheme, or mixed, or routing"),
    ],
)
def test_a_wrong_mixed_recipe_says_where(changes, words):
    with pytest.raises(InputError, match=words):
        load_recipe("mixed", changes)


def test_mixed_recipes_do_not_nest_and_others_have_no_budget():
    with pytest.raises(InputError, match="chooses among others itself"):
        members_of(load_recipe("mixed", ["mixed.recipes=[mixed, int8]"]))
    with pytest.raises(UsageError, match="has no budget"):
        load_recipe("int8", ["mixed.budget={bits: 5}"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """INT4 or INT8 for the tiny model, to nearest: quick, and far enough apart."""
    path = tmp_path_factory.mktemp("recipes") / "four.yaml"
    path.write_text(
        "{version: 1, name: four, scheme: {weights: int4_g32, activations: int8}, methods: {}, ignore: {pixart: [proj_out]}}"
    )
    return load_recipe(
        "mixed",
        [f"mixed.recipes=[{path}, int8, float16]", "mixed.calls=3", "mixed.pictures=0", "mixed.budget={bits: 7}"],
    )


@pytest.fixture(scope="module")
def measured(finished, tiny, recipe, tmp_path_factory):
    model, folder = tiny(), finished.path / "calibration"
    _, statistics = prepare(model, recipe, Statistics.load(folder / "statistics.safetensors"))
    candidates = Candidates(model, recipe, statistics)
    scratch = Scratch(tmp_path_factory.mktemp("sensitivity"), "owner")
    return model, candidates, Trajectory(folder), measure_sensitivity(model, candidates, Trajectory(folder), 3, scratch)


def test_a_sensitivity_is_what_one_group_alone_does_to_the_prediction(measured):
    model, candidates, trajectory, found = measured
    group, row = "transformer_blocks.1.attn1.to_q", list(found.groups).index("transformer_blocks.1.attn1.to_q")
    assert len(found.groups[group]) == 3, "q, k and v read one tensor"
    step = spread(trajectory, 3)[1]
    with torch.no_grad():
        expected = model.family.call(model.backbone, step.inputs).double()
        candidates.put(group, 0)
        got = model.family.call(candidates.backbone, step.inputs).double()
        candidates.put(group, -1)
    by_hand = float((got - expected).square().sum() / expected.square().sum())
    assert found.errors[row][0][1] == pytest.approx(by_hand, rel=1e-5)  # type: ignore[index]
    table = found.table()
    four, eight, sixteen = table.sum(dim=0).tolist()
    assert four > 10 * eight > 10 * sixteen > 0
    assert found.tokens[row] == 64
    assert set(found.rank_correlations()) == {"layer", "hessian", "outputs", "relevance", "baq"}
    assert found.rank_correlations()["outputs"] > 0.5


def test_measuring_changes_neither_the_model_nor_the_order_of_calls(measured, tiny):
    model, _, trajectory, _ = measured
    fresh = tiny().backbone.state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.backbone.state_dict().items())
    timesteps = [step.timestep for step in spread(trajectory, 1000)]
    assert timesteps == sorted(timesteps, reverse=True) and len(timesteps) == 8, "two shards of four steps"


def test_a_killed_measurement_goes_on(measured, tmp_path):
    model, candidates, trajectory, found = measured
    scratch = Scratch(tmp_path, "owner")
    first = list(candidates.groups)[0]
    scratch.save("group-00000", {}, {"errors": [[1.0] * 3] * 3})
    again = measure_sensitivity(model, candidates, trajectory, 3, scratch)
    assert again.errors[0] == [[1.0] * 3] * 3, f"{first} was not measured again"
    assert again.errors[1:] == found.errors[1:]


def test_pictures_are_a_second_truth_and_its_tables_choose_too(measured, recipe, tmp_path):
    """By hand: pictures that change by what the number of quantized layers is, and structure by a tenth of it."""
    model, candidates, trajectory, _ = measured

    def look() -> tuple[float, float]:
        count = sum(isinstance(module, QuantLinear) for module in candidates.backbone.modules())
        return float(count), count / 10

    found = measure_sensitivity(model, candidates, trajectory, 2, Scratch(tmp_path, "owner"), look)
    sizes = [len(layers) for layers in candidates.groups.values()]
    assert [row[0] for row in found.pictures["pictures"]] == sizes
    assert [row[1] for row in found.pictures["structure"]] == [size / 10 for size in sizes]
    tables = found.tables()
    assert list(tables)[:5] == ["even", "late", "early", "pictures", "structure"]
    content = torch.tensor(
        [all(".ff." in n or ".attn2." in n for n in layers) for layers in candidates.groups.values()]
    )
    torch.testing.assert_close(tables["apart"][~content], tables["even"][~content])
    factor = 3 * float(tables["even"].sum() / tables["structure"].sum())
    torch.testing.assert_close(tables["apart, more content"][content], factor * tables["structure"][content])
    assert {"prediction", "structure", "layer"} <= set(found.rank_correlations())
    chosen = decide_formats(recipe.mixed, "pixart", candidates, found, lambda: 30.0)
    assert {solution.weighting for solution in chosen.solutions} >= {"even", "pictures"}


def test_without_calls_errors_are_estimated_on_the_same_scale(measured, recipe, tmp_path):
    model, candidates, trajectory, found = measured
    estimated = measure_sensitivity(model, candidates, trajectory, 0, Scratch(tmp_path, "owner"))
    assert not estimated.errors and list(estimated.tables()) == ["estimated"] and not estimated.rank_correlations()
    ratio = (estimated.table() / found.table())[:, :2]  # the third format is float16, whose error is taken for none
    assert 0.2 < float(ratio.log().mean().exp()) < 5
    assert decide_formats(recipe.mixed, "pixart", candidates, estimated, None).solutions[0].cost <= 7


def test_the_choice_keeps_to_budget_and_minimum(measured, recipe):
    model, candidates, _, found = measured
    mixed = recipe.mixed
    made = decide_formats(mixed, "pixart", candidates, found, None)
    assert made.solutions[0].cost <= 7
    costs, _ = costs_of("bits", candidates, found, None)
    assert made.solutions[0].cost == pytest.approx(total(costs, torch.tensor(made.solutions[0].formats)))
    assert {0} < set(made.solutions[0].formats), "some layers get more than the cheapest"
    bound = mixed.model_copy(update={"minimum": {"pixart": {"transformer_blocks.0.*": "int8"}}})
    chosen = decide_formats(bound, "pixart", candidates, found, None).choice
    assert all(format >= 1 for group, format in chosen.items() if group.startswith("transformer_blocks.0."))
    with pytest.raises(InputError, match="matches no layer"):
        decide_formats(
            mixed.model_copy(update={"minimum": {"pixart": {"blocks.*": "int8"}}}), "pixart", candidates, found, None
        )
    with pytest.raises(InputError, match="below"):
        decide_formats(mixed.model_copy(update={"budget": {"bits": 3.0}}), "pixart", candidates, found, None)
    with pytest.raises(InputError, match="unknown device"):
        other = {"budget": {"latency": 1.0}, "device": "rtx-5080"}
        decide_formats(mixed.model_copy(update=other), "pixart", candidates, found, None)


def test_a_shared_copy_shares_numbers_and_nothing_else(tiny):
    backbone = tiny().backbone
    copied = shared_copy(backbone)
    first, second = next(backbone.parameters()), next(copied.parameters())
    assert first is not second and first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(("calls", "expected"), [(3, 3), (8, 8), (20, 8), (5, 5)])
def test_as_many_calls_as_are_asked_for(finished, calls, expected):
    steps = spread(Trajectory(finished.path / "calibration"), calls)
    assert len({(step.shard, step.timestep) for step in steps}) == len(steps) == expected
