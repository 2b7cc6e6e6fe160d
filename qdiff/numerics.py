"""Quantize and dequantize: pure functions, one implementation for each kind of format.

Conventions: ``x`` has any shape; ``scale`` broadcasts against it; codes are ``clamp(round(x / scale))`` with ties to even,
which is what ONNX ``QuantizeLinear`` computes, bit for bit. NaN and infinity never become codes silently: callers check
their data with :func:`require_finite` where it enters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats import Format


def require_finite(x: Tensor, what: str) -> None:
    """Refuses NaN and infinity.

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


SMALLEST_SCALE, LARGEST_SCALE = 2.0**-20, 65504.0


def to_half_grid(x: Tensor) -> Tensor:
    """``x`` rounded to numbers that float16 holds, in its own dtype.

    Every scale and factor of a quantized layer lies on this grid, so the same layer computes with the same constants whether
    an engine runs it in 32 or in 16 bit.
    """
    return x.to(torch.float16).to(x.dtype)


def choose_scale(amax: Tensor, format: Format) -> Tensor:
    """The scale that maps ``amax`` (>= 0, float) to the largest code, on the float16 grid; 1 where ``amax`` is 0, so that
    zeros stay zeros."""
    scale = to_half_grid((amax / format.largest).clamp(min=SMALLEST_SCALE, max=LARGEST_SCALE))
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def quantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Codes of ``x`` in the format's storage dtype."""
    codes = torch.round(x / scale).clamp_(format.lowest, format.highest)
    return codes.to(getattr(torch, format.storage))


def dequantize(codes: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Values of ``codes``, in the scale's dtype."""
    return codes.to(scale.dtype) * scale


def quantize_dequantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """``dequantize(quantize(x))`` without the trip through the storage dtype; same shape and dtype as ``x``."""
    return torch.round(x / scale).clamp_(format.lowest, format.highest) * scale


def quantize_weight(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Rounds a weight ``[out, ...]`` to nearest with one scale for each output channel.

    Returns:
        codes ``[out, ...]`` in the storage dtype and scales ``[out]`` in float32.
    """
    flat = weight.detach().reshape(weight.shape[0], -1).float()
    scale = choose_scale(flat.abs().amax(dim=1), format)
    codes = quantize(flat, scale[:, None], format)
    return codes.reshape(weight.shape), scale
