"""Rounding to the grid of an element, codes and back: the one place that knows what a code's bits mean.

Everything here works on ratios, that is values already divided by their scale, and holds for any grid of
:data:`qdiff.formats.table.ELEMENTS`:

- **Nearest, ties to even in code space**: halfway between two codes the even code wins, which is IEEE's rule (the even
  mantissa) and also holds where there is no mantissa (E3M0).
- **Beyond the largest value a ratio saturates**, infinity too. OCP MX v1.0 and ONNX's ``saturate=1`` say the same.
- **Subnormals are codes like others**; what rounds to zero keeps its sign (a float has -0, as in hardware; an integer not).
- **NaN stays NaN** in values and has no code: who makes codes checks first (:func:`qdiff.formats.scales.quantize` does).

Floats are rounded by their binade's step, 2^(exponent - mantissa bits), read from float32's own exponent bits. That is exact
(all quantities are powers of two times integers below 2^24) and as fast as rounding integers; a search in the table of values
takes eight times as long on a CPU. Floats are computed in float32 whatever comes in; integers in the dtype that comes in.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qdiff.formats.table import Element

EXPONENT_MASK, EXPONENT_SHIFT, EXPONENT_BIAS = 0x7F800000, 23, 127  # float32's own exponent


def power_of_two(x: Tensor) -> Tensor:
    """Return 2^floor(log2 |x|) of a float32 tensor, exactly; 0 for 0 and for subnormals, infinity for infinity and
    NaN.
    """
    return (x.view(torch.int32) & EXPONENT_MASK).view(torch.float32)


def step(ratio: Tensor, element: Element) -> Tensor:
    """Return the distance of neighbouring codes at ``ratio`` (float32, within the grid): the s(w) of FP4DiT (arXiv
    2503.15465).

    An integer grid has step 1 everywhere. Same shape as ``ratio``.
    """
    if element.kind == "integer":
        return torch.ones_like(ratio)
    binade = power_of_two(ratio).clamp_(min=2.0**element.smallest_exponent)
    return binade.mul_(2.0**-element.mantissa_bits)


def round_to_grid(ratio: Tensor, element: Element) -> Tensor:
    """Return the grid's value nearest to each ratio; same shape, dtype as the module's docstring says. A new tensor."""
    if element.kind == "integer":
        return torch.round(ratio).clamp_(element.lowest, element.highest)
    within = ratio.to(torch.float32).clamp(element.lowest, element.highest)
    steps = step(within, element)
    counts = within.div_(steps)  # in steps of the binade: exact
    rounded = torch.round(counts)
    if element.mantissa_bits == 0:
        # 1.5 steps lie between codes f + 1 and f + 2 of binade f. torch rounds up; where f is odd, the even code is below.
        odd = _exponent_field(steps, element) % 2 == 1
        rounded = torch.where((counts.abs() == 1.5) & odd, counts.sign(), rounded)
    return rounded.mul_(steps)


def neighbours(ratio: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Return the grid's values next below and next above each ratio, equal where a ratio lies on the grid or outside
    it.

    Across a binade's border the two lie on different steps; learned rounding (AdaRound) chooses between exactly these.
    """
    within = ratio.to(torch.float32).clamp(element.lowest, element.highest)
    steps = step(within, element)
    counts = within / steps
    return torch.floor(counts).mul_(steps), torch.ceil(counts).mul_(steps)


def encode(ratio: Tensor, element: Element) -> Tensor:
    """Return codes of the nearest grid values, in the element's storage dtype (one code an entry, not packed). No NaN
    may be there.
    """
    values = round_to_grid(ratio, element)
    storage = getattr(torch, element.storage)
    if storage != torch.uint8:
        return values.to(storage)
    steps = step(values, element)
    # Bits below the sign: in binade f the values are k steps with k in [2^m, 2^(m+1)), and their codes f 2^m + k.
    magnitude = (values.abs() / steps).to(torch.int32) + (_exponent_field(steps, element) << element.mantissa_bits)
    sign = torch.signbit(values).to(torch.int32) << (element.bits - 1)
    return (magnitude | sign).to(torch.uint8)


def decode(codes: Tensor, element: Element, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the grid values of unpacked codes in ``dtype``; exact wherever ``dtype`` holds them (float16 and bfloat16
    hold all).
    """
    if codes.dtype != torch.uint8:
        return codes.to(dtype)
    return torch.tensor(_values(element), dtype=dtype, device=codes.device)[codes.int()]


_values = functools.cache(Element.values)


def _exponent_field(steps: Tensor, element: Element) -> Tensor:
    """Return the number of a step's binade, int32: 0 for the smallest normal numbers and for the subnormals below them."""
    lowest = element.smallest_exponent - element.mantissa_bits + EXPONENT_BIAS
    return (steps.view(torch.int32) >> EXPONENT_SHIFT) - lowest
