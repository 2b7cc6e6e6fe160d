"""Range search: cut the largest values when the finer grid gains more than the cut loses.

A grid over shares of the observed range, judged on the layers' outputs (Q-Diffusion scans shrink factors the same way,
arXiv 2302.04304). Outliers that the calibration tokens do not hold are not seen, so the grid stays above one half.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.methods.base import METHODS, Decibels, Problem, Shares, Solution, decibels


@METHODS.register("clip")
def clip(
    problem: Problem, solution: Solution, ratios: Shares = (1.0, 0.9, 0.8, 0.7), minimum_gain_db: Decibels = 0.1
) -> Solution:
    """Keeps the share of the range with the smallest output error."""
    plain = problem.error(solution)
    error, ratio = min((problem.error(replace(solution, clip=ratio)), -ratio) for ratio in ratios)
    gain = decibels(error, plain)
    if gain < minimum_gain_db:
        return solution.decide("clip", "full range")
    return solution.decide("clip", f"range cut to {-ratio:g} gains {gain:.1f} dB", clip=-ratio)
