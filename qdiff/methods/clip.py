"""Range search: cut the largest values when the finer grid gains more than the cut loses.

A grid over shares of the observed range, judged on the layers' outputs (Q-Diffusion scans shrink factors the same way,
arXiv 2302.04304). Outliers that the calibration tokens do not hold are not seen, so the grid stays above one half.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, Shares, decibels


@METHODS.register("clip")
def clip(
    layer_group: LayerGroup,
    decisions: Decisions,
    ratios: Shares = (1.0, 0.9, 0.8, 0.7),
    minimum_gain_db: Decibels = 0.1,
) -> Decisions:
    """Keep the share of the range with the smallest output error."""
    plain = layer_group.error(decisions)
    error, ratio = min((layer_group.error(replace(decisions, clip=ratio)), -ratio) for ratio in ratios)
    gain = decibels(error, plain)
    if gain < minimum_gain_db:
        return decisions.decide("clip", "full range")
    return decisions.decide("clip", f"range cut to {-ratio:g} gains {gain:.1f} dB", clip=-ratio)
