"""DGQ's separation of outliers (arXiv 2501.04304): ask on which axis of an activation they lie, and divide that axis.

Outliers that fill whole channels want scales by channel, outliers that are single pixels (here: tokens) want scales per token,
and scales on the wrong axis help neither. With the least and the largest value of every index a of an axis d, DGQ compares

    D_d = (max_a high_a - min_a high_a) + (max_a low_a - min_a low_a)

and divides the axis with the larger D, by K-means on the pairs (low, high); each group of indices gets a scale. What of that
can be deployed, with symmetric scales (TensorRT takes no zero points; :mod:`qdiff.methods.shift` is for those):

- *Channels.* A static engine takes one scale, so a group's own is written into the numbers before it: a multiplier that is
  constant in each group, whose inverse the weight carries; exact without rounding. DGQ makes a product for each group instead and
  leaves the weight as it is. Here the weight pays, so besides the groups' whole ranges (strength 1) their square roots are tried.
- *Tokens.* Which tokens are outliers changes with the picture, and how many there are with the resolution, so no group of
  tokens can be a constant. The finest groups can be had at run time: a scale for each token. ONNX Runtime and OpenVINO run those,
  TensorRT does not, so they are tried where ``tokens`` allows it. A convolution reads windows and has no tokens.

D is of the transformed tokens of all timesteps together, because one constant scale has to serve them all; the paper has scales
for each step (:mod:`qdiff.methods.timestep_scales`). It only settles what the layers' outputs leave open: the axis that brings
them nearer to float is taken, the one with the larger D where both do within the minimum gain.

A multiplier that is there is not replaced: groups are of what it leaves, and are multiplied into it, so after ``smooth`` this
method divides what smoothing could not level. A rotation spreads every channel over its block and leaves no groups to divide.
Scales per token end those by timestep and a cut range, which are of constant scales.

Not built: DGQ's cross attention, whose scores are kept as powers of two at a scale by prompt, the <start> column in float. No
target here runs that softmax; attention probabilities stay in 16 bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qdiff.formats.scales import to_half_grid
from qdiff.methods.base import METHODS, Decibels, DecisionChanges, Decisions, LayerGroup, Shares, decibels

Axis = Literal["channel", "token"]
Groups = Annotated[int, Field(ge=1, le=4096)]
SMALLEST = 1e-5
ITERATIONS = 100  # of K-means at most; it ends when no index changes its group


@dataclass(frozen=True)
class Division:
    """One way to divide an axis: its ``changes`` of the decisions, and what they gain in the layers' outputs, dB."""

    axis: Axis
    name: str
    changes: DecisionChanges
    gain: float = 0.0


def spread(low: Tensor, high: Tensor) -> float:
    """Return the spread D of an axis whose indices have these least and largest values ``[n]``."""
    return float((high.max() - high.min()) + (low.max() - low.min()))


def spreads(layer_group: LayerGroup, decisions: Decisions) -> dict[Axis, float]:
    """Return the spread D of both axes, on the fitting tokens as the transform leaves them."""
    x = decisions.inputs(layer_group.rows(held_out=False).x)
    channels = spread(-layer_group.by_channel(-x.amin(dim=0)), layer_group.by_channel(x.amax(dim=0)))
    return {"channel": channels, "token": spread(x.amin(dim=1), x.amax(dim=1))}


def k_means(points: Tensor, groups: int) -> Tensor:
    """Return the group of each of ``points [n, d]``: numbers ``[n]`` below ``groups``, or below the count of different
    points.

    Nothing is drawn: the first centre is the mean's nearest point, each next one the point that is farthest from all before, so
    an outlier begins as a centre.
    """
    points = points.double()
    centres = points[_distances(points, points.mean(dim=0, keepdim=True)).argmin()][None]
    while len(centres) < groups:
        nearest = _distances(points, centres).amin(dim=1)
        if nearest.max() == 0:
            break
        centres = torch.cat([centres, points[nearest.argmax()][None]])
    labels = _distances(points, centres).argmin(dim=1)
    for _ in range(ITERATIONS):
        counts = labels.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts > 0, sums / counts, centres)
        before, labels = labels, _distances(points, centres).argmin(dim=1)
        if torch.equal(before, labels):
            break
    return labels


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def group_ranges(layer_group: LayerGroup, decisions: Decisions, groups: int) -> Tensor:
    """Return, for each column, the largest magnitude over all timesteps of its group of channels: ``[in]``."""
    low = decisions.inputs(layer_group.statistics.low).amin(dim=0)
    high = decisions.inputs(layer_group.statistics.high).amax(dim=0)
    labels = k_means(torch.stack([low, high], dim=1), groups)
    widest = low.new_zeros(groups).scatter_reduce(0, labels, torch.maximum(-low, high), "amax")
    return widest[labels].clamp(min=SMALLEST)


def levelled(decisions: Decisions, ranges: Tensor, strength: float) -> DecisionChanges:
    """Return the changes that bring groups of these ranges ``[in]`` to one (strength 1), or part of the way.

    Normalised to a geometric mean of 1, as smoothing is. A shift that is there is of the multiplied input, and moves along.
    """
    factors = ranges.pow(-strength)
    factors = factors / factors.log().mean().exp()
    before = torch.ones_like(factors) if decisions.input_multiplier is None else decisions.input_multiplier
    multiplier = to_half_grid((before * factors).clamp(min=1e-3, max=1e3))
    changes: DecisionChanges = {"smoothing": None, "input_multiplier": multiplier}
    if decisions.shift is not None:
        changes["shift"] = to_half_grid(decisions.shift * multiplier / before)
    return changes


def channel_divisions(
    layer_group: LayerGroup, decisions: Decisions, groups: int, strengths: tuple[float, ...]
) -> list[Division]:
    """Return groups of channels, where there is a scale of more than a block, and channels are still apart."""
    format = layer_group.activation_format
    if not format.quantized or format.block or decisions.rotation is not None:
        return []
    ranges = group_ranges(layer_group, decisions, groups)
    return [
        Division(
            "channel",
            f"{groups} groups of channels at strength {strength:g}",
            levelled(decisions, ranges, strength),
        )
        for strength in strengths
    ]


def token_divisions(layer_group: LayerGroup, decisions: Decisions) -> list[Division]:
    """Return a scale for each token, in place of one constant."""
    if layer_group.convolution or not layer_group.static(decisions):
        return []
    return [Division("token", "scales per token", {"per_token": True, "clip": 1.0, "timestep_scales": False})]


def choose_division(judged: list[Division], wider: Axis, minimum_gain_db: float) -> Division:
    """Return the division that gains most, or one of the axis with the larger D where that gains enough and not clearly
    less.
    """
    best = max(judged, key=lambda division: division.gain)
    enough = max(best.gain - minimum_gain_db, minimum_gain_db)
    close = [division for division in judged if division.axis == wider and division.gain >= enough]
    return max(close, key=lambda division: division.gain, default=best)


@METHODS.register("dgq")
def dgq(
    layer_group: LayerGroup,
    decisions: Decisions,
    groups: Groups = 8,
    strengths: Shares = (0.5, 1.0),
    tokens: bool = False,
    minimum_gain_db: Decibels = 0.1,
) -> Decisions:
    """Divide the axis that gains most, at least ``minimum_gain_db``; ``tokens`` allows scales that TensorRT cannot
    run.
    """
    divisions = channel_divisions(layer_group, decisions, groups, strengths)
    if tokens:
        divisions += token_divisions(layer_group, decisions)
    if not divisions:
        return decisions.decide("dgq", "its input has no scale that could be divided")
    plain = layer_group.error(decisions)
    judged = [
        replace(division, gain=decibels(layer_group.error(decisions.decide("dgq", "", **division.changes)), plain))
        for division in divisions
    ]
    widths = spreads(layer_group, decisions)
    best = choose_division(judged, max(widths, key=lambda axis: widths[axis]), minimum_gain_db)
    found = f"D {widths['channel']:.3g} by channel, {widths['token']:.3g} per token"
    if best.gain < minimum_gain_db:
        return decisions.decide("dgq", f"scales not divided ({found}; best would gain {best.gain:+.1f} dB)")
    return decisions.decide("dgq", f"{best.name} gain {best.gain:.1f} dB ({found})", **best.changes)
