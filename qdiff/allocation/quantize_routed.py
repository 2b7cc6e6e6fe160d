"""(float model, a routed recipe, statistics) -> (plan, quantized backbone with branches)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qdiff.allocation.assemble import Version, assemble, branches_of, costs_of, joined_plan, share_clock
from qdiff.allocation.block_errors import Measured, measure_block_errors
from qdiff.allocation.candidates import shared_copy, with_own_backbone
from qdiff.allocation.routed import Decision, PlanScorer, decide_routes, reduced
from qdiff.events import log
from qdiff.models.model import Model
from qdiff.plan.plan import Plan
from qdiff.plan.recipe import Recipe, Routing
from qdiff.plan.routing_plan import RoutingPlan
from qdiff.quantization.checkpoint import install_timestep_index
from qdiff.quantization.layer_plans import draft_plan
from qdiff.quantization.quantize import quantize_from_draft
from qdiff.recipes import versions_of
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.routing.follow import follow
from qdiff.runs.partial import Scratch

MEASURED = "routing"  # the part of the scratch that holds what was measured


@dataclass(frozen=True)
class Routed:
    """A plan, and what was scored on the way to it."""

    plan: Plan
    decision: Decision


def quantize_routed(
    model: Model,
    recipe: Recipe,
    statistics: Statistics,
    trajectory: Trajectory,
    scratch: Scratch,
    picture_score_of: Callable[[nn.Module], Callable[[], float]],
    guided: bool,
) -> Routed:
    """Quantize ``model.backbone`` by every recipe, decide about routes, and put the branches that are needed in its
    place.

    Args:
        model: its backbone is replaced.
        recipe: that names the recipes of the branches.
        statistics: of the float model.
        trajectory: the recorded calls.
        scratch: where finished parts are kept, so that a killed run goes on with the next.
        picture_score_of: for a backbone, what tells the mean PSNR in dB of the pictures that it makes.
        guided: whether every prompt is twice in the recorded batches.

    Raises:
        InputError: what a recipe cannot carry out, a budget below the cheap recipe, recordings with different timesteps.
    """
    assert recipe.routing is not None
    versions = [_version(model, each, statistics, trajectory, scratch) for each in versions_of(recipe)]
    timestep_index = share_clock(versions)
    blocks = model.family.blocks(model.backbone)
    trial = shared_copy(model.backbone)
    install_timestep_index(trial, timestep_index, torch.tensor(statistics.timesteps))
    found = _measured(model, recipe.routing, trial, blocks, versions, trajectory, scratch, guided)
    del trial
    costs = costs_of(versions, blocks)
    everything = {name: list(range(len(versions))) for name in blocks}
    modules = {name: branches_of(versions, name) for name in blocks}
    branch_state = assemble(versions, everything, keep=True)
    backbone = versions[0].backbone
    # a plan to begin with: the scorer gives the router others
    start = RoutingPlan(
        rule="static", timesteps=found.timesteps, used_bits=0, used_activation_bits=0, resident_bits=0, blocks=[]
    )
    following = follow(model.family, backbone, start)
    branch_state.caching = recipe.routing.reuse is not None
    scorer = PlanScorer(following.router, picture_score_of(backbone), costs)
    chosen, decision = decide_routes(recipe.routing, blocks, found, costs, scorer)
    routing, kept = reduced(chosen, recipe.routing.recipes)
    following.stop()
    for name, branches in modules.items():
        backbone.set_submodule(name, branches[0])
    assemble(versions, kept, keep=chosen.reuse is not None)
    plan = joined_plan(versions, kept, chosen.reuse is not None, recipe.name)
    model.backbone = backbone
    log.info("routing: %s, %s", chosen.rule, "no branches" if routing is None else f"{len(routing.blocks)} blocks")
    if routing is not None:
        follow(model.family, backbone, routing)
    return Routed(plan.model_copy(update={"routing": routing}), decision)


def _version(model: Model, recipe: Recipe, statistics: Statistics, trajectory: Trajectory, scratch: Scratch) -> Version:
    log.info("routing: the whole model by recipe %s", recipe.name)
    own = with_own_backbone(model)
    part = Scratch(scratch.folder / recipe.name, scratch.owner)
    plan = quantize_from_draft(own, recipe, draft_plan(own, recipe, statistics), trajectory, part)
    return Version(plan, own.backbone)


def _measured(
    model: Model,
    routing: Routing,
    trial: nn.Module,
    blocks: list[str],
    versions: list[Version],
    trajectory: Trajectory,
    scratch: Scratch,
    guided: bool,
) -> Measured:
    kept = scratch.load(MEASURED)
    if kept is not None:
        return Measured(timesteps=kept[1], **kept[0])
    branches = [branches_of(versions, name) for name in blocks]
    changes, reuse = routing.follows_changes, routing.reuse is not None
    found = measure_block_errors(model, trial, blocks, branches, trajectory, guided, changes, reuse)
    scratch.save(MEASURED, found.tensors(), found.timesteps)
    return found
