"""Which shortcuts are split: those whose layer comes out nearer to float as two layers than as one.

A split gives each half scales of its own (:mod:`qdiff.nn.surgery`). That gains where the halves' ranges differ, and it can lose:
each half is rounded apart, so where the halves nearly cancel, two roundings are worse than one. It is measured as layers are, on
held-out calibration tokens, with the recipe's smoothing and before its other methods: those would take as long for every layer
as quantizing it, and ranges are what a split is for.
"""

from __future__ import annotations

import torch
from torch import nn

from qdiff.errors import InputError
from qdiff.events import log
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup, apply_method
from qdiff.models.model import Model
from qdiff.plan.recipe import Recipe, Scheme
from qdiff.recipes import members_of
from qdiff.recording.activation_statistics import InputStatistics, Statistics


def gaining_splits(model: Model, recipe: Recipe, statistics: Statistics, split: dict[str, int]) -> dict[str, int]:
    """Return those of ``split`` (layer to the channel at which its second part begins) that gain over no split.

    Args:
        model: the float model, not yet changed.
        recipe: whose formats of convolutions and smoothing are taken; of a mixed one those of its first member with formats.
        statistics: of that model.
        split: by layer, the channel at which its second part begins.
    """
    own = recipe if recipe.scheme is not None else _first_member(recipe)
    if own is None or "Conv2d" not in own.targets:
        return split
    gaining = {}
    for name, at in split.items():
        layer = model.backbone.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        inputs = statistics.inputs[name].to(model.device)
        try:
            whole, halves = _errors(own, own.scheme_of("Conv2d"), layer, inputs, at)
        except InputError:  # formats that the layer cannot have: what checks them says so, with the layer's name
            return split
        if halves < whole:
            gaining[name] = at
        else:
            log.info("quantize: %s stays one layer, as two it would be farther from float", name)
    return gaining


def _first_member(recipe: Recipe) -> Recipe | None:
    return next((member for member in members_of(recipe) if member is not None), None) if recipe.mixed else None


def _errors(recipe: Recipe, scheme: Scheme, layer: nn.Conv2d, inputs: InputStatistics, at: int) -> tuple[float, float]:
    """Return the mean square errors of the layer's output as one layer and as two."""
    weight = layer.weight.detach().float()

    def output(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what quantized channels give, and what float ones do ``[N, out]``."""
        layer_group = LayerGroup(
            ["layer"],
            [weight[:, part].flatten(1)],
            inputs.channels(part, ["layer"]).columns(),
            format_named(scheme.weights),
            format_named(scheme.activations),
            scheme.per_token,
            "Conv2d",
            inputs.taps,
        )
        decisions = Decisions()
        if "smooth" in recipe.methods:
            decisions = apply_method("smooth", recipe.methods["smooth"] or {}, layer_group, decisions)
        rows = layer_group.rows(held_out=True)
        return layer_group.outputs(decisions, rows)[0], rows.x @ layer_group.weights[0].T

    whole, target = output(slice(None))
    first, second = (output(part)[0] for part in (slice(None, at), slice(at, None)))
    return tuple(float((got - target).double().square().mean()) for got in (whole, first + second))  # type: ignore[return-value]
