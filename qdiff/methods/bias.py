"""Bias correction: rounding moves the mean of an output, and the bias can take that back for nothing.

With W rounded to Q(W) and x to Q(x) the output is wrong by ``E[x Wᵀ - Q(x) Q(W)ᵀ]`` on average; that constant is added to the
bias (arXiv 1906.04721, section 4.2; there from the statistics of a BatchNorm, here from the recorded tokens of all timesteps). A
mean is what a sampler adds up over its steps, while errors of either sign cancel. It belongs last in a recipe: it is of the codes
as they are.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.errors import InputError
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels


@METHODS.register("bias")
def bias(layer_group: LayerGroup, decisions: Decisions, minimum_gain_db: Decibels = 0.0) -> Decisions:
    """Correct every layer's bias of the group if that gains more than ``minimum_gain_db``."""
    rows = layer_group.rows(held_out=False)
    if not len(rows.x):
        raise InputError(
            f"bias: layer {layer_group.names[0]} has no tokens to fit on", "calibrate with more prompts or steps"
        )
    uncorrected = replace(decisions, bias_correction=None)
    targets = [rows.x @ weight.T for weight in layer_group.weights]
    found = tuple(
        (target - output).mean(dim=0)
        for target, output in zip(targets, layer_group.outputs(uncorrected, rows), strict=True)
    )
    gain = decibels(layer_group.error(replace(decisions, bias_correction=found)), layer_group.error(decisions))
    if gain <= minimum_gain_db:
        return decisions.decide("bias", f"bias as it is (correction {gain:+.1f} dB)")
    return decisions.decide("bias", f"bias correction gains {gain:.1f} dB", bias_correction=found)
