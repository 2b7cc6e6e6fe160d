"""Before a method decides: how the model is changed, which layers there are then, and what the recipe alone says about each.

Cheap, so everything that cannot be carried out is refused here, before the float model has run once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from qdiff.errors import InputError, command
from qdiff.events import log
from qdiff.formats.scales import fits_float16
from qdiff.formats.table import format_named
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.nn.surgery import divide, restructure
from qdiff.plan.plan import LayerPlan, StorageDtype, Structure
from qdiff.plan.recipe import Recipe, Scheme
from qdiff.quantization.splits import gaining_splits
from qdiff.recording.activation_statistics import Statistics


def wanted_structure(model: Model, recipe: Recipe, statistics: Statistics, ignored: Collection[str] = ()) -> Structure:
    """Return what the recipe changes in this model before anything is decided about its layers, those apart that it
    ignores.
    """
    layers = groups_of(model, statistics)
    split = model.family.splits(model.backbone) if recipe.split_shortcuts else {}
    split = {name: at for name, at in split.items() if name not in ignored and name in layers}
    firsts = statistics.first_tokens if recipe.first_token else {}
    return Structure(
        split=gaining_splits(model, recipe, statistics, split),
        first_token=[name for name in firsts if name not in ignored],
    )


def change(model: Model, structure: Structure, statistics: Statistics) -> Statistics:
    """Change the float model in place and return the statistics of what it then is."""
    firsts = statistics.first_tokens
    missing = [name for name in structure.first_token if name not in firsts]
    if missing:
        raise InputError(
            f"layer {missing[0]} has no constant first token in these statistics", "calibrate this model with qdiff"
        )
    restructure(model.backbone, structure, {name: firsts[name] for name in structure.first_token})
    return divide(statistics, structure)


def groups_of(model: Model, statistics: Statistics) -> dict[str, str]:
    """Return the group of every layer of the model that can be quantized; layers that calibration never reached have
    none.

    Raises:
        InputError: the statistics are of other layers.
    """
    layers = quantizable_layers(model.backbone)
    groups = {name: group for group, entry in statistics.inputs.items() for name in entry.layers}
    if statistics.outputs.keys() != layers.keys() or not groups.keys() <= layers.keys():
        raise InputError(
            f"the statistics are of another model: {len(statistics.outputs)} layers there, {len(layers)} here",
            f"calibrate this model: {command('calibrate', '…', force=True)}",
        )
    return {name: groups[name] for name in layers if name in groups}


@dataclass(frozen=True)
class Draft:
    """What is known before a method has decided anything.

    Args:
        structure: how the model was changed.
        statistics: of the changed model.
        entries: what the recipe alone says about every layer: formats, groups, outputs.
        recipes: of a mixed recipe, by group, the one whose methods decide about it.
    """

    structure: Structure
    statistics: Statistics
    entries: dict[str, LayerPlan]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)


def draft_plan(model: Model, recipe: Recipe, statistics: Statistics) -> Draft:
    """Change the model's structure as the recipe wants it, in place, and say what the recipe makes of every layer.

    Raises:
        InputError: a pattern that matches no layer, statistics of another model, or a layer that a format's blocks do not divide.
    """
    structure, statistics = prepare(model, recipe, statistics)
    return Draft(structure, statistics, entries_of(model, recipe, statistics))


def prepare(model: Model, recipe: Recipe, statistics: Statistics) -> tuple[Structure, Statistics]:
    """Change the model's structure as the recipe wants it, in place; return what was changed, and statistics of what it
    then is.
    """
    ignored = recipe.ignored(model.family.name, list(quantizable_layers(model.backbone)))
    structure = wanted_structure(model, recipe, statistics, ignored)
    return structure, change(model, structure, statistics)


def entries_of(model: Model, recipe: Recipe, statistics: Statistics, *, lenient: bool = False) -> dict[str, LayerPlan]:
    """Return what a recipe alone says about every layer of a model that :func:`prepare` has changed.

    Args:
        model: the float model.
        recipe: whose formats and patterns are taken.
        statistics: of that model.
        lenient: layers that the formats do not fit are kept, instead of an error.

    Raises:
        InputError: as :func:`draft_plan`.
    """
    groups, layers = groups_of(model, statistics), quantizable_layers(model.backbone)
    ignored = recipe.ignored(model.family.name, list(layers))
    with_output = recipe.with_output(model.family.name, list(layers))
    entries = {}
    for name, linear in layers.items():
        reason, kind = None, kind_of(linear)
        if name in ignored:
            reason = f"ignore pattern {ignored[name]!r} of recipe {recipe.name}"
        elif name not in groups:
            log.warning("quantize: calibration never reached layer %s; it is kept in %s", name, recipe.storage_dtype)
            reason = "calibration never reached this layer"
        elif kind not in recipe.targets:
            reason = f"recipe {recipe.name} does not target {kind}"
        else:
            try:
                _check_shape(name, linear, recipe.scheme_of(kind))
            except InputError as error:
                if not lenient:
                    raise
                reason = error.message
        if reason is not None:
            entries[name] = kept_entry(name, linear, recipe.storage_dtype, reason)
            continue
        scheme = recipe.scheme_of(kind)
        output = scheme.activations if name in with_output else None
        entries[name] = LayerPlan(
            **_facts(name, linear),
            weights=scheme.weights,
            activations=scheme.activations,
            per_token=scheme.per_token,
            output=output,
            group=groups[name],
            why=f"output {output} where the target runs it" if output else "",
        )
    return entries


def kept_entry(name: str, layer: nn.Linear | nn.Conv2d, storage_dtype: StorageDtype, reason: str) -> LayerPlan:
    """Return the entry of a layer that stays unquantized, in ``storage_dtype``, or in float32 where that cannot hold
    its weight.
    """
    storage: str = storage_dtype
    if storage_dtype == "float16" and not fits_float16(layer.weight):
        storage = "float32"
        reason += (
            f"; in float32, as its weight reaches {layer.weight.detach().abs().max():.2g} and float16 ends at 65,504"
        )
    return LayerPlan(**_facts(name, layer), weights=storage, activations=storage, why=f"kept: {reason}")


def _facts(name: str, layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """Return what an entry says about the layer itself."""
    return {"name": name, "kind": kind_of(layer), "shape": tuple(layer.weight.shape), "bias": layer.bias is not None}


def kind_of(layer: nn.Module) -> Literal["Linear", "Conv2d"]:
    """Return what a plan calls a layer."""
    return "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"


def _check_shape(name: str, layer: nn.Linear | nn.Conv2d, scheme: Scheme) -> None:
    """Refuse, by its name, a layer that the scheme's blocks do not divide, or whose input they cannot be laid over."""
    shape = tuple(layer.weight.shape)
    try:
        check_formats(
            kind_of(layer), (shape[0], math.prod(shape[1:])), scheme.weights, scheme.activations, scheme.per_token
        )
    except InputError as error:
        raise InputError(f"layer {name} of shape {list(shape)}: {error.message}", error.fix) from None


def check_formats(kind: str, matrix: tuple[int, int], weights: str, activations: str, per_token: bool) -> None:
    """Refuse formats that a layer of that kind and matrix cannot have.

    Raises:
        InputError: blocks that do not divide its columns, codes that do not fill bytes, or scales that windows do not have.
    """
    of_weights, of_input = format_named(weights), format_named(activations)
    of_weights.packed_shape(matrix)
    of_weights.check_columns(matrix[1])
    if kind == "Conv2d" and (of_input.block or per_token):
        scales = f"{of_input.name}'s blocks" if of_input.block else "scales per token"
        raise InputError(
            f"a convolution's input cannot have {scales}",
            "give convolutions formats of their own (recipe: convolutions), or keep them (targets: [Linear])",
        )
    of_input.check_columns(matrix[1])
