"""The element format of the weights, chosen for each group of layers (FP4DiT, arXiv 2503.15465, section 4.1).

At equal bits grids differ in where they are fine: E3M0 near zero, E1M2 and integers everywhere alike, E2M1 between. FP4DiT gives
up-projections E3M0, since GELU is sensitive near zero, and everything else E2M1 or E1M2; here the layers' outputs decide. The
candidates are the rows of :data:`qdiff.formats.table.FORMATS` with the bits, block and scales of the recipe's weights: for
``fp4_e2m1_g128`` its E1M2 and E3M0 sisters and INT4, for ``int8`` FP8, for ``nvfp4`` NVINT4. What a target does not run is
refused at export, so name the ``candidates`` that it does.
"""

from __future__ import annotations

from dataclasses import replace

from qdiff.errors import InputError
from qdiff.formats.table import FORMATS, Format, format_named
from qdiff.formats.weight import stretches
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels


def sisters(format: Format) -> list[str]:
    """Return names of the other formats of the same size: bits, block and scales."""

    def size(row: Format) -> tuple[object, ...]:
        return row.bits, row.block, row.scale, row.tensor_scale

    return [name for name, row in FORMATS.items() if size(row) == size(format) and name != format.name]


@METHODS.register("element")
def element(
    layer_group: LayerGroup,
    decisions: Decisions,
    candidates: tuple[str, ...] | None = None,
    minimum_gain_db: Decibels = 0.1,
) -> Decisions:
    """Take the candidate whose outputs come nearest to float, if it gains at least ``minimum_gain_db`` over the
    recipe's format.

    Raises:
        InputError: a candidate that does not exist, or of another size than the recipe's weights.
    """
    asked = layer_group.weight_format
    possible = sisters(asked)
    names = possible if candidates is None else [name for name in candidates if name != asked.name]
    for name in names:
        if name not in possible:
            format_named(name)
            raise InputError(
                f"element: {name} has other bits, blocks or scales than {asked.name}",
                f"candidates of {asked.name}: {', '.join(possible) or 'none'}",
            )
    trials = []
    for name in names:
        row = format_named(name)
        fits = decisions.scale_rule != "four_over_six" or len(_rule(decisions, row)) > 1
        trial = replace(
            decisions,
            weight_format=row,
            rounded=None,
            rounding="nearest",
            scale_rule=decisions.scale_rule if fits else "amax",
        )
        trials.append((layer_group.error(trial), name, trial))
    if not trials:
        return decisions.decide("element", f"{asked.name} has no sister of its size")
    least, name, best = min(trials, key=lambda trial: trial[0])
    gain = decibels(least, layer_group.error(decisions))
    if gain < minimum_gain_db:
        return decisions.decide("element", f"{asked.name} ({name} {gain:+.1f} dB)")
    note = f"{name} instead of {asked.name} gains {gain:.1f} dB"
    return decisions.decide("element", note, weight_format=best.weight_format, scale_rule=best.scale_rule)


def _rule(decisions: Decisions, row: Format) -> list[float]:
    """Return candidates of the decisions' rule in another format; one where the rule is not for it."""
    try:
        return stretches(decisions.scale_rule, row)
    except InputError:
        return [1.0]
