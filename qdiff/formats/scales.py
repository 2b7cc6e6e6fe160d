"""Scales, codes and values of every format: pure functions, one implementation for each kind of scale and of element.

Conventions: ``x`` has any shape; ``scale`` broadcasts against it and is what codes are multiplied with, so of a format with a
tensor scale it is the product of both. Codes are the grid values nearest to ``x / scale`` (:mod:`qdiff.formats.elements`):
of integers ``clamp(round(x / scale))`` with ties to even, of floats the saturating cast. Both are what ONNX
``QuantizeLinear`` computes, bit for bit. Integers compute in the dtype of their operands, floats in float32 whatever comes in.

NaN and infinity never become codes silently: callers check their data with :func:`require_finite` where it enters,
:func:`quantize` refuses NaN, and :func:`quantize_dequantize` lets NaN through, where it is seen. Infinity saturates.

How a scale follows from amax, the largest magnitude among those that share it, is :func:`choose_scale`, by the format's scale:

- ``float16``: amax / largest, on the float16 grid, or on bfloat16's beyond it. Rounding down by 2^-11 (2^-9) lets amax saturate
  by a fraction of a step.
- ``e4m3``: E4M3(amax / (largest * tensor scale)), to nearest, between 2^-9 and 448. The order of operations and the lower end are
  modelopt's: a block whose scale would round to 0 gets the smallest subnormal, so its small values are kept coarsely or
  round to zero, and nothing is divided by 0. (torchao's lower end is the smallest normal, 2^-6.)
- ``e8m0``: a power of two, between 2^-126 and the one under which every code is still a float32 number
  (:func:`largest_power`), so that an infinite amax saturates. E8M0 also has 2^-127, but as float32 that is subnormal, and
  hardware that flushes those to zero would divide by 0.

Blocks of zeros get the scale 1 in all three; all their codes are 0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats import elements
from qdiff.formats.table import ELEMENTS, Element, Format


def require_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: naming ``what`` and how many values are bad.
    """
    # A sum is one pass without a temporary; it is finite when all values are, unless it overflows.
    if not torch.isfinite(x.sum(dtype=torch.float64) if x.is_floating_point() else x.sum()):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise InputError(
                f"{what} holds {bad} NaN or infinite values of {x.numel()}", "the model or its weights are damaged"
            )


LARGEST_FLOAT16 = 65504.0
SMALLEST_SCALE = 2.0**-20
SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-9, 448.0
SMALLEST_POWER = 2.0**-126

Rounding = Literal["floor", "up", "even"]
"""How a scale becomes a power of two (:func:`choose_scale`); other kinds of scale take no notice of it."""


def to_half_grid(x: Tensor) -> Tensor:
    """Return ``x`` rounded to numbers of 16 bits, in its own dtype: to float16's, and to bfloat16's where it exceeds
    65,504.

    Every scale and factor of a quantized layer lies on this grid, so the same layer computes with the same constants whether
    an engine runs it in 32 or in 16 bit. A graph with a number beyond float16 computes in 32 bit
    (:mod:`qdiff.export.precision`). (Block and tensor scales are exempt: their formats say what they are.)
    """
    half = x.to(torch.float16).to(x.dtype)
    return torch.where(x.abs() > LARGEST_FLOAT16, x.to(torch.bfloat16).to(x.dtype), half)


def fits_float16(*tensors: Tensor | None) -> bool:
    """Return whether no value is beyond 65,504, float16's largest number; NaN and infinity are."""
    return all(x is None or not x.numel() or float(x.detach().abs().max()) <= LARGEST_FLOAT16 for x in tensors)


def to_storage(x: Tensor, storage_dtype: str) -> Tensor:
    """Return ``x`` as the dtype named ``kept`` stores it, or in float32 where that is float16 and would turn values
    into infinity.
    """
    return x.to(getattr(torch, storage_dtype)) if storage_dtype != "float16" or fits_float16(x) else x.float()


def largest_scale(element: Element) -> float:
    """Return the largest scale of the 16-bit grid: every code times it is a float32 number, so that an infinite amax
    saturates.
    """
    reach = max(-element.lowest, element.highest)
    return (2 - 2.0**-7) * 2.0 ** (127 - math.ceil(math.log2(reach)))


def largest_power(element: Element) -> float:
    """Return the largest power of two that codes of the element can be multiplied with and stay float32 numbers."""
    reach = max(-element.lowest, element.highest)
    return 2.0 ** math.floor(math.log2(torch.finfo(torch.float32).max / reach))


def choose_tensor_scale(amax: Tensor, format: Format, headroom: float = LARGEST_E4M3) -> Tensor:
    """Return the float32 scale of a whole tensor: ``amax`` gets the largest code and the largest block scale. 1 where
    ``amax`` is 0.

    Layers that read one tensor and are run as one (q, k, v) share it: pass the largest amax of all.

    Args:
        amax: largest magnitude, any shape.
        format: one with a tensor scale.
        headroom: what the block scale of ``amax`` becomes: 448, or less to leave room for larger scales (arXiv 2512.02010: 256).
    """
    scale = (amax.to(torch.float32) / (format.largest * headroom)).clamp(min=SMALLEST_POWER)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def choose_scale(
    amax: Tensor, format: Format, tensor_scale: Tensor | None = None, rounding: Rounding = "floor"
) -> Tensor:
    """Return the scale that maps ``amax`` to the largest code, on the grid of the format's scale; 1 where ``amax`` is
    0, so that zeros stay zeros. See the module's docstring.

    Args:
        amax: largest magnitudes (>= 0, float), any shape.
        format: a quantized format.
        tensor_scale: of the tensor, for the formats that have one; it is not contained in the result.
        rounding: of powers of two. ``floor``: 2^(floor(log2 amax) - emax), OCP MX v1.0, section 6.3; what lies above the largest
            code's share of the binade saturates. ``up``: the next power above amax / largest, nothing saturates (NVIDIA's
            cuBLAS, cuDNN and modelopt). ``even``: as floor, after rounding amax to the element's mantissa.

    Returns:
        Same shape; dtype of ``amax``, or float32 for block scales of 8 bits.

    Raises:
        InputError: a format without scales, or one with a tensor scale that is not given.
    """
    if format.scale == "float16":
        scale = to_half_grid((amax / format.largest).clamp(min=SMALLEST_SCALE, max=largest_scale(format.element)))
    elif format.scale == "e4m3":
        if tensor_scale is None:
            raise InputError(f"{format.name} needs the tensor's scale", "choose_tensor_scale gives it")
        ideal = amax.to(torch.float32) / (format.largest * tensor_scale)
        scale = elements.round_to_grid(ideal.clamp(min=SMALLEST_E4M3), ELEMENTS["e4m3"])
    elif format.scale == "e8m0":
        scale = _power_scale(amax.to(torch.float32), format, rounding)
    else:
        raise InputError(f"{format.name} has no scale", "quantize to a format that has one")
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def _power_scale(amax: Tensor, format: Format, rounding: Rounding) -> Tensor:
    element = format.element
    if rounding == "up":
        ideal = amax / element.largest
        scale = elements.power_of_two(ideal)
        scale = torch.where(ideal > scale, scale * 2, scale)
    elif rounding in get_args(Rounding):
        if rounding == "even":
            fraction = element.mantissa_bits if element.kind == "float" else element.bits - 2
            amax = amax + elements.power_of_two(amax) * 2.0 ** -(fraction + 1)  # half a unit of the last place kept
        scale = elements.power_of_two(amax) * 2.0**-element.largest_exponent
    else:
        raise InputError(f"unknown rounding {rounding!r}", f"known: {', '.join(get_args(Rounding))}")
    return scale.clamp(min=SMALLEST_POWER, max=largest_power(element))


def quantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return codes of ``x`` in the format's storage dtype, one an entry (:mod:`qdiff.formats.packing` packs them).
    Infinity saturates.

    Raises:
        InputError: ``x`` or ``scale`` holds NaN, which no code stands for.
    """
    ratio = _ratio(x, scale, format)
    if torch.isnan(ratio.sum()) and torch.isnan(ratio).any():
        bad = int(torch.isnan(ratio).sum())
        raise InputError(f"{bad} of {ratio.numel()} values are NaN, which has no {format.name} code")
    return elements.encode(ratio, format.element)


def dequantize(codes: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return values of unpacked ``codes``, in the scale's dtype."""
    return elements.decode(codes, format.element, scale.dtype) * scale


def quantize_dequantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return ``dequantize(quantize(x))`` without the trip through the storage dtype; same shape and dtype as ``x``.

    NaN stays NaN, infinity saturates.
    """
    values = elements.round_to_grid(_ratio(x, scale, format), format.element)
    return values * scale if format.kind == "integer" else values.mul_(scale).to(x.dtype)


def _ratio(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    return x / scale if format.kind == "integer" else x.to(torch.float32) / scale.to(torch.float32)
