"""AWQ (arXiv 2306.00978): channels that carry large activations get the finer part of the weight's grid.

For each input channel c the weight is multiplied by ``s_c = mean|x_c|^a`` and the activation divided by it (section 3.2). Where
SmoothQuant asks what is *large* in the activation and in the weight, AWQ asks what is large *on average* in the activation alone,
so it is for weights of few bits under activations that keep more. The strength ``a`` is searched on a grid from 0 to 1 by the
layers' own output error; s is normalised to sqrt(max s · min s) = 1, as published.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels

Points = Annotated[int, Field(ge=2, le=200)]
SMALLEST = 1e-4


def multiplier_for(layer_group: LayerGroup, strength: float) -> Tensor:
    """Return ``1 / s [in]`` on the float16 grid, from the fitting tokens."""
    x = layer_group.rows(held_out=False).x
    s = x.abs().mean(dim=0).clamp(min=SMALLEST).pow(strength)
    s = s / (s.max() * s.min()).sqrt()
    return to_half_grid((1 / s).clamp(min=1e-3, max=1e3))


@METHODS.register("awq")
def awq(
    layer_group: LayerGroup, decisions: Decisions, points: Points = 20, minimum_gain_db: Decibels = 0.1
) -> Decisions:
    """Take the best strength of a grid of ``points``, in place of a smoothing that is there, if it gains enough."""
    plain = layer_group.error(decisions)
    best, least, chosen = decisions, plain, 0.0
    for strength in torch.linspace(0, 1, points + 1).tolist()[1:]:
        trial = decisions.decide("awq", "", input_multiplier=multiplier_for(layer_group, strength), smoothing=None)
        error = layer_group.error(trial)
        if error < least:
            best, least, chosen = trial, error, strength
    gain = decibels(least, plain)
    if best is decisions or gain < minimum_gain_db:
        return decisions.decide("awq", f"no activation-aware scaling (best would gain {gain:.1f} dB)")
    return decisions.decide(
        "awq",
        f"activation-aware scaling {chosen:g} gains {gain:.1f} dB",
        smoothing=None,
        input_multiplier=best.input_multiplier,
    )
