"""A plan that a hand has edited: read, checked against the model that it is for, and told what the hand has changed.

A plan holds two kinds of entries. *Decisions* can be edited: the formats of a layer and of its output, smoothing, range,
scales by timestep, and ``kept``. *Facts* are of the model: names, shapes, groups, the config. An edited fact is refused as
a plan of something else, an edited decision that no layer could carry out as bad input. A layer that is kept has only its
format: what the file still says about its smoothing is left out, so that one edit is enough to keep a layer. ``why``,
``methods`` and ``sqnr_db`` follow from the decisions and are written anew; ``timesteps`` and ``weights`` are those of the run
that the plan is applied to, so a plan can be carried to another calibration of the same model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from qdiff.errors import InputError, IntegrityError, QdiffError, nearest
from qdiff.events import log
from qdiff.files import read_user_text
from qdiff.formats.scales import fits_float16
from qdiff.formats.table import FORMATS
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.plan.plan import LayerPlan, Plan
from qdiff.quantization.layer_plans import check_formats, groups_of, kind_of
from qdiff.quantization.quantize import backbone_config
from qdiff.recording.activation_statistics import Statistics
from qdiff.runs.json_diff import shortened

BY_HAND = "set by hand: "
FROM_FILE = "from a plan file: "
OF_KEPT = ("weights", "activations")  # all that is decided about a layer that is not quantized
SHARED = (*OF_KEPT, "per_token", "smoothing", "clip", "timestep_scales")  # one value for all that read one tensor
DECISIONS = (*SHARED, "output")
FACTS = ("name", "kind", "shape", "bias", "group")
WRITTEN = ("methods", "why", "sqnr_db")  # anew, whatever the file says
# What is left needs more than the plan says (numbers that a method found), so a plan by hand does without.
BY_METHODS = tuple(name for name in LayerPlan.model_fields if name not in (*DECISIONS, *FACTS, *WRITTEN))
_UNSET: dict[str, Any] = {
    name: LayerPlan.model_fields[name].default for name in (*DECISIONS, *BY_METHODS) if name not in OF_KEPT
}


def read(path: Path) -> Plan:
    """Return the plan in a file that a person gives.

    Raises:
        InputError: missing, not JSON, or not of a plan's form.
    """
    read_user_text(path, "the plan")
    try:
        return Plan.load(path)
    except IntegrityError as error:
        fix = "correct the file, or begin from the plan.json that the quantization wrote"
        raise InputError(error.message, fix) from None


def decisions(plan: Plan) -> dict[str, Any]:
    """Return what the plan decides, as JSON: two plans with equal decisions make the same tensors."""
    return {
        "recipe": plan.recipe,
        "storage_dtype": plan.storage_dtype,
        "attention": plan.attention and plan.attention.model_dump(mode="json"),
        "layers": {layer.name: {name: getattr(layer, name) for name in _decided(layer)} for layer in plan.layers},
    }


def settle(plan: Plan, model: Model, statistics: Statistics, before: Plan | None, source: Path) -> Plan:
    """Return ``plan`` ready for :func:`qdiff.quantization.quantize.quantize_as_planned`: checked, and with the reason
    of every entry.

    Args:
        plan: as :func:`read` gave it.
        model: the float model; nothing in it is changed.
        statistics: of the float model.
        before: the decisions that the run had until now, if it had any; where the plan differs, ``why`` says so.
        source: the plan's file, for messages.

    Raises:
        IntegrityError: it is the plan of another model, or a fact in it was changed.
        InputError: a decision that cannot be carried out, or none that quantizes a layer.
    """
    another = "give a plan of this model: quantize this run with a recipe, and edit the plan.json that it writes"
    _refuse(IntegrityError, source, _other_model(plan, model), another)
    groups, layers = groups_of(model, statistics), quantizable_layers(model.backbone)
    facts = [fault for layer in plan.layers for fault in _facts(layer, layers[layer.name], groups.get(layer.name))]
    _refuse(IntegrityError, source, facts, f"take that back; what can be edited is {', '.join(DECISIONS)}")
    known = {}
    if before is not None and before.fingerprint == plan.fingerprint:
        known = {layer.name: layer for layer in before.layers}
    wrong = [
        fault
        for layer in plan.layers
        for fault in _impossible(layer, plan.storage_dtype, known.get(layer.name), layers[layer.name])
    ]
    unreached = [layer.name for layer in plan.quantized if layer.name not in groups]
    wrong += [f"{name}: calibration never reached this layer; keep it in {plan.storage_dtype}" for name in unreached]
    wrong += _disagreements([layer for layer in plan.quantized if layer.name in groups], groups)
    if not plan.quantized:
        wrong.append("it quantizes no layer")
    _refuse(
        InputError, source, wrong, 'correct the file; docs/recipes/plans.md, "Editing a plan", says what can be set'
    )
    settled = [_settled(layer, groups.get(layer.name), known.get(layer.name)) for layer in plan.layers]
    return plan.model_copy(update={"layers": settled})


def _refuse(kind: type[QdiffError], source: Path, faults: Iterable[str], fix: str) -> None:
    found = list(faults)
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise kind(f"{source}: {'; '.join(found[:5])}{more}", fix)


def _decided(layer: LayerPlan) -> tuple[str, ...]:
    return DECISIONS if layer.quantized else OF_KEPT


def _text(value: Any) -> str:
    """Return a value as the file spells it, without quotes."""
    return json.dumps(value).strip('"')


def _other_model(plan: Plan, model: Model) -> Iterator[str]:
    if plan.fingerprint != model.fingerprint:
        yield (
            f"this is the plan of another model: of {plan.family} with the fingerprint {plan.fingerprint[:16]}, "
            f"this run's has {model.fingerprint[:16]}"
        )
        return
    backbone = model.backbone
    for name, there, here in (
        ("family", plan.family, model.family.name),
        ("backbone_class", plan.backbone_class, type(backbone).__name__),
    ):
        if there != here:
            yield f"{name} is {there!r}, the model's is {here!r}"
    config = backbone_config(backbone)
    for name in sorted(config.keys() | plan.config.keys()):
        value, real = plan.config.get(name), config.get(name)
        if value != real and not name.startswith("_"):  # those say where and by which diffusers it was saved
            yield f"config.{name} is {shortened(value)}, the model's is {shortened(real)}"
    layers, planned = quantizable_layers(backbone), {layer.name for layer in plan.layers}
    for name in sorted(planned - layers.keys()):
        close = nearest(name, layers, 1)
        yield f"the model has no layer {name!r}" + (f" (the nearest is {close[0]})" if close else "")
    for name in layers:
        if name not in planned:
            yield f"the layer {name!r} is missing"


def _facts(layer: LayerPlan, linear: nn.Module, group: str | None) -> Iterator[str]:
    """Yield facts about one layer that are not the model's."""
    shape = tuple(linear.weight.shape)  # type: ignore[arg-type]
    if layer.shape != shape:
        yield f"{layer.name}: shape is {list(layer.shape)}, the model's is {list(shape)}"
    if layer.kind != kind_of(linear):
        yield f"{layer.name}: kind is {layer.kind}, the model's is {kind_of(linear)}"
    if layer.bias != (linear.bias is not None):
        yield f"{layer.name}: bias is {_text(layer.bias)}, the model's is {_text(linear.bias is not None)}"
    if layer.group not in (None, group):
        reads = f"it reads the tensor of {group!r}" if group else "calibration never reached this layer"
        yield f"{layer.name}: group is {layer.group!r}, but {reads}"


def _is_smoothing(layer: LayerPlan, before: LayerPlan | None) -> bool:
    """Return whether a layer's multiplier follows from its smoothing, or did before the hand took the smoothing
    away.
    """
    if layer.smoothing is not None or before is None:
        return layer.smoothing is not None
    return before.smoothing is not None or not before.input_multiplier


def _impossible(layer: LayerPlan, storage_dtype: str, before: LayerPlan | None, linear: nn.Module) -> Iterator[str]:
    """Yield decisions about one layer that no layer can carry out."""
    activations = FORMATS[layer.activations]
    if activations.quantized and not layer.quantized:
        pair = f"weights {layer.weights} with activations {layer.activations}"
        yield f"{layer.name}: {pair}: quantize the weights too, or keep both in {storage_dtype}"
    elif layer.quantized:
        per_token_possible = activations.quantized and not activations.block
        if layer.per_token and not per_token_possible:
            yield f"{layer.name}: per_token is true; activations {layer.activations} have no scale per token"
        if layer.timestep_scales and (layer.per_token or not per_token_possible):
            yield f"{layer.name}: timestep_scales is true; its activations have no constant scale that it could follow"
        if layer.smoothing is not None and not 0 < layer.smoothing <= 1:
            yield f"{layer.name}: smoothing is {_text(layer.smoothing)}; it is null, or above 0 and at most 1"
        if not 0 < layer.clip <= 1:
            yield f"{layer.name}: clip is {_text(layer.clip)}; it is above 0 and at most 1"
        try:
            check_formats(layer.kind, layer.matrix, layer.weights, layer.activations, layer.per_token)
        except InputError as error:
            yield f"{layer.name}: {error.message}"
        outputs = (None, layer.activations) if per_token_possible else (None,)
        if layer.output not in outputs:
            yield f"{layer.name}: output is {layer.output}; it can be {' or '.join(map(_text, outputs))}"
        for name in BY_METHODS:
            value, unset = getattr(layer, name), _UNSET[name]
            if value != unset and not (name == "input_multiplier" and _is_smoothing(layer, before)):
                yield f"{layer.name}: {name} is {_text(value)}, which only a recipe can do; by hand it is {_text(unset)}"
    else:
        fits = storage_dtype != "float16" or fits_float16(linear.weight)  # type: ignore[arg-type]
        storage = storage_dtype if fits else "float32"
        for name in OF_KEPT:
            if getattr(layer, name) != storage:
                reason = (
                    f"this plan's storage_dtype is {storage_dtype}"
                    if fits
                    else "its weight is beyond float16: keep it in float32"
                )
                yield f"{layer.name}: {name} is {getattr(layer, name)}, but {reason}"


def _disagreements(layers: list[LayerPlan], groups: dict[str, str]) -> Iterator[str]:
    """Yield layers that read one tensor and want it in two ways."""
    first: dict[str, LayerPlan] = {}
    for layer in layers:
        other = first.setdefault(groups[layer.name], layer)
        for name in SHARED:
            mine, theirs = getattr(layer, name), getattr(other, name)
            if mine != theirs:
                yield (
                    f"{other.name} and {layer.name} read one tensor and have to agree, "
                    f"but {name} is {_text(theirs)} there and {_text(mine)} here"
                )


def _settled(layer: LayerPlan, group: str | None, before: LayerPlan | None) -> LayerPlan:
    """Return the entry without what does not belong to it, and with its reason."""
    if layer.quantized:
        layer = layer.model_copy(update={"group": group})
    else:
        left_out = [name for name, unset in _UNSET.items() if getattr(layer, name) != unset]
        if left_out:
            log.info("plan: %s is kept in %s, without %s", layer.name, layer.weights, ", ".join(left_out))
        layer = layer.model_copy(update={**_UNSET, "group": None, "methods": [], "sqnr_db": None})
    if before is None:
        return layer.model_copy(update={"why": FROM_FILE + layer.why.removeprefix(FROM_FILE)})
    changed = [name for name in _decided(layer) if getattr(layer, name) != getattr(before, name)]
    if not changed:
        return layer.model_copy(update={"why": before.why, "methods": before.methods})
    what = ", ".join(f"{name} {_text(getattr(layer, name))} (was {_text(getattr(before, name))})" for name in changed)
    own_words = f": {layer.why}" if layer.why not in ("", before.why) else ""
    methods = [] if set(changed) & set(SHARED) else before.methods  # no method decides outputs
    return layer.model_copy(update={"why": f"{BY_HAND}{what}{own_words}", "methods": methods})
