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

from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels


@METHODS.register("center")
def center(layer_group: LayerGroup, decisions: Decisions, minimum_gain_db: Decibels = 0.3) -> Decisions:
    """Center the tokens where that gains at least ``minimum_gain_db`` (a mean and two rows are not free)."""
    if not layer_group.activation_format.block:
        return decisions.decide("center", "not centered: scales do not follow blocks")
    if layer_group.statistics.means is None:
        return decisions.decide("center", "not centered: no mean of its own tokens is known")
    trial = decisions.decide("center", "", centered=True)
    gain = decibels(layer_group.error(trial), layer_group.error(decisions))
    if gain < minimum_gain_db:
        return decisions.decide("center", f"not centered ({gain:+.1f} dB)")
    return decisions.decide("center", f"tokens without their mean gain {gain:.1f} dB", centered=True)
