"""Every group of layers in every format that it may get, and a backbone in which they can be put one by one.

The float weights are shared with the model, packed ones are small, so all of it together takes little more memory than the float
model. What is put in is made from the float model's statistics; the model that comes out in the end is made anew, block by block
where the recipes say so (:func:`qdiff.quantization.quantize.quantize_from_draft`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.events import log
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.nn.quant_linear import QuantLinear, TimestepIndex
from qdiff.plan.plan import LayerPlan
from qdiff.plan.recipe import Recipe
from qdiff.quantization.checkpoint import install_timestep_index
from qdiff.quantization.layer_plans import Draft, entries_of, groups_of, kept_entry
from qdiff.quantization.quantize import quantize_groups
from qdiff.quantization.storage import half_layer, round_to_storage
from qdiff.recipes import members_of
from qdiff.recording.activation_statistics import Statistics

FLOAT = -1  # in place of a format: the float layer


class Candidates:
    """See the module's docstring.

    Args:
        model: its backbone has the structure that the recipe wants and is float; nothing in it is changed.
        recipe: a mixed one.
        statistics: of that backbone.

    ``groups`` maps a group to its layers, those alone that can be quantized; ``names`` are the formats' names, ``entries`` what
    becomes of every layer in each; ``backbone`` is called with layers put in.

    Raises:
        InputError: a group that can have none of the formats.
    """

    def __init__(self, model: Model, recipe: Recipe, statistics: Statistics) -> None:
        assert recipe.mixed is not None
        self.model, self.recipe = model, recipe
        self.names = list(recipe.mixed.recipes)
        self.members = members_of(recipe)
        ignored = recipe.ignored(model.family.name, list(quantizable_layers(model.backbone)))
        self.groups: dict[str, list[str]] = {}
        for layer, group in groups_of(model, statistics).items():
            if layer not in ignored:
                self.groups.setdefault(group, []).append(layer)
        self.backbone = shared_copy(model.backbone)
        round_to_storage(self.backbone, recipe.storage_dtype)
        self.timestep_index = TimestepIndex()
        install_timestep_index(self.backbone, self.timestep_index, torch.tensor(statistics.timesteps))
        layers = quantizable_layers(self.backbone)
        self._float = {name: layers[name] for names in self.groups.values() for name in names}
        self._modules: list[dict[str, nn.Module]] = []
        self.entries: list[dict[str, LayerPlan]] = []
        self._drafts: list[dict[str, LayerPlan]] = []  # before methods decided
        for name, member in zip(self.names, self.members, strict=True):
            self._add(name, member, statistics)
        for group in self.groups:
            if not any(self.possible(group)):
                raise InputError(f"the layers of {group} can have none of {', '.join(self.names)}")

    def possible(self, group: str) -> list[bool]:
        """Return which formats a group can have."""
        return [all(name in modules for name in self.groups[group]) for modules in self._modules]

    def put(self, group: str, format: int) -> None:
        """Put a group's layers in, in the format with that index; :data:`FLOAT`: takes them out."""
        source = self._float if format == FLOAT else self._modules[format]
        for name in self.groups[group]:
            self.backbone.set_submodule(name, source[name])

    def entries_of(self, layer: str) -> LayerPlan:
        """Return what becomes of a layer in the first format that it can have: for what all of them share."""
        return next(entries[layer] for entries in self.entries if layer in entries)

    def module(self, layer: str, format: int) -> nn.Module:
        """Return a layer in the format with that index."""
        return self._modules[format][layer]

    def float_layer(self, layer: str) -> nn.Module:
        """Return a layer as it was."""
        return self._float[layer]

    def put_all(self, choice: Sequence[int] | Tensor) -> None:
        """Put all groups in, in their order."""
        for group, format in zip(self.groups, choice, strict=True):
            self.put(group, int(format))

    def draft(self, drafted: Draft, choice: Mapping[str, int]) -> Draft:
        """Return the draft of the plan that gives every group the format with that index; ``drafted`` says what is not
        chosen for.
        """
        entries, recipes = dict(drafted.entries), {}
        if all(self.members[format] is None for format in choice.values()):
            raise InputError(
                f"the budget leaves every layer in {self.recipe.storage_dtype}", "lower it, or quantize nothing"
            )
        for group, format in choice.items():
            member = self.members[format]
            for layer in self.groups[group]:
                entries[layer] = self._drafts[format][layer]
            if member is not None:
                recipes[group] = member
        return Draft(drafted.structure, drafted.statistics, entries, recipes)

    def _add(self, name: str, member: Recipe | None, statistics: Statistics) -> None:
        if member is None:
            kept, reason = self.recipe.storage_dtype, "the budget leaves it"
            entries = {layer: kept_entry(layer, module, kept, reason) for layer, module in self._float.items()}
            self._modules.append({layer: half_layer(entries[layer], module) for layer, module in self._float.items()})
            self.entries.append(entries)
            self._drafts.append(entries)
            return
        log.info("mixed: every layer by recipe %s", name)
        copied = with_own_backbone(self.model)
        wanted = {layer for layers in self.groups.values() for layer in layers}
        entries = entries_of(copied, member, statistics, lenient=True)
        planned = quantize_groups(copied, member, entries, statistics)
        made = {
            layer: copied.backbone.get_submodule(layer)
            for layer, entry in planned.items()
            if entry.quantized and layer in wanted
        }
        for module in made.values():
            if isinstance(module, QuantLinear):
                module.timestep_index = self.timestep_index
        self._modules.append(made)
        self._drafts.append(entries)
        self.entries.append({layer: planned[layer] for layer in made})


def with_own_backbone(model: Model) -> Model:
    """Return the model with a backbone that can be changed and that shares its numbers, and with nothing else of its
    pipeline.
    """
    copied = copy.copy(model)
    copied.pipeline = _Holder(model.family.backbone_attribute, shared_copy(model.backbone))
    return copied


class _Holder:
    """A pipeline of which only the backbone is there."""

    def __init__(self, attribute: str, backbone: nn.Module) -> None:
        setattr(self, attribute, backbone)


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy whose layers can be replaced and whose parameters can be given other data; the data itself is
    shared.
    """
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in module.parameters()
    }
    shared |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, shared)
