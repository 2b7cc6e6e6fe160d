"""Bias shift: move the middle of each asymmetric channel to zero, so that a symmetric quantizer uses all its codes.

What follows a GELU lies between -0.17 and some large number: a symmetric grid spends half its codes on values that never come.
TensorRT takes no zero points, but a shift before the quantizer is plain arithmetic, and what it takes from the output is a
constant of the layer that the bias gives back (the SQ-b of MPTQ-ViT, arXiv 2401.14895; SVDQuant shifts inputs after GELU the
same way).

The middle is that of the least and the largest value which calibration saw, exactly, not of the tokens that it kept. A grid
whose scales follow blocks of the input at run time has no range to be in the middle of; there a channel's *mean* is what all
tokens are nearest to, and 20 % of NVFP4's error on a DiT's activations are its (docs/log.md). Channels may move each by its own
middle or mean, or all by one middle; whichever brings the outputs nearest to float is taken, or none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, Problem, Solution, decibels


def _after_multiplier(values: Tensor, solution: Solution) -> Tensor:
    """``values [in]`` of the input's channels after the solution's multiplier, on the float16 grid."""
    if solution.multiplier is not None:
        values = values * solution.multiplier
    return to_half_grid(values)


def means(problem: Problem, solution: Solution) -> Tensor:
    """Mean of every channel over the calibration tokens, after the solution's multiplier: ``[in]`` on the float16 grid."""
    return _after_multiplier(problem.statistics.rows.float().mean(dim=0), solution)


def middles(problem: Problem, solution: Solution) -> Tensor:
    """Middle of every channel's range over all timesteps, after the solution's multiplier: ``[in]`` on the float16 grid."""
    low, high = problem.statistics.low.amin(dim=0), problem.statistics.high.amax(dim=0)
    return _after_multiplier((low + high) / 2, solution)


@METHODS.register("shift")
def shift(problem: Problem, solution: Solution, minimum_gain_db: Decibels = 0.2) -> Solution:
    """Shifts the input where that gains at least ``minimum_gain_db`` (a subtraction is not free)."""
    plain = problem.error(solution)
    own = middles(problem, solution)
    one = to_half_grid(torch.full_like(own, float((own.min() + own.max()) / 2)))
    found = {"its own middle": own, "one middle": one, "its mean": means(problem, solution)}
    trials = [(name, solution.decide("shift", "", shift=value)) for name, value in found.items()]
    least, name, best = min(((problem.error(trial), name, trial) for name, trial in trials), key=lambda trial: trial[0])
    gain = decibels(least, plain)
    if gain < minimum_gain_db:
        return solution.decide("shift", f"no shift (best would gain {gain:.1f} dB)")
    return solution.decide("shift", f"channels shifted by {name} gain {gain:.1f} dB", shift=best.shift)
