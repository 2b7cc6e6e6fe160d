"""Activation scales that follow the timestep, in a form that a static engine can run.

The range of an activation changes along the trajectory; one scale for all steps wastes codes where it is small. Per-step
scales are known from simulation (TFMQ-DM, arXiv 2311.16503; EfficientDM's TALSQ, arXiv 2310.03270); deployed engines need a
constant. So the input is multiplied by ``r[t]``, which brings every timestep to the widest one's range, quantized with the
constant scale, and the output divided by ``r[t]``.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels


@METHODS.register("timestep_scales")
def timestep_scales(layer_group: LayerGroup, decisions: Decisions, minimum_gain_db: Decibels = 0.5) -> Decisions:
    """Switch per-timestep scales on where they gain at least ``minimum_gain_db`` (they cost two multiplications)."""
    if not layer_group.static(decisions):
        return decisions.decide("timestep_scales", "no constant scale that could follow the timestep")
    ranges = layer_group.ranges(decisions)
    smallest, widest = float(ranges.min()), float(ranges.max())
    spread = widest / smallest if smallest > 0 else float("inf")
    gain = decibels(layer_group.error(replace(decisions, timestep_scales=True)), layer_group.error(decisions))
    if gain < minimum_gain_db:
        return decisions.decide(
            "timestep_scales", f"one scale for all timesteps (ranges within {spread:.2f}x, {gain:+.1f} dB)"
        )
    return decisions.decide(
        "timestep_scales", f"scales by timestep gain {gain:.1f} dB (ranges within {spread:.2f}x)", timestep_scales=True
    )
