"""SmoothQuant (arXiv 2211.10438): move the difficulty of outlier channels from activations into weights.

For each input channel c a factor ``s_c = amax_x[c]^a / amax_w[c]^(1-a)`` divides the activation and multiplies the weight
(eq. 4); the product is the same. The published ``a`` is one for a model; here each group of layers takes the one whose
outputs are nearest to float on the calibration tokens, *no smoothing* among the candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, Shares, decibels

_SMALLEST = 1e-5


def multiplier_for(layer_group: LayerGroup, strength: float) -> Tensor:
    """Return ``1 / s [in]``. Normalised to a geometric mean of 1, which changes no code and keeps the numbers near
    where they were.
    """
    activation = layer_group.statistics.amax.amax(dim=0).clamp(min=_SMALLEST)
    columns = torch.stack([w.abs().amax(dim=0) for w in layer_group.weights]).amax(dim=0)
    weight = layer_group.by_channel(columns).clamp(min=_SMALLEST)
    s = activation.pow(strength) / weight.pow(1 - strength)
    s = s / s.log().mean().exp()
    return to_half_grid((1 / s).clamp(min=1e-3, max=1e3))


@METHODS.register("smooth")
def smooth(
    layer_group: LayerGroup, decisions: Decisions, strengths: Shares = (0.3, 0.5, 0.7), minimum_gain_db: Decibels = 0.1
) -> Decisions:
    """Try every strength; keep the best if it gains at least ``minimum_gain_db`` over none (a multiplication is not
    free).
    """
    plain = layer_group.error(decisions)
    candidates = [
        (layer_group.error(candidate), candidate)
        for strength in strengths
        for candidate in [
            decisions.decide("smooth", "", smoothing=strength, input_multiplier=multiplier_for(layer_group, strength))
        ]
    ]
    error, best = min(candidates, key=lambda pair: pair[0], default=(plain, decisions))
    gain = decibels(error, plain)
    if gain < minimum_gain_db:
        return decisions.decide("smooth", f"no smoothing (best would gain {gain:.1f} dB)")
    return decisions.decide(
        "smooth",
        f"smoothing {best.smoothing} gains {gain:.1f} dB",
        smoothing=best.smoothing,
        input_multiplier=best.input_multiplier,
    )
