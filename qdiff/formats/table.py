"""Number formats as rows of one table.

A format is data: what one code means (:class:`Element`), which values share a scale, in what the scale itself is stored, and
how many bits all of that really costs. What is done with it has one implementation for each *kind* of element and of scale
(:mod:`qdiff.formats.elements`, :mod:`qdiff.formats.scales`), so a new format is a new row.

- **Elements.** Integers are two's complement and symmetric: amax goes to 2^(b-1) - 1, and -2^(b-1) is a code that values may
  round to, as in ONNX ``QuantizeLinear`` and TensorRT. Floats ExMy have a sign, x exponent and y mantissa bits, IEEE bias
  2^(x-1) - 1 and subnormals. Those of 4 and 6 bits spend no code on infinity or NaN, E4M3 one on NaN, and E5M2 is IEEE's
  (OCP MX v1.0 and OFP8 v1.0).
- **Scales.** ``float16``: one for each channel, token or tensor, or for each block, a number that float16 holds, or
  beyond its range bfloat16. ``e4m3``: for each block, an E4M3 number times one float32 scale of the tensor (NVFP4, and the same
  with integers). ``e8m0``: for each block, a power of two (OCP MX). A block is ``block`` neighbours on the last axis, the axis
  that a product sums over.
- **MXINT8's codes are integers here**; OCP reads them with an implied 2^-6, which our scale contains. The products are equal.

``float32``, ``float16`` and ``bfloat16`` are rows too: a layer that a recipe leaves alone is *kept* in one of them, and
reports count its bits like any other's. This module loads no torch: dtypes are named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qdiff.errors import InputError, option, unknown_name

# Of a stored scale: its bits, and the torch dtype that holds it. Scales on the float16 grid are kept in float32, so that the
# same number is used in whatever precision an engine computes.
SCALE_BITS = {"float16": 16, "e4m3": 8, "e8m0": 8}
SCALE_STORAGE = {"float16": "float32", "e4m3": "float8_e4m3fn", "e8m0": "float8_e8m0fnu"}
TENSOR_SCALE_BITS = 32


@dataclass(frozen=True)
class Element:
    """What one code means.

    Args:
        name: ``int4``, ``e2m1``, … or the name of a plain dtype.
        kind: ``"integer"``, ``"float"`` (ExMy, needs a scale) or ``"plain"`` (a floating-point type, no scale).
        bits: of one code.
        largest: the value that amax is mapped to; 0 for a plain type.
        lowest, highest: where values saturate.
        storage: name of the torch dtype of one unpacked code: int8 for integers; float8 where torch has the type; for
            other floats uint8, the bit pattern (sign, exponent, mantissa) in the low bits.
        exponent_bits, mantissa_bits: of a float.
    """

    name: str
    kind: str
    bits: int
    largest: float
    lowest: float
    highest: float
    storage: str
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def smallest_exponent(self) -> int:
        """Return the exponent of a float's smallest normal number, and of the step below it: 1 - bias."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        """Return floor(log2(largest)): emax_elem of OCP MX v1.0, section 6.3 (of INT8 as we read it: 6)."""
        return math.frexp(self.largest)[1] - 1

    def value(self, code: int) -> float:
        """Return what the bit pattern ``code`` (0 … 2^bits - 1) stands for."""
        if self.kind == "plain":
            raise TypeError(f"{self.name} is a type of torch, not a grid of codes")
        negative = code >> (self.bits - 1)
        if self.kind == "integer":
            return float(code - (negative << self.bits))
        sign = -1.0 if negative else 1.0
        exponent, mantissa = divmod(code & (2 ** (self.bits - 1) - 1), 2**self.mantissa_bits)
        fraction = mantissa if exponent == 0 else mantissa + 2**self.mantissa_bits
        value = math.ldexp(fraction, max(exponent, 1) - 1 + self.smallest_exponent - self.mantissa_bits)
        if value > self.largest:  # the codes that E4M3 and E5M2 reserve
            return sign * (math.inf if self.name == "e5m2" and mantissa == 0 else math.nan)
        return sign * value

    def values(self) -> tuple[float, ...]:
        """Return the value of every bit pattern, in order: what :func:`qdiff.formats.elements.decode` looks up."""
        return tuple(self.value(code) for code in range(2**self.bits))


def _integer(bits: int) -> Element:
    top = 2 ** (bits - 1)
    return Element(f"int{bits}", "integer", bits, top - 1, -top, top - 1, "int8")


def _float(exponent: int, mantissa: int, largest: float, storage: str = "uint8") -> Element:
    name, bits = f"e{exponent}m{mantissa}", 1 + exponent + mantissa
    return Element(name, "float", bits, largest, -largest, largest, storage, exponent, mantissa)


def _plain(name: str, bits: int) -> Element:
    return Element(name, "plain", bits, 0, 0, 0, name)


ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        _integer(8),
        _integer(6),
        _integer(4),
        _float(4, 3, 448, "float8_e4m3fn"),
        _float(5, 2, 57344, "float8_e5m2"),
        _float(3, 2, 28),
        _float(2, 3, 7.5),
        _float(2, 1, 6),
        _float(1, 2, 3.5),
        _float(3, 0, 16),
        _plain("float32", 32),
        _plain("float16", 16),
        _plain("bfloat16", 16),
    )
}


@dataclass(frozen=True)
class Format:
    """One number format.

    Args:
        name: what recipes, plans and reports call it.
        element: what one code means.
        block: neighbours on the last axis that share a scale; 0 where the use decides: an output channel of a weight, a
            token or the whole tensor of an activation.
        scale: ``"float16"``, ``"e4m3"``, ``"e8m0"``, or ``None`` for a plain type.
        tensor_scale: whether block scales are multiples of one float32 scale of the tensor.
        about: one line for people: who runs it or where it comes from.
    """

    name: str
    element: Element
    block: int = 0
    scale: str | None = "float16"
    tensor_scale: bool = False
    about: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """Return the kind of the element: ``"integer"``, ``"float"`` or ``"plain"``."""
        return self.element.kind

    @property
    def bits(self) -> int:
        """Return bits of one code."""
        return self.element.bits

    @property
    def largest(self) -> float:
        """Return the value (in codes' units) that amax is mapped to."""
        return self.element.largest

    @property
    def lowest(self) -> float:
        """Return where negative values saturate."""
        return self.element.lowest

    @property
    def highest(self) -> float:
        """Return where positive values saturate."""
        return self.element.highest

    @property
    def storage(self) -> str:
        """Return the name of the torch dtype of one unpacked code."""
        return self.element.storage

    @property
    def packed_storage(self) -> str:
        """Return the name of the torch dtype of packed codes: uint8 where several share a byte."""
        return self.storage if self.bits >= 8 else "uint8"

    @property
    def scale_bits(self) -> int:
        """Return bits of one stored scale; 0 without scales."""
        return 0 if self.scale is None else SCALE_BITS[self.scale]

    @property
    def scale_storage(self) -> str | None:
        """Return the name of the torch dtype of a stored scale."""
        return None if self.scale is None else SCALE_STORAGE[self.scale]

    @property
    def quantized(self) -> bool:
        """Return whether values in this format need a scale."""
        return self.scale is not None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight's scales: ``[out]`` for ``[out, ...]``, or ``[out, in / block]`` for ``[out,
        in]``.

        Raises:
            InputError: the last axis does not divide into blocks.
        """
        if not self.block:
            return shape[:1]
        self.check_columns(shape[-1])
        return (*shape[:-1], shape[-1] // self.block)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of packed codes: the last axis shrinks from ``n`` to ``n * bits / 8`` where several codes
        share a byte.

        Raises:
            InputError: the last axis does not fill whole bytes.
        """
        if self.bits >= 8:
            return shape
        codes = 8 // math.gcd(self.bits, 8)  # that fill whole bytes
        if shape[-1] % codes:
            raise InputError(
                f"{self.name} packs {codes} codes into {codes * self.bits // 8} bytes, and {shape[-1]} columns do not fill them",
                "keep this layer in another format (recipe: ignore)",
            )
        return (*shape[:-1], shape[-1] * self.bits // 8)

    def check_columns(self, columns: int) -> None:
        """Refuse a last axis that does not divide into blocks. There is no padding: the engines' block quantizers need
        whole blocks too, and a padded weight would need a padded activation.

        Raises:
            InputError: naming the format and the size.
        """
        if self.block and columns % self.block:
            fitting = " or ".join(self._fitting(columns))
            raise InputError(
                f"{self.name} has blocks of {self.block}, and {columns} columns do not divide into them",
                "keep this layer in another format (recipe: ignore)"
                + (f", or take {fitting} ({option('settings', ['scheme.weights=…'])})" if fitting else ""),
            )

    def _fitting(self, columns: int) -> list[str]:
        """Return names of formats of the same numbers whose blocks divide that many columns."""
        rows = (row for row in FORMATS.values() if row.element == self.element and row.scale == self.scale)
        return [row.name for row in rows if not (row.block and columns % row.block)]

    def effective_bits(self, elements_per_scale: int, elements: int | None = None) -> float:
        """Return bits for one element, its share of the scales included.

        Args:
            elements_per_scale: how many share a scale where the format has no blocks (columns of a weight); else unused.
            elements: of the whole tensor, which share the tensor scale; ``None`` leaves it out, as when one says that
                NVFP4 has 4.5 bits.
        """
        bits = self.bits + self.scale_bits / (self.block or elements_per_scale)
        return bits + (TENSOR_SCALE_BITS / elements if self.tensor_scale and elements else 0)

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Return bits of a weight ``[out, ...]`` with every scale, exactly. Raises as :meth:`scale_shape`."""
        codes = math.prod(shape) * self.bits
        scales = math.prod(self.scale_shape(shape)) * self.scale_bits if self.quantized else 0
        return codes + scales + (TENSOR_SCALE_BITS if self.tensor_scale else 0)


def low_rank_bits(rows: int, columns: int, rank: int, bits: int = 16) -> float:
    """Return bits that a low-rank branch ``[rows, rank] @ [rank, columns]`` adds to each weight: it counts like any
    other bit.

    32 ranks in 16 bit are 0.89 bits at 1152 x 1152, so "4-bit weights and rank 32" are 5.4 bits in NVFP4.
    """
    return bits * rank * (rows + columns) / (rows * columns)


def rotation_bits(block: int) -> int:
    """Return bits that a rotation fitted to outliers (:class:`qdiff.nn.rotations.Rotation`) stores for each column of a
    weight: a row of G in float32, and a place. A Hadamard matrix follows from its size and is not stored.
    """
    return 32 * block + 64


E = ELEMENTS
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("int8", E["int8"], about="every engine; static activations, one scale a tensor"),
        Format("fp8", E["e4m3"], about="TensorRT from SM 8.9; flat 31.5 dB whatever the distribution's tail"),
        Format("fp8_e5m2", E["e5m2"], about="more range than fp8, a mantissa bit less"),
        Format(
            "nvfp4", E["e2m1"], 16, "e4m3", True, "TensorRT from SM 10.0: weights, and activations scaled at run time"
        ),
        Format("mxfp8", E["e4m3"], 32, "e8m0", about="OCP MX v1.0; TensorRT from SM 10.0"),
        Format("mxint8", E["int8"], 32, "e8m0", about="OCP MX v1.0; the better MX format at 8 bits (arXiv 2510.25602)"),
        Format("mxfp6_e3m2", E["e3m2"], 32, "e8m0", about="OCP MX v1.0"),
        Format("mxfp6_e2m3", E["e2m3"], 32, "e8m0", about="OCP MX v1.0"),
        Format("mxfp4", E["e2m1"], 32, "e8m0", about="OCP MX v1.0"),
        Format("nvint4", E["int4"], 16, "e4m3", True, "study: NVFP4's scales on integers (arXiv 2510.25602)"),
        Format(
            "int6",
            E["int6"],
            about="weights between INT8 and INT4; on a CPU integer kernels compute with them as with INT8",
        ),
        Format("int6_g64", E["int6"], 64, about="the same with a scale for each group"),
        Format("int4", E["int4"], about="one scale a channel or token; the baseline that groups improve on"),
        Format("int4_g32", E["int4"], 32, about="weights; TensorRT has no block of 32"),
        Format("int4_g64", E["int4"], 64, about="weights alone in TensorRT"),
        Format("int4_g128", E["int4"], 128, about="weights alone in TensorRT; GPTQ's and AWQ's usual group"),
        Format(
            "fp6_e3m2", E["e3m2"], about="study: FP6 with one scale a channel or token (FP4DiT's A6, arXiv 2503.15465)"
        ),
        Format("fp6_e2m3", E["e2m3"], about="study: the same with more mantissa"),
        Format("fp4_e2m1_g128", E["e2m1"], 128, about="study: FP4DiT's weights (arXiv 2503.15465)"),
        Format("fp4_e1m2_g128", E["e1m2"], 128, about="study: FP4DiT's weights for PixArt-Σ; INT4 without -8"),
        Format("fp4_e3m0_g128", E["e3m0"], 128, about="study: FP4DiT's up-projections; powers of two"),
        Format("float32", E["float32"], scale=None, about="kept"),
        Format("float16", E["float16"], scale=None, about="kept"),
        Format("bfloat16", E["bfloat16"], scale=None, about="kept"),
    )
}
del E


def format_named(name: str) -> Format:
    """Return the row of that name.

    Raises:
        InputError: with the nearest names.
    """
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS, InputError)
    return FORMATS[name]
