"""Centering: quantize tokens without the mean of their picture, and the mean apart.

What the tokens of one picture have in common is much of a DiT's activation: channels have means after AdaLN and after a GELU, and
those differ from picture to picture and from step to step. Where scales follow blocks at run time the common part sets them, and
what tells tokens apart gets what is left of four bits. Without it scales fit the rest, and the mean, which is one token, is
quantized twice: itself, and what the first time lost of it (:func:`qdiff.nn.quant_linear.centered`). All of it stays in one
product of the same format with two rows more; nothing is kept in 16 bit and no weight is stored twice.

Taking means off before FP4 is Averis (arXiv 2603.10444, which measures 2.2 % of a training step for it); there the mean's product
is computed apart, and gradients are split as well. The constant part of a mean can be had for nothing
(:mod:`qdiff.methods.shift`), so a shift is worth little behind this.

A picture's mean needs its tokens, so it is known where a recipe is sequential, and where no padding is among them.
"""

from __future__ import annotations

from qdiff.methods.base import METHODS, Decibels, Problem, Solution, decibels


@METHODS.register("center")
def center(problem: Problem, solution: Solution, minimum_gain_db: Decibels = 0.3) -> Solution:
    """Centers the tokens where that gains at least ``minimum_gain_db`` (a mean and two rows are not free)."""
    if not problem.activation_format.block:
        return solution.decide("center", "not centered: scales do not follow blocks")
    if problem.statistics.means is None:
        return solution.decide("center", "not centered: no mean of its own tokens is known")
    trial = solution.decide("center", "", centered=True)
    gain = decibels(problem.error(trial), problem.error(solution))
    if gain < minimum_gain_db:
        return solution.decide("center", f"not centered ({gain:+.1f} dB)")
    return solution.decide("center", f"tokens without their mean gain {gain:.1f} dB", centered=True)
