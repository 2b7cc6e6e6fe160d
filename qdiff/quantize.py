"""(float model, decisions, statistics) -> (plan, quantized backbone).

Decisions are those of a recipe's methods (:func:`quantize`) or of a plan that somebody wrote (:func:`quantize_as_planned`).
What is made from them is made by one class, :class:`_Realisation`, so a plan that is applied as it was decided gives the same
bytes. Layers are replaced in place, group by group, so the float model and the quantized one never stand in memory together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdiff import numerics
from qdiff.checkpoint import empty_layer, install_clock
from qdiff.distillation import Distilled, distil, float_predictions
from qdiff.errors import InputError
from qdiff.events import Progress, log
from qdiff.formats import format_named
from qdiff.layers import HalfConv2d, HalfLinear, QuantLinear, TimestepClock
from qdiff.methods import Problem, Solution, apply_method, check_reconstruction
from qdiff.methods.smooth import multiplier_for
from qdiff.models.base import Model, quantizable_layers
from qdiff.plan import Kept, LayerPlan, Plan, Structure
from qdiff.recipe import Recipe, Scheme, Sequential
from qdiff.reconstruction import Decided, reconstruct, split
from qdiff.scratch import Scratch
from qdiff.sequential import BlockWalk, ReplayWalk
from qdiff.statistics import InputStatistics, Statistics
from qdiff.structure import divide, restructure
from qdiff.trajectory import Trajectory

# What is decided for the layers of a group, given their entries as far as they are known before.
Solve = Callable[[Problem, list[LayerPlan]], Solution]


def quantize(
    model: Model,
    recipe: Recipe,
    statistics: Statistics,
    trajectory: Trajectory | None = None,
    scratch: Scratch | None = None,
) -> Plan:
    """Quantizes ``model.backbone`` in place by the methods of a recipe and returns the plan.

    Args:
        trajectory: needed by sequential recipes, which replay it block by block.
        scratch: where finished blocks of a sequential recipe are kept, so that a killed run goes on with the next.

    Raises:
        InputError: a pattern or method of the recipe that does not exist, NaN in a weight, statistics of another model, or
            a recipe that would quantize nothing.
    """
    return carry_out(model, recipe, draft(model, recipe, statistics), trajectory, scratch)


def carry_out(
    model: Model,
    recipe: Recipe,
    drafted: Draft,
    trajectory: Trajectory | None = None,
    scratch: Scratch | None = None,
) -> Plan:
    """:func:`quantize` from the draft on. Raises as there."""

    def solve(problem: Problem, members: list[LayerPlan]) -> Solution:
        solution = Solution()
        for method, options in recipe.methods.items():
            solution = apply_method(method, options or {}, problem, solution)
        return solution

    entries, statistics = drafted.entries, drafted.statistics
    if not any(entry.quantized for entry in entries.values()):
        raise InputError(f"recipe {recipe.name!r} ignores every layer", "nothing would be quantized; change ignore")
    if (recipe.sequential or recipe.distil) and trajectory is None:
        raise InputError(
            f"recipe {recipe.name!r} replays the recorded trajectory, which is not given", "calibrate first"
        )
    targets = float_predictions(model, trajectory) if recipe.distil and trajectory else []
    work = _Realisation(model, entries, solve, statistics, recipe.kept)
    if recipe.sequential is None or trajectory is None:
        work.all_groups()
    else:
        work.block_by_block(trajectory, recipe.sequential, scratch)
    plan = work.plan(recipe.name, drafted.structure)
    if recipe.distil is None or trajectory is None:
        return plan
    return distilled(plan, distil(model, trajectory, targets, recipe.distil, scratch))


def distilled(plan: Plan, result: Distilled) -> Plan:
    """The plan of a model that was trained as a whole; errors of single layers are not what it was trained for, and left out."""

    def entry(layer: LayerPlan) -> LayerPlan:
        if not layer.quantized:
            return layer
        changes: dict[str, Any] = {
            "methods": [*layer.methods, "distil"],
            "why": f"{layer.why}; {result}".removeprefix("; "),
        }
        if result.better:
            changes |= {"rounding": "distil", "sqnr_db": None}
        return layer.model_copy(update=changes)

    return plan.model_copy(update={"layers": [entry(layer) for layer in plan.layers]})


def quantize_as_planned(model: Model, plan: Plan, statistics: Statistics) -> Plan:
    """Quantizes ``model.backbone`` in place by the decisions of ``plan`` and returns it with the errors that they make.

    Args:
        plan: one that :func:`qdiff.edited_plan.settle` has checked against this model and these statistics.
    """

    def solve(problem: Problem, members: list[LayerPlan]) -> Solution:
        decided = members[0]  # the others of the group agree: settle() has seen to it
        return Solution(
            strength=decided.smoothing,
            multiplier=None if decided.smoothing is None else multiplier_for(problem, decided.smoothing),
            clip=decided.clip,
            timestep_scales=decided.timestep_scales,
            methods=tuple(decided.methods),
        )

    work = _Realisation(model, {layer.name: layer for layer in plan.layers}, solve, statistics, plan.kept)
    work.all_groups()
    return work.plan(plan.recipe, plan.structure)


def wanted_structure(model: Model, recipe: Recipe, statistics: Statistics) -> Structure:
    """What the recipe changes in this model before anything is decided about its layers."""
    family, layers = model.family, groups_of(model, statistics)
    ignored = recipe.ignored(family.name, list(quantizable_layers(model.backbone)))
    split = family.splits(model.backbone) if recipe.split_shortcuts else {}
    groups = statistics.inputs.values() if recipe.first_token else []
    firsts = [name for entry in groups if entry.first is not None for name in entry.layers]
    return Structure(
        split={name: at for name, at in split.items() if name not in ignored and name in layers},
        first_token=[name for name in firsts if name not in ignored],
    )


def change(model: Model, structure: Structure, statistics: Statistics) -> Statistics:
    """Changes the float model in place and returns the statistics of what it then is."""
    firsts = {
        name: entry.first for entry in statistics.inputs.values() if entry.first is not None for name in entry.layers
    }
    missing = [name for name in structure.first_token if name not in firsts]
    if missing:
        raise InputError(
            f"layer {missing[0]} has no constant first token in these statistics", "calibrate this model with qdiff"
        )
    restructure(model.backbone, structure, {name: firsts[name] for name in structure.first_token})
    return divide(statistics, structure)


def groups_of(model: Model, statistics: Statistics) -> dict[str, str]:
    """The group of every layer of the model that can be quantized; layers that calibration never reached have none.

    Raises:
        InputError: the statistics are of other layers.
    """
    layers = quantizable_layers(model.backbone)
    groups = {name: group for group, entry in statistics.inputs.items() for name in entry.layers}
    if statistics.outputs.keys() != layers.keys() or not groups.keys() <= layers.keys():
        raise InputError(
            f"the statistics are of another model: {len(statistics.outputs)} layers there, {len(layers)} here",
            "calibrate this model: qdiff calibrate … --force",
        )
    return {name: groups[name] for name in layers if name in groups}


@dataclass(frozen=True)
class Draft:
    """What is known before a method has decided anything.

    Args:
        structure: how the model was changed.
        statistics: of the changed model.
        entries: what the recipe alone says about every layer: formats, groups, outputs.
    """

    structure: Structure
    statistics: Statistics
    entries: dict[str, LayerPlan]


def draft(model: Model, recipe: Recipe, statistics: Statistics) -> Draft:
    """Changes the model's structure as the recipe wants it, in place, and says what the recipe makes of every layer.

    Raises:
        InputError: a pattern that matches no layer, statistics of another model, or a layer that a format's blocks do not divide.
    """
    structure = wanted_structure(model, recipe, statistics)
    ignored = recipe.ignored(model.family.name, list(quantizable_layers(model.backbone)))
    statistics = change(model, structure, statistics)
    groups, layers = groups_of(model, statistics), quantizable_layers(model.backbone)
    with_output = recipe.with_output(model.family.name, list(layers))
    entries = {}
    for name, linear in layers.items():
        entry = LayerPlan(
            name=name,
            kind=kind_of(linear),
            shape=tuple(linear.weight.shape),
            bias=linear.bias is not None,
            weights=recipe.kept,
            activations=recipe.kept,
            why=f"kept: ignore pattern {ignored.get(name)!r} of recipe {recipe.name}",
        )
        if name not in ignored and name not in groups:
            log.warning("quantize: calibration never reached layer %s; it is kept in %s", name, recipe.kept)
            entry = entry.model_copy(update={"why": "kept: calibration never reached this layer"})
        elif name not in ignored and entry.kind not in recipe.targets:
            entry = entry.model_copy(update={"why": f"kept: recipe {recipe.name} does not target {entry.kind}"})
        elif name not in ignored:
            scheme = recipe.scheme_of(entry.kind)
            _check_shape(name, entry, scheme)
            output = scheme.activations if name in with_output else None
            entry = entry.model_copy(
                update={
                    "weights": scheme.weights,
                    "activations": scheme.activations,
                    "by_token": scheme.by_token,
                    "output": output,
                    "group": groups[name],
                    "why": f"output {output} where the target runs it" if output else "",
                }
            )
        entries[name] = entry
    return Draft(structure, statistics, entries)


def kind_of(layer: nn.Module) -> Literal["Linear", "Conv2d"]:
    """What a plan calls a layer."""
    return "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"


def _check_shape(name: str, entry: LayerPlan, scheme: Scheme) -> None:
    """Refuses, by its name, a layer that the scheme's blocks do not divide, or whose input they cannot be laid over."""
    weights, activations = format_named(scheme.weights), format_named(scheme.activations)
    try:
        weights.packed_shape(entry.matrix)
        weights.check_columns(entry.matrix[1])
        if entry.kind == "Conv2d" and (activations.block or scheme.by_token):
            scales = f"{activations.name}'s blocks" if activations.block else "scales by token"
            raise InputError(
                f"a convolution's input cannot have {scales}",
                "give convolutions formats of their own (recipe: convolutions), or keep them (targets: [Linear])",
            )
        activations.check_columns(entry.matrix[1])
    except InputError as error:
        raise InputError(f"layer {name} of shape {list(entry.shape)}: {error.message}", error.fix) from None


class _Realisation:
    """Carries decisions out, group by group: float layers go, quantized ones come.

    Args:
        model: its backbone is changed in place.
        entries: what is known of every layer before.
        solve: decides about a group.
        kept: storage of what is not quantized.
    """

    def __init__(
        self, model: Model, entries: dict[str, LayerPlan], solve: Solve, statistics: Statistics, kept: Kept
    ) -> None:
        self.model, self.entries, self.solve, self.statistics, self.kept = model, entries, solve, statistics, kept
        self.backbone = model.backbone
        self.layers = quantizable_layers(self.backbone)
        self.planned = dict(entries)
        self.clock = TimestepClock()
        install_clock(self.backbone, self.clock, torch.tensor(statistics.timesteps))
        _round_kept(self.backbone, kept)

    def all_groups(self) -> None:
        """Every group on the statistics of the float model."""
        with Progress("quantize", len(self.layers)) as progress:
            for group, entry in self.statistics.inputs.items():
                self._group(group, entry)
                progress.advance(len(entry.layers))

    def block_by_block(self, trajectory: Trajectory, how: Sequential, scratch: Scratch | None) -> None:
        """Every block on the states that the quantized blocks before it produce; the rest, first, as :meth:`all_groups`."""
        blocks = self.model.family.blocks(self.backbone)
        groups = self.statistics.inputs
        outside = [group for group in groups if not any(group.startswith(f"{block}.") for block in blocks)]
        timesteps = self.statistics.timesteps
        learning = None if how.reconstruct is None else check_reconstruction(how.reconstruct)
        kind = BlockWalk if self.model.family.chain else ReplayWalk
        reference: BlockWalk | None = None
        if learning:
            # Of a chain the float model's states are moved through each block while that is still float; else a float copy of
            # the model has to stay.
            float_backbone = None if self.model.family.chain else copy.deepcopy(self.backbone)
            reference = kind(self.model, self.clock, trajectory, timesteps, how.tokens, float_backbone)
        with Progress("quantize", len(self.layers)) as progress:
            for group in outside:
                self._group(group, groups[group])
                progress.advance(len(groups[group].layers))
            walk = kind(self.model, self.clock, trajectory, timesteps, how.tokens)
            held_out = () if learning is None else split(walk.calls)[1]
            for block in walk.blocks:
                inside = [name for name in self.layers if name.startswith(f"{block}.")]
                if reference is not None:
                    reference.advance(block)
                if scratch is None or not self._restore(scratch, block):
                    observed = walk.observe(block, groups, held_out).items()
                    decided = [self._group(group, entry) for group, entry in observed]
                    if learning is not None and reference is not None:
                        made = [group for group in decided if group is not None]
                        reconstruct(*learning, walk, reference, block, made, self._realise)
                    if scratch is not None:
                        self._keep_block(scratch, block, inside)
                walk.leave(block)
                progress.advance(len(inside))

    def plan(self, recipe: str, structure: Structure) -> Plan:
        """The plan of what was done, in the order of the backbone's modules."""
        for name, linear in self.layers.items():  # no group reads anything into them
            _keep(self.backbone, self.entries[name], linear)
        modules = self.backbone.named_modules()
        order = [name for name, module in modules if isinstance(module, QuantLinear | HalfLinear | HalfConv2d)]
        return Plan(
            family=self.model.family.name,
            weights=self.model.weights,
            fingerprint=self.model.fingerprint,
            recipe=recipe,
            config=backbone_config(self.backbone),
            backbone_class=type(self.backbone).__name__,
            timesteps=self.statistics.timesteps,
            kept=self.kept,
            structure=structure,
            layers=[self.planned[name] for name in order],
        )

    def _group(self, group: str, inputs: InputStatistics) -> Decided | None:
        members = [self.entries[name] for name in inputs.layers if self.entries[name].quantized]
        decided = self._quantize(members, inputs) if members else None
        for name in inputs.layers:
            if not self.entries[name].quantized:
                _keep(self.backbone, self.entries[name], self.layers[name])
            del self.layers[name]
        return decided

    def _quantize(self, members: list[LayerPlan], inputs: InputStatistics) -> Decided:
        weights = []
        for entry in members:
            weight = self.layers[entry.name].weight.detach()
            numerics.require_finite(weight, f"the weight of {entry.name}")
            weights.append(weight.float().flatten(1))
        problem = Problem(
            [entry.name for entry in members],
            weights,
            inputs.columns(),
            format_named(members[0].weights),
            format_named(members[0].activations),
            members[0].by_token,
            members[0].kind,
            inputs.taps,
        )
        biases: list[Tensor | None] = [self.layers[entry.name].bias for entry in members]
        decided = Decided(members, problem, self.solve(problem, members), biases)
        self._realise(decided)
        return decided

    def _realise(self, decided: Decided) -> None:
        """Puts the layers of a group into the backbone, in the place of float or of quantized ones."""
        members, problem, solution = decided.members, decided.problem, decided.solution
        errors = problem.errors(solution, held_out=True)
        for index, (entry, error) in enumerate(zip(members, errors, strict=True)):
            plan = entry.model_copy(
                update={
                    "weights": (solution.weight_format or problem.weight_format).name,
                    "smoothing": solution.strength,
                    "multiplier": solution.multiplier is not None,
                    "shift": solution.shift is not None,
                    "rotation": 0 if solution.rotation is None else solution.rotation.block,
                    "outliers": solution.rotation is not None and solution.rotation.first is not None,
                    "rank": solution.rank,
                    "scale_rule": solution.rule,
                    "rounding": solution.rounding,
                    "bias_correction": solution.correction is not None,
                    "clip": solution.clip,
                    "timestep_scales": solution.timestep_scales,
                    "methods": list(solution.methods),
                    "why": "; ".join(note for note in (*solution.notes, entry.why) if note),
                    "sqnr_db": round(-10 * torch.tensor(max(error, 1e-30)).log10().item(), 3),
                }
            )
            state = _tensors(problem, solution, index, decided.biases[index], self.kept)
            state["output_scale"] = output_scale(self.statistics.outputs[entry.name], plan)
            # Members of a group get equal values, not one shared tensor.
            self._place(plan, {key: value.clone() for key, value in state.items() if value is not None})

    def _place(self, plan: LayerPlan, state: dict[str, Tensor]) -> None:
        replaced = self.backbone.get_submodule(plan.name)
        module = empty_layer(plan, len(self.statistics.timesteps), self.clock, self.kept, replaced)
        module.load_state_dict(state, assign=True)
        self.backbone.set_submodule(plan.name, module)
        self.planned[plan.name] = plan

    def _keep_block(self, scratch: Scratch, block: str, names: list[str]) -> None:
        state = {
            f"{name}|{key}": value
            for name in names
            for key, value in self.backbone.get_submodule(name).state_dict().items()
        }
        scratch.save(block, state, [self.planned[name].model_dump(mode="json") for name in names])

    def _restore(self, scratch: Scratch, block: str) -> bool:
        found = scratch.load(block)
        if found is None:
            return False
        tensors, entries = found
        for entry in (LayerPlan.model_validate(value) for value in entries):
            prefix = f"{entry.name}|"
            self._place(
                entry, {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
            del self.layers[entry.name]
        return True


def backbone_config(backbone: nn.Module) -> dict[str, Any]:
    """The diffusers config that the backbone is rebuilt from, as JSON values."""
    return json.loads(backbone.to_json_string())  # type: ignore[operator]


def _tensors(
    problem: Problem, solution: Solution, index: int, bias: Tensor | None, kept: Kept
) -> dict[str, Tensor | None]:
    """The buffers of a group's layer ``index`` (:class:`qdiff.layers.QuantLinear`), but for its output's scale."""
    storage = getattr(torch, kept)
    weight = problem.quantized_weights(solution)[index]
    scale, stretch = problem.activation_scale(solution)
    given = problem.biases(solution)[index]
    bias = None if bias is None else bias.detach().float()
    total = given if bias is None else bias if given is None else bias + given
    down, up = (None, None) if solution.low_rank is None else solution.low_rank[index]
    return {
        "codes": weight.packed(),
        "scale": weight.scale,
        "tensor_scale": weight.tensor_scale,
        "bias": None if total is None else total.to(storage).float(),
        "input_scale": scale,
        "multiplier": None if solution.multiplier is None else solution.multiplier[:: problem.taps],
        "shift": solution.shift,
        "rotation": None if solution.rotation is None else solution.rotation.last,
        "outlier_rotation": None if solution.rotation is None else solution.rotation.first,
        "outlier_order": None if solution.rotation is None else solution.rotation.order,
        "down": None if down is None else down.to(storage),
        "up": None if up is None else up.to(storage),
        "timestep_scale": stretch,
    }


def output_scale(amax: Tensor, plan: LayerPlan) -> Tensor | None:
    """The constant scale of a layer's output from its ranges by timestep ``[T]``; ``None`` when the output stays float."""
    return None if plan.output is None else numerics.choose_scale(amax.max(), format_named(plan.output))


def _keep(backbone: nn.Module, plan: LayerPlan, linear: nn.Linear | nn.Conv2d) -> None:
    module = empty_layer(plan, 0, None, "float16", linear)
    state = {"weight": linear.weight.detach().to(getattr(torch, plan.weights))}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach().to(state["weight"].dtype).float()
    module.load_state_dict(state, assign=True)
    backbone.set_submodule(plan.name, module)


def _round_kept(backbone: nn.Module, kept: str) -> None:
    """Rounds the parameters outside linear layers to the storage they get, so that this model equals the loaded one."""
    linear = {id(parameter) for layer in quantizable_layers(backbone).values() for parameter in layer.parameters()}
    for parameter in backbone.parameters():
        if id(parameter) not in linear:
            parameter.data = parameter.data.to(getattr(torch, kept)).float()
