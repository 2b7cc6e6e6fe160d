"""Bias correction: rounding moves the mean of an output, and the bias can take that back for nothing.

With W rounded to Q(W) and x to Q(x) the output is wrong by ``E[x Wᵀ - Q(x) Q(W)ᵀ]`` on average; that constant is added to the
bias (arXiv 1906.04721, section 4.2; there from the statistics of a BatchNorm, here from the recorded tokens of all timesteps). A
mean is what a sampler adds up over its steps, while errors of either sign cancel. It belongs last in a recipe: it is of the codes
as they are.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.errors import InputError
from qdiff.methods.base import METHODS, Decibels, Problem, Solution, decibels


@METHODS.register("bias")
def bias(problem: Problem, solution: Solution, minimum_gain_db: Decibels = 0.0) -> Solution:
    """Corrects every layer's bias of the group if that gains more than ``minimum_gain_db``."""
    rows = problem.rows(held_out=False)
    if not len(rows.x):
        raise InputError(
            f"bias: layer {problem.names[0]} has no tokens to fit on", "calibrate with more prompts or steps"
        )
    uncorrected = replace(solution, correction=None)
    targets = [rows.x @ weight.T for weight in problem.weights]
    found = tuple(
        (target - output).mean(dim=0)
        for target, output in zip(targets, problem.outputs(uncorrected, rows), strict=True)
    )
    gain = decibels(problem.error(replace(solution, correction=found)), problem.error(solution))
    if gain <= minimum_gain_db:
        return solution.decide("bias", f"bias as it is (correction {gain:+.1f} dB)")
    return solution.decide("bias", f"bias correction gains {gain:.1f} dB", correction=found)
