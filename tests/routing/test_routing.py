"""Routes: the program that makes tables, the predictors, the router's rules, blocks with branches, and their graph."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from qdiff.allocation import routed
from qdiff.allocation.block_errors import Measured
from qdiff.allocation.route_predictor import fit, threshold
from qdiff.allocation.route_table import Costs, solve_routes
from qdiff.errors import InputError
from qdiff.plan.recipe import Routing
from qdiff.plan.routing_plan import REUSE, Predictor, ReusePlan, RoutedBlock, RoutingPlan
from qdiff.routing.blocks import BranchedBlock, BranchState, install_branches
from qdiff.routing.router import REMEMBERED, Router


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def costs_for(blocks: int) -> Costs:
    bits = torch.tensor([[8.0, 4.5]], dtype=torch.float64).expand(blocks, 2).contiguous()
    shares = randn(blocks, seed=9).abs() + 0.1
    return Costs(bits, bits.clone(), shares / shares.sum())


@pytest.mark.parametrize("routed", [0, 1, 3])
@pytest.mark.parametrize("budget", [4.6, 5.5, 7.0])
def test_the_table_is_the_best_there_is(routed, budget):
    blocks, steps = 3, 3
    errors, costs = randn(blocks, steps, 2, seed=1).square(), costs_for(blocks)

    def error(table: torch.Tensor) -> float:
        return float(errors.gather(2, table[..., None]).sum())

    def allowed(table: torch.Tensor) -> bool:
        switching = sum(len(row.unique()) > 1 for row in table)
        return switching <= routed and costs.used(table) <= budget * (1 + 1e-9)

    tables = (torch.tensor(each).reshape(blocks, steps) for each in product((0, 1), repeat=blocks * steps))
    best = min(error(table) for table in tables if allowed(table))
    found = solve_routes(errors, costs, budget, routed)
    assert allowed(found) and error(found) == pytest.approx(best, rel=1e-4)


def test_a_budget_below_the_cheap_branches_is_refused():
    with pytest.raises(InputError, match="below 4.5"):
        solve_routes(randn(2, 2, 2).square(), costs_for(2), 4.4, 2)


def test_a_line_is_found_and_judged_on_other_prompts():
    changes, held_out = randn(6, 8, seed=2).abs(), torch.arange(8) % 2 == 1
    errors = torch.zeros_like(changes)
    errors[1:] = 0.3 * changes[:-1] + 0.05
    slope, intercept, r2 = fit(changes, errors, held_out)
    assert (slope, intercept, r2) == (pytest.approx(0.3), pytest.approx(0.05), pytest.approx(1.0))
    assert fit(changes, errors, torch.zeros(8, dtype=torch.bool))[2] is None
    noise = randn(6, 8, seed=3)
    noise[:, held_out] *= -1
    assert (fit(changes, noise, held_out)[2] or 0) < 0.5


def test_the_threshold_spends_the_budget_and_no_more():
    scores, costs = randn(3, 5, 4, seed=4).abs(), costs_for(3)
    limits = [threshold(scores, costs, budget) for budget in (4.5, 5.5, 6.5, 8.0)]
    assert limits == sorted(limits, reverse=True) and limits[-1] == -1.0
    for budget, limit in zip((4.5, 5.5, 6.5), limits, strict=False):
        spent = costs.used((scores <= limit).long().flatten(1))
        assert spent <= budget + 1e-9
        tighter = scores[scores < limit].max()
        assert costs.used((scores <= tighter).long().flatten(1)) > budget, "the next threshold would be too low"


def plan_of(rule="table", reuse=None, tables=((1, 1, 0), (0, 0, 0)), **changes) -> RoutingPlan:
    blocks = [
        RoutedBlock(name=f"blocks.{i}", branches=["int8", "nvfp4"], table=list(t), reuse_gains=[1.0, 1.0, 100.0])
        for i, t in enumerate(tables)
    ]
    values = {"timesteps": [900.0, 500.0, 100.0], "used_bits": 5.0, "used_activation_bits": 5.0, "resident_bits": 9.0}
    return RoutingPlan(rule=rule, reuse=reuse, blocks=blocks, **{**values, **changes})


def call(router: Router, timestep: float, condition: float = 0.0, *, change=0.1, drift=0.2, batch: int = 1):
    inputs = {"hidden_states": torch.zeros(batch, 4), "encoder_hidden_states": torch.full((batch, 3), condition)}
    routes, deltas = router.route(timestep, inputs)
    count = len(routes)
    router.observe(
        torch.full((count, batch), change), torch.full((count, batch), drift), torch.ones(count, batch, 2, 2)
    )
    return routes, deltas


def router_of(plan: RoutingPlan) -> Router:
    return Router(plan, frozenset({"hidden_states", "timestep"}))


def test_a_table_is_read_by_the_value_of_the_timestep():
    router = router_of(plan_of())
    assert [call(router, t)[0] for t in (999.0, 701.0, 699.0, 299.0, 0.0)] == [[1, 0]] * 3 + [[0, 0]] * 2
    assert router.counts == {1: 3, 0: 7} and router.skipped == 0


def test_predictions_follow_the_change_of_the_same_pictures_step_before():
    plan = plan_of("predicted", threshold=0.5)
    predictor = Predictor(slope=1.0, intercept=0.0, gains=[1.0, 1.0, 100.0])
    plan.blocks[0].predictor = predictor
    router = router_of(plan)
    assert call(router, 900.0, change=0.1)[0] == [0, 0], "nothing is known at the first step"
    assert call(router, 900.0, condition=1.0, change=2.0)[0] == [0, 0]
    assert call(router, 500.0, change=0.1)[0] == [1, 0], "0.01 is below the threshold"
    assert call(router, 500.0, condition=1.0)[0] == [0, 0], "the other branch of guidance changed more"
    assert call(router, 100.0)[0] == [0, 0], "an error counts a hundred times as much here"
    assert call(router, 900.0)[0] == [0, 0], "a timestep that does not fall begins another picture"


def test_blocks_are_reused_at_most_so_often_and_then_computed_with_care():
    router = router_of(plan_of(reuse=ReusePlan(tolerance=100.0, in_a_row=2), tables=((1, 1, 1), (1, 1, 0))))
    seen = [
        call(router, t, drift=9.0 if t == 950.0 else 0.2) for t in (950.0, 900.0, 850.0, 800.0, 750.0, 700.0, 650.0)
    ]
    routes = [each[0] for each in seen]
    assert routes[0] == [1, 1] and seen[0][1] is None
    assert routes[1] == [REUSE, REUSE] and routes[2] == [1, 0], (
        "a drift of 18 is too much: fresh, and careful where it can"
    )
    assert routes[3] == routes[4] == [REUSE, REUSE] and routes[5] == [1, 0] and routes[6] == [REUSE, REUSE]
    assert router.skipped == pytest.approx(8 / 14)
    assert call(router, 600.0, batch=2)[0] == [1, 1], "deltas of another batch are of no use"


def test_few_pictures_are_remembered():
    router = router_of(plan_of(reuse=ReusePlan(tolerance=10.0, in_a_row=1)))
    for condition in range(REMEMBERED + 1):
        call(router, 900.0, float(condition))
    assert call(router, 800.0, 0.0)[0] == [1, 0] and call(router, 800.0, float(REMEMBERED))[0] == [REUSE, REUSE]
    with pytest.raises(RuntimeError, match="no routes"):
        router.observe(torch.zeros(2, 1))


class Block(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.linear.weight)
        self.linear.weight.data *= factor

    def forward(self, states: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return states + self.linear(states) + shift


def test_a_block_takes_its_route_and_says_what_it_changed():
    branch_state = BranchState(1)
    branch_state.caching = True
    block = BranchedBlock([Block(1.0), Block(2.0)], 0, branch_state)
    states, shift = torch.ones(2, 4, 3), torch.zeros(3)
    outputs = []
    for route in (0, 1):
        branch_state.routes = [route]
        outputs.append(block(states, shift))
        assert torch.equal(branch_state.changes(), torch.full((1, 2), float(route + 1)))
    assert torch.equal(outputs[1], 3 * states) and bool((branch_state.drifts() > 1e6).all()), (
        "there was no delta before"
    )
    branch_state.deltas = branch_state.new_deltas()
    branch_state.routes = [REUSE]
    assert torch.equal(block(10 * states, shift), 12 * states) and not bool(branch_state.drifts().any())
    branch_state.routes = [0]
    assert torch.equal(block(states, shift), outputs[0])
    assert torch.equal(branch_state.drifts(), torch.full((1, 2), 0.5)), "a delta of 1 where it was 2"


def test_branches_are_copies_of_a_block_that_is_there():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(1.0), Block(1.0)])})
    branch_state = install_branches(model, {"blocks.1": 2})
    assert (
        isinstance(model["blocks"][1], BranchedBlock)
        and len(model["blocks"][1].branches) == 2
        and branch_state.blocks == 1
    )
    with pytest.raises(InputError, match=r"no block 'blocks.7'"):
        install_branches(model, {"blocks.7": 2})


class PlanScorer:
    """Whose pictures have an error of 1e-5, and of ``together`` times ``influence`` more where blocks err."""

    def __init__(self, together, influence):
        self.together, self.influence, self.heard = together, influence, []

    def score(self, name, plan, disturbed=None):
        error = 1e-5
        if disturbed is not None:
            self.heard.append(disturbed)
            error += float(self.together[disturbed] * self.influence[disturbed])
        return routed.ScoredPlan(name, 0.0, -10 * torch.tensor(error).log10().item())


@pytest.mark.parametrize("steps", [1, 6, 20, 21, 50])
def test_influence_is_what_is_left_in_pictures_of_the_error_of_a_prediction(steps):
    truth = torch.exp(torch.linspace(0, 4, steps, dtype=torch.float64))  # its logarithm is a line
    together = torch.rand(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    nothing = torch.zeros(1, steps, 1)
    measured = Measured(
        list(range(steps, 0, -1)), nothing, nothing, nothing, nothing, nothing[..., 0], together, torch.zeros(1)
    )
    scorer = PlanScorer(together, truth)
    found = routed.influence(Routing(recipes=["int8"], reuse={"loss_db": 0.3}), ["a"], measured, scorer)
    torch.testing.assert_close(found, truth / truth.mean(), rtol=1e-3, atol=0)
    assert len(scorer.heard) == (steps if steps <= 20 else routed.MEASURED_STEPS)
    assert scorer.heard[-min(steps, 4) :] == list(range(steps))[-4:]


def test_errors_of_branches_are_those_of_the_whole_model_with_one_block_exchanged(tiny):
    """Blocks before the exchanged one are not computed again: that must not be seen in any number."""
    from types import SimpleNamespace

    from qdiff.allocation import block_errors

    model = tiny()
    blocks = model.family.blocks(model.backbone)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, model.backbone.config.caption_channels, generator=generator)
    steps = [
        SimpleNamespace(
            timestep=timestep,
            inputs={
                "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
                "encoder_hidden_states": text,
                "timestep": torch.full((2,), timestep),
                "encoder_attention_mask": torch.ones(2, 5, dtype=torch.int64),
            },
        )
        for timestep in (900.0, 800.0, 700.0)
    ]
    trajectory = SimpleNamespace(paths=["one"], steps=lambda shard, once=False: iter(steps))
    branches = [[block_errors._Errs(model.backbone.get_submodule(name), seed) for seed in (1, 2)] for name in blocks]
    with torch.inference_mode():
        found, reused, _ = block_errors._predictions(model, model.backbone, blocks, branches, trajectory)
        for place, step in enumerate(steps):
            reference = model.family.call(model.backbone, step.inputs).double()
            for index, name in enumerate(blocks):
                block = model.backbone.get_submodule(name)
                for branch, module in enumerate(branches[index]):
                    model.backbone.set_submodule(name, module)
                    change = model.family.call(model.backbone, step.inputs).double() - reference
                    model.backbone.set_submodule(name, block)
                    assert found[index, place, branch] == change.square().sum() / reference.square().sum()
    assert found.min() > 0 and reused[:, 0].isinf().all() and reused[:, 1:].min() > 0
