"""Bias shift: move the middle of each asymmetric channel to zero, so that a symmetric quantizer uses all its codes.

What follows a GELU lies between -0.17 and some large number: a symmetric grid spends half its codes on values that never come.
TensorRT takes no zero points, but a shift before the quantizer is plain arithmetic, and what it takes from the output is a
constant of the layer that the bias gives back (the SQ-b of MPTQ-ViT, arXiv 2401.14895; SVDQuant shifts inputs after GELU the
same way).

The middle is that of the least and the largest value which calibration saw, exactly, not of the tokens that it kept. A grid
whose scales follow blocks of the input at run time has no range to be in the middle of; there a channel's *mean* is what all
tokens are nearest to, and 20 % of NVFP4's error on a DiT's activations are its (docs/log). Channels may move each by its own
middle or mean, or all by one middle; whichever brings the outputs nearest to float is taken, or none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels


def _after_multiplier(values: Tensor, decisions: Decisions) -> Tensor:
    """Return ``values [in]`` of the input's channels after the decisions' multiplier, on the float16 grid."""
    if decisions.input_multiplier is not None:
        values = values * decisions.input_multiplier
    return to_half_grid(values)


def means(layer_group: LayerGroup, decisions: Decisions) -> Tensor:
    """Return the mean of every channel over the calibration tokens, after the decisions' multiplier: ``[in]`` on the
    float16 grid.
    """
    return _after_multiplier(layer_group.statistics.rows.float().mean(dim=0), decisions)


def middles(layer_group: LayerGroup, decisions: Decisions) -> Tensor:
    """Return the middle of every channel's range over all timesteps, after the decisions' multiplier: ``[in]`` on the
    float16 grid.
    """
    low, high = layer_group.statistics.low.amin(dim=0), layer_group.statistics.high.amax(dim=0)
    return _after_multiplier((low + high) / 2, decisions)


@METHODS.register("shift")
def shift(layer_group: LayerGroup, decisions: Decisions, minimum_gain_db: Decibels = 0.2) -> Decisions:
    """Shift the input where that gains at least ``minimum_gain_db`` (a subtraction is not free)."""
    plain = layer_group.error(decisions)
    own = middles(layer_group, decisions)
    one = to_half_grid(torch.full_like(own, float((own.min() + own.max()) / 2)))
    found = {"its own middle": own, "one middle": one, "its mean": means(layer_group, decisions)}
    trials = [(name, decisions.decide("shift", "", shift=value)) for name, value in found.items()]
    least, name, best = min(
        ((layer_group.error(trial), name, trial) for name, trial in trials), key=lambda trial: trial[0]
    )
    gain = decibels(least, plain)
    if gain < minimum_gain_db:
        return decisions.decide("shift", f"no shift (best would gain {gain:.1f} dB)")
    return decisions.decide("shift", f"channels shifted by {name} gain {gain:.1f} dB", shift=best.shift)
