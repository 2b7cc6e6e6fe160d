"""Scales of weights: which value of a block gets the largest code (:mod:`qdiff.formats.weight` has the rules).

A rule that brings the weights nearer to float can still move the outputs away, because inputs do not weigh all columns alike.
So the rules are candidates, and the one with the smallest output error is kept, ``amax`` among them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from qdiff.formats.weight import Rule, has_rule
from qdiff.methods.base import METHODS, Decibels, Problem, Solution, decibels

Rules = Annotated[tuple[Rule, ...], Field(min_length=1)]


@METHODS.register("scales")
def scales(problem: Problem, solution: Solution, rules: Rules = ("mse",), minimum_gain_db: Decibels = 0.0) -> Solution:
    """Takes the rule whose outputs come nearest to float."""
    plain = problem.error(solution)
    if problem.convolution:  # a recipe's rules may be meant for the formats of its linear layers
        format = solution.weight_format or problem.weight_format
        rules = tuple(rule for rule in rules if has_rule(rule, format)) or ("amax",)
    trials = [replace(solution, rule=rule, rounded=None, rounding="nearest") for rule in rules]
    error, best = min(((problem.error(trial), trial) for trial in trials), key=lambda pair: pair[0])
    gain = decibels(error, plain)
    if gain <= minimum_gain_db:
        return solution.decide("scales", f"weight scales from {solution.rule} (others {gain:+.1f} dB)")
    return solution.decide("scales", f"weight scales by {best.rule} gain {gain:.1f} dB", rule=best.rule)
