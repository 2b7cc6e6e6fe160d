"""Scales of weights: which value of a block gets the largest code (:mod:`qdiff.formats.weight` has the rules).

A rule that brings the weights nearer to float can still move the outputs away, because inputs do not weigh all columns alike.
So the rules are candidates, and the one with the smallest output error is kept, ``amax`` among them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from qdiff.formats.weight import Rule, has_rule
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels

Rules = Annotated[tuple[Rule, ...], Field(min_length=1)]


@METHODS.register("scales")
def scales(
    layer_group: LayerGroup, decisions: Decisions, rules: Rules = ("mse",), minimum_gain_db: Decibels = 0.0
) -> Decisions:
    """Take the rule whose outputs come nearest to float."""
    plain = layer_group.error(decisions)
    if layer_group.convolution:  # a recipe's rules may be meant for the formats of its linear layers
        format = decisions.weight_format or layer_group.weight_format
        rules = tuple(rule for rule in rules if has_rule(rule, format)) or ("amax",)
    trials = [replace(decisions, scale_rule=rule, rounded=None, rounding="nearest") for rule in rules]
    error, best = min(((layer_group.error(trial), trial) for trial in trials), key=lambda pair: pair[0])
    gain = decibels(error, plain)
    if gain <= minimum_gain_db:
        return decisions.decide("scales", f"weight scales from {decisions.scale_rule} (others {gain:+.1f} dB)")
    return decisions.decide(
        "scales", f"weight scales by {best.scale_rule} gain {gain:.1f} dB", scale_rule=best.scale_rule
    )
