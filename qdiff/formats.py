"""Number formats as rows of one table.

A format is data: how an element is coded, what shares a scale, and how many bits that really costs. What is done with
it (:mod:`qdiff.numerics`) has one implementation for each *kind* of element, so a new format is a new row.

``float32``, ``float16`` and ``bfloat16`` are rows too: a layer that a recipe leaves alone is *kept* in one of them, and
reports count its bits like any other's.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.errors import InputError, unknown_name


@dataclass(frozen=True)
class Format:
    """One number format.

    Args:
        name: what recipes, plans and reports call it.
        kind: ``"integer"`` (symmetric, codes times scale) or ``"float"`` (a plain floating-point type, no scale).
        bits: bits of one stored element.
        largest: the code that ``amax`` is mapped to; 0 for a plain float. INT8 uses 127, not 128: the grid stays
            symmetric, as TensorRT's is for weights.
        lowest, highest: where codes saturate (INT8 activations may reach -128, as ONNX ``QuantizeLinear`` does).
        storage: name of the torch dtype that holds the codes.
        scale_bits: bits of one scale.
    """

    name: str
    kind: str
    bits: int
    largest: float
    lowest: float
    highest: float
    storage: str
    scale_bits: int = 0

    @property
    def quantized(self) -> bool:
        """Whether values in this format need a scale."""
        return self.kind != "float"

    def effective_bits(self, elements_per_scale: int) -> float:
        """Bits for one element, its share of the scale included."""
        return self.bits + self.scale_bits / elements_per_scale


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("int8", "integer", 8, 127, -128, 127, "int8", scale_bits=16),
        Format("float32", "float", 32, 0, 0, 0, "float32"),
        Format("float16", "float", 16, 0, 0, 0, "float16"),
        Format("bfloat16", "float", 16, 0, 0, 0, "bfloat16"),
    )
}


def format_named(name: str) -> Format:
    """The row of that name.

    Raises:
        InputError: with the nearest names.
    """
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS, InputError)
    return FORMATS[name]
