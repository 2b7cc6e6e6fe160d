"""Number formats of an attention, by name.

- ``float``: the dtype of the inputs, everywhere.
- ``bf16``: queries, keys, values and probabilities in bfloat16.
- ``int8_fp8``: the scores from INT8 codes, the output from FP8 (E4M3) codes. More accurate than ``fp8`` at the same rate: INT8
  has more mantissa, and sums exactly.
- ``fp8``: both from FP8 codes.

Scales are chosen at run time: of queries and keys one for each block, of values one for each channel (SageAttention2,
arXiv 2411.10958). Two means are taken out first, which attention does not notice: that of the keys (softmax ignores what is
added to a whole row of scores), and that of the values (probabilities sum to 1, so it is added to the output).

Probabilities are codes too: ``exp(s - m)`` times :data:`PROBABILITY_SCALE`. A power of two costs nothing (it is added to the
exponent), and 256 leaves no room unused but the last 448 / 256. Their sum, the softmax's denominator, is taken before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.errors import InputError, option, unknown_name

PROBABILITY_SCALE = 256.0


@dataclass(frozen=True)
class Numerics:
    """Formats (:mod:`qdiff.formats.table`) of the two products; ``None``: that of the inputs.

    Args:
        scores: of queries and keys.
        output: of probabilities and values.
        exported: whether a graph can say it; what cannot runs in torch alone.
    """

    name: str
    scores: str | None
    output: str | None
    exported: bool = True

    @property
    def coded(self) -> bool:
        """Return whether there are codes and scales."""
        return self.scores in ("int8", "fp8")


NUMERICS = {
    row.name: row
    for row in (
        Numerics("float", None, None),
        Numerics("bf16", "bfloat16", "bfloat16", exported=False),
        Numerics("int8_fp8", "int8", "fp8"),
        Numerics("fp8", "fp8", "fp8"),
    )
}


def require_exported(numerics: Numerics) -> None:
    """Refuse what no graph can say.

    Raises:
        InputError: naming those that a graph can.
    """
    if not numerics.exported:
        known = ", ".join(row.name for row in NUMERICS.values() if row.exported)
        raise InputError(
            f"attention in {numerics.name} has no ONNX form, so no engine runs it",
            f"quantize with {option('settings', ['attention.numerics=…'])}, one of {known}; the engine `eager` runs it in torch",
        )


def numerics_named(name: str) -> Numerics:
    """Return the row of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in NUMERICS:
        raise unknown_name("attention numerics", name, NUMERICS)
    return NUMERICS[name]
