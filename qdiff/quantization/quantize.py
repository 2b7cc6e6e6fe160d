"""(float model, decisions, statistics) -> (plan, quantized backbone).

Decisions are those of a recipe's methods (:func:`quantize`) or of a plan that somebody wrote (:func:`quantize_as_planned`).
What is made from them is made by one class, :class:`GroupQuantizer`, so a plan that is applied as it was decided gives the same
bytes. Layers are replaced in place, group by group, so the float model and the quantized one never stand in memory together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, QualityGateError, option
from qdiff.events import Progress, log
from qdiff.formats import scales
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup, apply_method, check_reconstruction
from qdiff.methods.smooth import multiplier_for
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.nn.quant_linear import KeptConv2d, KeptLinear, QuantLinear, TimestepIndex
from qdiff.plan.plan import LayerPlan, Plan, StorageDtype, Structure
from qdiff.plan.recipe import Recipe, Sequential
from qdiff.quantization.block_walk import BlockWalk, ReplayWalk
from qdiff.quantization.checkpoint import empty_layer, install_timestep_index
from qdiff.quantization.distillation import distil, distilled, float_predictions
from qdiff.quantization.layer_plans import Draft, draft_plan, kept_entry
from qdiff.quantization.quantized_layer import buffers_of, output_scale, plan_of
from qdiff.quantization.reconstruction import Decided, reconstruct, split
from qdiff.quantization.storage import keep_layer, round_to_storage
from qdiff.recording.activation_statistics import InputStatistics, Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.partial import Scratch

# What is decided for the layers of a group, given their entries as far as they are known before.
Decide = Callable[[LayerGroup, list[LayerPlan]], Decisions]


def quantize(
    model: Model,
    recipe: Recipe,
    statistics: Statistics,
    trajectory: Trajectory | None = None,
    scratch: Scratch | None = None,
) -> Plan:
    """Quantize ``model.backbone`` in place by the methods of a recipe and return the plan.

    Args:
        model: its backbone is changed in place.
        recipe: formats and methods.
        statistics: of the float model.
        trajectory: needed by sequential recipes, which replay it block by block.
        scratch: where finished blocks of a sequential recipe are kept, so that a killed run goes on with the next.

    Raises:
        InputError: a pattern or method of the recipe that does not exist, NaN in a weight, statistics of another model, or
            a recipe that would quantize nothing.
    """
    return quantize_from_draft(model, recipe, draft_plan(model, recipe, statistics), trajectory, scratch)


def quantize_from_draft(
    model: Model,
    recipe: Recipe,
    drafted: Draft,
    trajectory: Trajectory | None = None,
    scratch: Scratch | None = None,
    complete: Callable[[], None] = lambda: None,
) -> Plan:
    """Do the work of :func:`quantize` from the draft on. Raise as it does.

    Args:
        model: its backbone is changed in place.
        recipe: formats and methods.
        drafted: what the recipe says before anything is measured.
        trajectory: see :func:`quantize`.
        scratch: see :func:`quantize`.
        complete: puts in place what the finished backbone has besides its layers (sparse attention), so that a recipe that trains
            the whole trains that too. Called once, when all layers are quantized.
    """

    def decide(layer_group: LayerGroup, members: list[LayerPlan]) -> Decisions:
        own = drafted.recipes.get(members[0].group or "", recipe)
        return decide_by(own, layer_group)

    entries, statistics = drafted.entries, drafted.statistics
    if not any(entry.quantized for entry in entries.values()):
        raise InputError(f"recipe {recipe.name!r} ignores every layer", "nothing would be quantized; change ignore")
    if (recipe.sequential or recipe.distil) and trajectory is None:
        raise InputError(
            f"recipe {recipe.name!r} replays the recorded trajectory, which is not given", "calibrate first"
        )
    if recipe.sequential and recipe.sequential.reconstruct and trajectory and len(list(islice(trajectory, 2))) < 2:
        raise InputError(
            f"recipe {recipe.name!r} learns on some recorded calls and judges on others, and there is one call",
            "calibrate with more prompts or steps",
        )
    targets = float_predictions(model, trajectory) if recipe.distil and trajectory else []
    teacher = copy.deepcopy(model.backbone) if recipe.distil and recipe.distil.blocks else None
    quantizer = GroupQuantizer(model, entries, decide, statistics, recipe.storage_dtype, recipe.floors.layer)
    if recipe.sequential is None or trajectory is None:
        quantizer.all_groups()
    else:
        quantizer.block_by_block(trajectory, recipe.sequential, scratch)
    plan = quantizer.plan(recipe.name, drafted.structure)
    if not plan.quantized:
        raise QualityGateError(
            f"recipe {recipe.name!r}: the output of every layer is below {recipe.floors.layer:g} dB, so none is quantized",
            f"take formats of more bits, or lower the floor ({option('settings', ['floors.layer=…'])})",
        )
    complete()
    if recipe.distil is None or trajectory is None:
        return plan
    return distilled(plan, distil(model, trajectory, targets, recipe.distil, scratch, teacher))


def decide_by(recipe: Recipe, layer_group: LayerGroup) -> Decisions:
    """Return what a recipe's methods decide about a group, one after the other."""
    decisions = Decisions()
    for method, options in recipe.methods.items():
        decisions = apply_method(method, options or {}, layer_group, decisions)
    return decisions


def quantize_groups(
    model: Model, recipe: Recipe, entries: dict[str, LayerPlan], statistics: Statistics
) -> dict[str, LayerPlan]:
    """Quantize ``model.backbone`` in place by a recipe's methods on the float model's statistics, every group on its
    own.

    Args:
        model: its backbone is changed in place.
        recipe: formats and methods.
        entries: :func:`qdiff.quantization.layer_plans.entries_of` of the recipe.
        statistics: of the float model.

    Returns:
        what became of every layer.
    """
    quantizer = GroupQuantizer(
        model, entries, lambda layer_group, members: decide_by(recipe, layer_group), statistics, recipe.storage_dtype
    )
    quantizer.all_groups()
    return quantizer.planned


def quantize_as_planned(model: Model, plan: Plan, statistics: Statistics) -> Plan:
    """Quantize ``model.backbone`` in place by the decisions of ``plan`` and return it with the errors that they make.

    Args:
        model: its backbone is changed in place.
        plan: one that :func:`qdiff.quantization.edited_plan.settle` has checked against this model and these statistics.
        statistics: of the float model.
    """

    def decide(layer_group: LayerGroup, members: list[LayerPlan]) -> Decisions:
        decided = members[0]  # the others of the group agree: settle() has seen to it
        return Decisions(
            smoothing=decided.smoothing,
            input_multiplier=None if decided.smoothing is None else multiplier_for(layer_group, decided.smoothing),
            clip=decided.clip,
            timestep_scales=decided.timestep_scales,
            methods=tuple(decided.methods),
        )

    quantizer = GroupQuantizer(
        model, {layer.name: layer for layer in plan.layers}, decide, statistics, plan.storage_dtype
    )
    quantizer.all_groups()
    return quantizer.plan(plan.recipe, plan.structure)


class GroupQuantizer:
    """Carries decisions out, group by group: float layers go, quantized ones come.

    Args:
        model: its backbone is changed in place.
        entries: what is known of every layer before.
        decide: decides about a group.
        storage_dtype: of what is not quantized.
        floor: SQNR in dB of a layer's output below which it is kept; ``None``: decisions are carried out whatever comes of them.
    """

    def __init__(
        self,
        model: Model,
        entries: dict[str, LayerPlan],
        decide: Decide,
        statistics: Statistics,
        storage_dtype: StorageDtype,
        floor: float | None = None,
    ) -> None:
        self.floor = floor
        self.model, self.entries, self.decide, self.statistics, self.storage_dtype = (
            model,
            entries,
            decide,
            statistics,
            storage_dtype,
        )
        self.backbone = model.backbone
        self.layers = quantizable_layers(self.backbone)
        self.planned = dict(entries)
        self.timestep_index = TimestepIndex()
        install_timestep_index(self.backbone, self.timestep_index, torch.tensor(statistics.timesteps))
        round_to_storage(self.backbone, storage_dtype)

    def all_groups(self) -> None:
        """Quantize every group on the statistics of the float model."""
        with Progress("quantize", len(self.layers)) as progress:
            for group, entry in self.statistics.inputs.items():
                self._group(group, entry)
                progress.advance(len(entry.layers))

    def block_by_block(self, trajectory: Trajectory, how: Sequential, scratch: Scratch | None) -> None:
        """Quantize every block on the states that the quantized blocks before it produce; the rest, first, as
        :meth:`all_groups` does.
        """
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
            reference = kind(self.model, self.timestep_index, trajectory, timesteps, how.tokens, float_backbone)
        with Progress("quantize", len(self.layers)) as progress:
            for group in outside:
                self._group(group, groups[group])
                progress.advance(len(groups[group].layers))
            walk = kind(self.model, self.timestep_index, trajectory, timesteps, how.tokens)
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
                        reconstruct(learning, walk, reference, block, made, self._place_group)
                    if scratch is not None:
                        self._keep_block(scratch, block, inside)
                walk.leave(block)
                progress.advance(len(inside))

    def plan(self, recipe: str, structure: Structure) -> Plan:
        """Return the plan of what was done, in the order of the backbone's modules."""
        for name, linear in self.layers.items():  # no group reads anything into them
            keep_layer(self.backbone, self.entries[name], linear)
        modules = self.backbone.named_modules()
        order = [name for name, module in modules if isinstance(module, QuantLinear | KeptLinear | KeptConv2d)]
        return Plan(
            family=self.model.family.name,
            weights=self.model.weights,
            fingerprint=self.model.fingerprint,
            recipe=recipe,
            config=backbone_config(self.backbone),
            backbone_class=type(self.backbone).__name__,
            timesteps=self.statistics.timesteps,
            storage_dtype=self.storage_dtype,
            structure=structure,
            layers=[self.planned[name] for name in order],
        )

    def _group(self, group: str, inputs: InputStatistics) -> Decided | None:
        members = [self.entries[name] for name in inputs.layers if self.entries[name].quantized]
        decided = self._quantize(members, inputs) if members else None
        for name in inputs.layers:
            if not self.planned[name].quantized:
                keep_layer(self.backbone, self.planned[name], self.layers[name])
            del self.layers[name]
        return decided

    def _quantize(self, members: list[LayerPlan], inputs: InputStatistics) -> Decided | None:
        """Decide about a group and place its layers; those below the floor, or all, are left for :meth:`_group` to
        keep.
        """
        weights = []
        for entry in members:
            weight = self.layers[entry.name].weight.detach()
            scales.require_finite(weight, f"the weight of {entry.name}")
            weights.append(weight.float().flatten(1))
        layer_group = LayerGroup(
            [entry.name for entry in members],
            weights,
            inputs.to(self.model.device).columns(),
            format_named(members[0].weights),
            format_named(members[0].activations),
            members[0].per_token,
            members[0].kind,
            inputs.taps,
        )
        biases: list[Tensor | None] = [self.layers[entry.name].bias for entry in members]
        decided = Decided(members, layer_group, self.decide(layer_group, members), biases)
        errors = layer_group.errors(decided.decisions, held_out=True)
        above = [index for index, error in enumerate(errors) if self.floor is None or sqnr_db_of(error) >= self.floor]
        for index, entry in enumerate(members):
            if index not in above:
                self._refuse(entry, sqnr_db_of(errors[index]))
        if not above:
            return None
        if len(above) < len(members):
            decided = decided.only(above)
            errors = decided.layer_group.errors(decided.decisions, held_out=True)
        self._place_group(decided, errors)
        return decided

    def _refuse(self, entry: LayerPlan, reached: float) -> None:
        """Plan to keep a layer in float, because its output would be below the floor."""
        reason = f"{entry.precision} reaches {reached:.1f} dB, the floor is {self.floor:g} dB (floors.layer)"
        self.planned[entry.name] = kept_entry(entry.name, self.layers[entry.name], self.storage_dtype, reason)
        log.warning("quantize: %s is kept: %s", entry.name, reason)

    def _place_group(self, decided: Decided, errors: list[float] | None = None) -> None:
        """Put the layers of a group into the backbone, in the place of float or of quantized ones.

        Args:
            decided: the group and what was decided about it.
            errors: of their outputs on held-out tokens, where they are known.
        """
        members, layer_group, decisions = decided.members, decided.layer_group, decided.decisions
        errors = layer_group.errors(decisions, held_out=True) if errors is None else errors
        for index, (entry, error) in enumerate(zip(members, errors, strict=True)):
            plan = plan_of(entry, layer_group, decisions, sqnr_db_of(error))
            state = buffers_of(layer_group, decisions, index, decided.biases[index], self.storage_dtype)
            state["output_scale"] = output_scale(self.statistics.outputs[entry.name], plan)
            # Members of a group get equal values, not one shared tensor.
            self._place(plan, {key: value.clone() for key, value in state.items() if value is not None})

    def _place(self, plan: LayerPlan, state: dict[str, Tensor]) -> None:
        replaced = self.backbone.get_submodule(plan.name)
        module = empty_layer(plan, len(self.statistics.timesteps), self.timestep_index, self.storage_dtype, replaced)
        module.load_state_dict(state, assign=True)
        self.backbone.set_submodule(plan.name, module.to(self.model.device))
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


def sqnr_db_of(error: float) -> float:
    """Return the SQNR in dB of a normalised mean square error; at most 300, NaN of NaN."""
    return -10 * torch.tensor(max(error, 1e-30)).log10().item()


def backbone_config(backbone: nn.Module) -> dict[str, Any]:
    """Return the diffusers config that the backbone is rebuilt from, as JSON values; without the path that it was
    loaded from, which differs from machine to machine.
    """
    if not hasattr(backbone, "to_json_string"):  # a module that is not diffusers'
        return {}
    config = json.loads(backbone.to_json_string())  # type: ignore[operator]
    config.pop("_name_or_path", None)
    return config
