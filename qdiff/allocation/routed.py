"""From what was measured to routes: tables and predictors within a budget, and pictures that decide between them.

Three rules are scored at the same average bits: ``static`` (each block one branch for good), ``table`` (a branch for each block
and timestep) and ``predicted`` (a branch by what the block changed the step before). The pictures that come closest to the
float model's win; where ``static`` wins, no block carries two branches. Then, with reuse, the tolerance is raised as far as
those pictures allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from qdiff.allocation.block_errors import Measured
from qdiff.allocation.route_predictor import fit, threshold
from qdiff.allocation.route_table import Costs, solve_routes
from qdiff.events import Progress, log
from qdiff.plan.recipe import Routing
from qdiff.plan.routing_plan import Predictor, ReusePlan, RoutedBlock, RoutingPlan, Rule
from qdiff.routing.router import Router

ROUNDS = 7  # of the bisection for a tolerance
MEASURED_STEPS = 12  # of long trajectories: at how many timesteps influence is measured
LAST_STEPS = 4  # of them: the last ones, where influence changes from step to step
WEIGHED = ", weighed"  # a rule whose errors were multiplied by the influence of their step


@dataclass
class ScoredPlan:
    """One set of routes and its pictures.

    Args:
        name: the rule, a recipe that all blocks had, or a tolerance.
        used_bits: of the weights that were computed with, as counted while the pictures were made.
        psnr_db: against the float model's pictures.
        skipped: share of block evaluations that were left out.
    """

    name: str
    used_bits: float
    psnr_db: float
    skipped: float = 0.0


@dataclass
class Decision:
    """Hold the routes that were scored and those that were taken, as JSON values.

    Args:
        recipes: of the branches.
        blocks: names of all blocks of the chain.
        influence: of each timestep, see :func:`influence`.
        chosen: name of what was taken among ``rules``.
        rules, uniform, reuse: pictures of rules, of recipes alone, and of tolerances of reuse.
        final: pictures of what was taken.
        r2: of the predictors on held-out prompts, by block.
        history: routes of the last picture of what was taken: a timestep, and a route for each block.
    """

    recipes: list[str]
    blocks: list[str]
    influence: list[float]
    chosen: str = ""
    final: ScoredPlan | None = None
    r2: dict[str, float | None] = field(default_factory=dict)

    rules: list[ScoredPlan] = field(default_factory=list)
    uniform: list[ScoredPlan] = field(default_factory=list)
    reuse: list[ScoredPlan] = field(default_factory=list)
    history: list[tuple[float, list[int]]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the decision as JSON values."""
        return asdict(self)


@dataclass
class PlanScorer:
    """Makes pictures of plans.

    Args:
        router: of the backbone that makes them, whose blocks have all branches.
        score_pictures: mean PSNR of the pictures that the backbone makes now.
        costs: of the branches.
    """

    router: Router
    score_pictures: Callable[[], float]
    costs: Costs

    def score(self, name: str, plan: RoutingPlan, disturbed: int | None = None) -> ScoredPlan:
        """Return the score of the pictures of a plan whose blocks have all branches.

        Args:
            name: of the plan.
            plan: the routes.
            disturbed: index of a timestep at which all blocks err a little.
        """
        self.router.plan, self.router.disturbed, self.router.record = plan, disturbed, True
        self.router.forget()
        psnr = self.score_pictures()
        spent = evaluated = 0.0
        for _, routes in self.router.history:
            for index, route in enumerate(routes):
                if route >= 0:
                    spent += float(self.costs.weight_bits[index, route] * self.costs.shares[index])
                    evaluated += float(self.costs.shares[index])
        return ScoredPlan(name, spent / max(evaluated, 1e-30), psnr, self.router.skipped)


def decide_routes(
    routing: Routing, blocks: Sequence[str], measured: Measured, costs: Costs, scorer: PlanScorer
) -> tuple[RoutingPlan, Decision]:
    """Return the plan whose pictures are best, every block with all branches, and what else was scored.

    Args:
        routing: what the recipe asks for.
        blocks: names, in the order of the chain.
        measured: of them.
        costs: of their branches, which are ``routing.recipes``.
        scorer: makes a plan's pictures and compares them.
    """
    weights = influence(routing, blocks, measured, scorer)
    weighed = replace(measured, predictions=measured.predictions * weights[:, None], reused=measured.reused * weights)
    found = plans(routing, blocks, measured, costs)
    again = plans(routing, blocks, weighed, costs)
    found |= {f"{rule}{WEIGHED}": plan for rule, plan in again.items() if rule != "static"}
    decision = Decision(list(routing.recipes), list(blocks), weights.tolist())
    rounds = len(found) + len(routing.recipes) + (ROUNDS if routing.reuse else 0)
    with Progress("pictures of routes", rounds) as progress:
        for name, plan in found.items():
            decision.rules.append(scorer.score(name, plan))
            progress.advance()
        for branch, recipe in enumerate(routing.recipes):
            constant = torch.full((len(blocks), len(measured.timesteps)), branch)
            decision.uniform.append(
                scorer.score(recipe, _of_table(routing, "static", blocks, measured, constant, costs))
            )
            progress.advance()
        best = max(decision.rules, key=lambda scored: (found[scored.name].rule == routing.rule, scored.psnr_db))
        chosen = found[best.name]
        if chosen.rule == "static" and len(routing.recipes) > 1:
            log.warning("routing: pictures are best when no block switches (docs/how-to/precision-by-step.md)")
        if routing.reuse is not None:
            chosen = _with_reuse(routing, chosen, best.psnr_db, weighed, scorer, decision, progress)
    decision.chosen = best.name
    decision.final = scorer.score(best.name, chosen)
    predictors = {block.name: block.predictor for plan in found.values() for block in plan.blocks if block.predictor}
    decision.r2 = {name: predictor.r2 for name, predictor in predictors.items()}
    decision.history = scorer.router.latest()
    return chosen, decision


def influence(routing: Routing, blocks: Sequence[str], measured: Measured, scorer: PlanScorer) -> Tensor:
    """Return how much of a squared error of the prediction is left in the pictures, by timestep: ``[steps]``, 1 on
    average.

    What a step gets wrong, later steps may put right; the last one's errors stay. So for every timestep pictures are made whose
    blocks err a little there and are computed with care everywhere, and the error of the pictures is divided by that of the
    prediction. Of more than 20 steps some are measured; between them the logarithm is interpolated.
    """
    steps = len(measured.timesteps)
    careful = _of_table(routing, "table", blocks, measured, torch.zeros(len(blocks), steps, dtype=torch.int64), None)

    def error(disturbed: int | None) -> float:
        return 10 ** (-scorer.score("", careful, disturbed).psnr_db / 10)

    chosen, floor = influence_steps(steps), error(None)
    logarithms = []
    with Progress("influence of steps", len(chosen)) as progress:
        for step in chosen:
            left = max(error(step) - floor, 0.01 * floor)
            logarithms.append(math.log(left / float(measured.together[step])))
            progress.advance()
    found = torch.from_numpy(np.exp(np.interp(np.arange(steps), chosen, logarithms)))
    return found / found.mean()


def influence_steps(steps: int) -> list[int]:
    """Return places of the timesteps at which influence is measured, rising, with the first and the last: all of up to
    20.
    """
    if steps <= 20:
        return list(range(steps))
    last = steps - LAST_STEPS
    spread = np.linspace(0, last - 1, MEASURED_STEPS - LAST_STEPS).round().astype(int).tolist()
    return [*spread, *range(last, steps)]


def plans(routing: Routing, blocks: Sequence[str], measured: Measured, costs: Costs) -> dict[str, RoutingPlan]:
    """Return a plan for every rule, by its name, all of the same average bits. Arguments as of
    :func:`decide_routes`.
    """
    if len(routing.recipes) == 1:
        zeros = torch.zeros(len(blocks), len(measured.timesteps), dtype=torch.int64)
        return {"static": _of_table(routing, "static", blocks, measured, zeros, costs)}
    assert routing.budget is not None
    budget = routing.budget["bits"]
    most = len(blocks) if routing.blocks is None else min(routing.blocks, len(blocks))
    static = solve_routes(measured.predictions, costs, budget, 0)
    found: dict[str, RoutingPlan] = {"static": _of_table(routing, "static", blocks, measured, static, costs)}
    if most and len(measured.timesteps) > 1:
        table = solve_routes(measured.predictions, costs, budget, most)
        found["table"] = _of_table(routing, "table", blocks, measured, table, costs)
        if routing.predicts:
            found["predicted"] = _of_predictors(found["table"], measured, costs, budget)
    return found


def _of_table(
    routing: Routing, rule: Rule, blocks: Sequence[str], measured: Measured, table: Tensor, costs: Costs | None
) -> RoutingPlan:
    """Return a plan that follows a table ``[blocks, steps]``; without ``costs`` its bits are left open."""
    return RoutingPlan(
        rule=rule,
        timesteps=measured.timesteps,
        used_bits=0.0 if costs is None else costs.used(table),
        used_activation_bits=0.0 if costs is None else costs.used_activations(table),
        resident_bits=0.0 if costs is None else costs.resident([row.unique().tolist() for row in table]),
        blocks=[
            RoutedBlock(name=name, branches=list(routing.recipes), table=row.tolist())
            for name, row in zip(blocks, table, strict=True)
        ],
    )


def _of_predictors(by_table: RoutingPlan, measured: Measured, costs: Costs, budget: float) -> RoutingPlan:
    """Return the blocks that switch by table switch by prediction; the others stay as they are there."""
    held_out = measured.prompts % 2 == 1
    blocks = list(by_table.blocks)
    scores = torch.zeros_like(measured.errors)
    for index, block in enumerate(blocks):
        if not block.switches:
            scores[index] = -2.0 if block.table[0] else torch.inf  # below and above every threshold
            continue
        slope, intercept, r2 = fit(measured.changes[index], measured.errors[index], held_out)
        local = measured.errors[index].square().mean(dim=1)  # [steps]
        caused = (measured.predictions[index, :, 1] - measured.predictions[index, :, 0]).clamp(min=0)
        predictor = Predictor(slope=slope, intercept=intercept, gains=(caused / local.clamp(min=1e-30)).tolist(), r2=r2)
        scores[index, 0] = torch.inf
        for place, row in enumerate(measured.changes[index, :-1].tolist(), start=1):
            scores[index, place] = torch.tensor([predictor.error(change, place) for change in row])
        blocks[index] = block.model_copy(update={"predictor": predictor})
    prompts = measured.prompts.unique()
    by_call = torch.stack([scores[:, :, measured.prompts == prompt].mean(dim=2) for prompt in prompts], dim=2)
    limit = threshold(by_call, costs, budget)
    cheap = (by_call <= limit).long()
    usual = cheap.double().mean(dim=2).round().long()
    return by_table.model_copy(
        update={
            "rule": "predicted",
            "threshold": limit,
            "used_bits": costs.used(cheap.flatten(1)),
            "used_activation_bits": costs.used_activations(cheap.flatten(1)),
            "blocks": [block.model_copy(update={"table": usual[i].tolist()}) for i, block in enumerate(blocks)],
        }
    )


def _with_reuse(
    routing: Routing,
    chosen: RoutingPlan,
    psnr: float,
    measured: Measured,
    scorer: PlanScorer,
    decision: Decision,
    progress: Progress,
) -> RoutingPlan:
    """Return the plan with the highest tolerance whose pictures lose no more than they may, by bisection between
    logarithms.
    """
    assert routing.reuse is not None
    squared = measured.drifts.square().mean(dim=2)  # [blocks, steps]
    gains = (measured.reused / squared.clamp(min=1e-30)).nan_to_num(0.0)  # infinite over infinite at the first step
    gains[:, 0] = gains.amax(dim=1)
    blocks = [
        block.model_copy(update={"reuse_gains": row.tolist()}) for block, row in zip(chosen.blocks, gains, strict=True)
    ]
    chosen = chosen.model_copy(update={"blocks": blocks})
    expected = measured.reused[measured.reused.isfinite() & (measured.reused > 0)]
    if not len(expected):  # a single step
        return chosen
    low, high = float((expected.min() / 10).log()), float((expected.max() * 10).log())
    kept, skipped = chosen, 0.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        tolerance = float(torch.tensor(middle).exp())
        reuse = ReusePlan(tolerance=tolerance, in_a_row=routing.reuse.in_a_row)
        plan = chosen.model_copy(update={"reuse": reuse})
        scored = scorer.score(f"{tolerance:.4g}", plan)
        decision.reuse.append(scored)
        if scored.psnr_db >= psnr - routing.reuse.loss_db:
            low = middle
            if scored.skipped > skipped:
                kept, skipped = plan.model_copy(update={"skipped": scored.skipped}), scored.skipped
        else:
            high = middle
        progress.advance()
    if not skipped:
        log.warning("routing: no block can be left out without losing more than %g dB", routing.reuse.loss_db)
    return kept


def reduced(plan: RoutingPlan, recipes: Sequence[str]) -> tuple[RoutingPlan | None, dict[str, list[int]]]:
    """Return the plan with no branch that is never taken, ``None`` where nothing switches and nothing is reused, and
    for every block the numbers of the recipes that it keeps.
    """
    everything = list(range(len(recipes)))
    kept = {block.name: everything if block.switches else [block.table[0]] for block in plan.blocks}
    blocks = [
        block
        if block.switches
        else block.model_copy(update={"branches": [recipes[block.table[0]]], "table": [0] * len(block.table)})
        for block in plan.blocks
        if block.switches or plan.reuse is not None
    ]
    return (plan.model_copy(update={"blocks": blocks}) if blocks else None), kept
