"""Profiles for the graph of a plan: the axes are the family's, the usual sizes are those of the calibration.

:mod:`.profiles` turns words into sizes by axis. Here the shapes of all inputs of one exported graph follow, with those of the
lists of sparse attention and of cached deltas, which no user writes. What an engine can and cannot take in is asked of the
engine itself (:meth:`qdiff.engines.base.Engine.profile_for`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qdiff.engines.base import Profile, Shape
from qdiff.engines.profiles import make_profile, parse_profile
from qdiff.errors import UsageError, option

if TYPE_CHECKING:
    from qdiff.plan.attention_plan import AttentionPlan
    from qdiff.plan.plan import Plan

DEFAULT_BATCH = "batch=1-2-8"
LONGEST_PROMPT = 512


@dataclasses.dataclass(frozen=True)
class CalibratedSizes:
    """Sizes of the tensors in calibration.

    Args:
        shapes: of each input of the backbone, by its name.
        pixels_per_cell: pixels along one side of a latent cell.
    """

    shapes: Mapping[str, Sequence[int]]
    pixels_per_cell: int


def plan_profile(
    plan: Plan, text: str, sizes: CalibratedSizes, batch: str = DEFAULT_BATCH, one_size: bool = False
) -> Profile:
    """Return a profile for the words ``text``; what they do not say is as in calibration.

    Args:
        plan: of the quantized model.
        text: the words of ``--profile``.
        sizes: of the calibration.
        batch: the words for it where ``text`` has none.
        one_size: whether prompts and lists, too, have one size where ``text`` does not say otherwise.

    Raises:
        UsageError: words that are not understood, or a size that the graph is not for.
    """
    from qdiff.models import FAMILIES
    from qdiff.recording.inputs import latent_of

    family = FAMILIES[plan.family]
    specs = family.inputs(plan.config)
    axes = {spec.name: spec.axes for spec in specs}
    ranges = {
        axis: (size, size, size)
        for name, of_input in axes.items()
        for axis, size in zip(of_input, sizes.shapes[name], strict=True)
        if isinstance(axis, str)
    }
    if "tokens" in ranges and not one_size:
        tokens = ranges["tokens"][0]
        ranges["tokens"] = (2, tokens, max(tokens, LONGEST_PROMPT))
    ranges |= parse_profile(batch)
    recorded = dict(ranges)
    if text:
        ranges |= parse_profile(text, scale=sizes.pixels_per_cell)
    one_graph = family.one_size or plan.attention is not None
    if one_graph and any(ranges.get(axis) != recorded.get(axis) for axis in ("frames", "height", "width")):
        what = "the lists of sparse attention are" if plan.attention else f"a graph of {family.title} is"
        raise UsageError(
            f"profile {text!r}: {what} for the size that was calibrated",
            f"leave the size out of the profile, or calibrate with {option('height')}, {option('width')} or {option('frames')}",
        )
    profile = make_profile(text or "default", axes, ranges)
    if plan.attention is not None:
        profile = with_lists(plan.attention, profile, one_size)
    if plan.routing is not None and plan.routing.reuse is not None:
        profile = with_deltas(plan, profile, latent_of(specs).name)
    return profile


def with_lists(attention: AttentionPlan, profile: Profile, one_size: bool = False) -> Profile:
    """Return a profile of a graph that takes lists (:mod:`qdiff.export.list_inputs`): for one size of pictures, and any
    lists, or with ``one_size`` lists as wide as the widest.
    """
    from qdiff.plan.attention_plan import BLOCKS, BOUNDS

    heads, columns = attention.heads, -(-math.prod(attention.grid) // attention.block_k)
    rows = -(-math.prod(attention.grid) // attention.block_q)
    usual = max(heads, round(heads * columns * attention.density))
    every = (heads * columns,) * 3 if one_size else (heads, usual, heads * columns)
    lists, bounds = _triple((rows, total) for total in every), (heads + 1,)
    ends = _triple(tuple(round(total * head / heads) for head in range(heads + 1)) for total in every)
    ranges = {**profile.ranges, BLOCKS: lists, BOUNDS: (bounds, bounds, bounds)}
    return dataclasses.replace(profile, ranges=ranges, values={BOUNDS: ends})


def with_deltas(plan: Plan, profile: Profile, latent: str) -> Profile:
    """Return a profile of a graph that takes cached deltas (:mod:`qdiff.export.routes`), as large as the latent
    ``latent`` makes them.
    """
    from qdiff.models import FAMILIES
    from qdiff.models.config import integer
    from qdiff.plan.routing_plan import DELTAS

    assert plan.routing is not None
    grid, width = (
        FAMILIES[plan.family].grid,
        integer(plan.config, "num_attention_heads") * integer(plan.config, "attention_head_dim"),
    )
    count = len(plan.routing.blocks)
    ranges = _triple((count, shape[0], math.prod(grid(plan.config, shape)), width) for shape in profile.ranges[latent])
    return dataclasses.replace(profile, ranges={**profile.ranges, DELTAS: ranges})


def _triple(shapes: Iterable[Shape]) -> tuple[Shape, Shape, Shape]:
    low, usual, high = shapes
    return low, usual, high
