"""RepQ reparameterisation (RepQ-ViT, arXiv 2212.08254, section 3.2): one scale for all channels that was one for each.

After a LayerNorm channels differ in range and in middle, so the best quantizer has a scale and a zero point for each channel,
which no kernel runs. Written into the numbers before it, that quantizer becomes one with a single scale: each channel is
multiplied by ``s̄ / s_c`` and shifted by its middle; weight and bias take both back. ``s_c`` is half of the channel's range over
all timesteps, ``s̄`` their mean. Nothing is searched; unlike SmoothQuant the weight's own ranges have no say.

RepQ-ViT folds both into the LayerNorm's affine parameters. An AdaLN has none: its scale and shift come from the timestep, and
PixArt and Wan compute them for all blocks at once, so nothing of one block can be folded there. They stay explicit, two
elementwise operations that engines fuse into the ones before them (docs/decisions/0007-smoothing-stays-explicit.md).
"""

from __future__ import annotations

import torch

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels
from qdiff.methods.shift import middles

SMALLEST = 1e-5


@METHODS.register("repq")
def repq(layer_group: LayerGroup, decisions: Decisions, minimum_gain_db: Decibels = 0.1) -> Decisions:
    """Equalise channels, in place of a smoothing and a shift that are there, where it gains at least
    ``minimum_gain_db``.
    """
    low, high = layer_group.statistics.low.amin(dim=0), layer_group.statistics.high.amax(dim=0)
    half = ((high - low) / 2).clamp(min=SMALLEST)
    multiplier = to_half_grid((half.mean() / half).clamp(min=1e-3, max=1e3))
    moved = decisions.decide("repq", "", input_multiplier=multiplier, smoothing=None, shift=None)
    trial = moved.decide("repq", "", shift=middles(layer_group, moved))
    gain = decibels(layer_group.error(trial), layer_group.error(decisions))
    if gain < minimum_gain_db:
        return decisions.decide("repq", f"channels stay as they are (equalising {gain:+.1f} dB)")
    spread = float(half.max() / half.median().clamp(min=torch.finfo(torch.float32).tiny))
    note = f"channels equalised (widest {spread:.1f} times the median) gain {gain:.1f} dB"
    return decisions.decide("repq", note, input_multiplier=multiplier, smoothing=None, shift=trial.shift)
