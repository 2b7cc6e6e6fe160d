"""Twin-log weights (TLQ of LRQ-DiT, arXiv 2508.03485): a study of storage, for weights of 3 and 4 bits with long tails.

A uniform grid spends its levels on a tail that few weights are in. Here each row has a logarithmic grid for its positive weights
and another for its negative ones: the exponents ``log2(|w| + η)`` are quantized uniformly between two percentiles,

    q = round((log2(|w| + η) - z) / s),  0 <= q < 2^(b-1),        ŵ = ±(2^(s q + z) - η)

with s, z for each sign and row, and η and both percentiles searched for each row by the squared error. One bit is the sign, so
there are 2^b codes and none for zero (zeros become the smallest positive value). The η that is added is taken away again; without
that the smallest weights would all be wrong by it.

No engine multiplies on such a grid (a code is a shift and a table), so this is no row of
:data:`qdiff.formats.table.FORMATS`: nothing can be exported. It says what such storage would be worth:
:func:`quantize_dequantize` gives the values, :func:`effective_bits` the price.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats.scales import require_finite, to_half_grid

ETAS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # times the row's mean magnitude
SHARES = (0.98, 0.99, 0.999, 0.9999, 0.99999)
SMALLEST_LOG = -24.0
ROW_BITS = 16 * 5  # s and z of both signs, η


@dataclass(frozen=True)
class TwinLog:
    """Codes of a weight ``[out, in]`` and the grids of its rows.

    Args:
        bits: b.
        codes: uint8 ``[out, in]``: the sign in bit b - 1, the level below it.
        step, start: s and z, ``[out, 2]`` float32 on the float16 grid; column 0 of positive weights.
        eta: ``[out]`` float32 on the float16 grid.
    """

    bits: int
    codes: Tensor
    step: Tensor
    start: Tensor
    eta: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight's values ``[out, in]`` in float32."""
        negative = (self.codes >> (self.bits - 1)).long()
        level = (self.codes & (2 ** (self.bits - 1) - 1)).float()
        exponent = level * self.step.gather(1, negative) + self.start.gather(1, negative)
        magnitude = torch.exp2(exponent) - self.eta[:, None]
        return torch.where(negative.bool(), -magnitude, magnitude)


def quantize(weight: Tensor, bits: int) -> TwinLog:
    """Search η and the percentiles of both signs for every row of ``weight [out, in]`` and round to that grid.

    Raises:
        InputError: not a matrix, NaN or infinity, or a width that leaves no levels (``bits`` is 2 to 8).
    """
    if weight.dim() != 2 or not 2 <= bits <= 8:
        raise InputError(f"twin-log takes a matrix and 2 to 8 bits, not shape {tuple(weight.shape)} and {bits}")
    require_finite(weight, "the weight")
    weight = weight.detach().float()
    mean = weight.abs().mean(dim=1).clamp(min=1e-12)
    least = torch.full((len(weight),), torch.inf, device=weight.device)
    best: dict[str, Tensor] = {}
    for share in ETAS:
        eta = to_half_grid(mean * share)
        sides = [_side(weight, weight < 0 if negative else weight >= 0, eta, bits) for negative in (False, True)]
        error = sides[0]["error"] + sides[1]["error"]
        found = {
            "codes": torch.where(weight < 0, sides[1]["level"] | 2 ** (bits - 1), sides[0]["level"]),
            "step": torch.stack([side["step"] for side in sides], dim=1),
            "start": torch.stack([side["start"] for side in sides], dim=1),
            "eta": eta,
        }
        better = error < least
        least = torch.minimum(least, error)
        best = {
            name: torch.where(better.reshape(-1, *[1] * (value.dim() - 1)), value, best.get(name, value))
            for name, value in found.items()
        }
    return TwinLog(bits, **best)


def quantize_dequantize(weight: Tensor, bits: int) -> Tensor:
    """Return the values that :func:`quantize` leaves of ``weight [out, in]``, float32."""
    return quantize(weight, bits).dequantize()


def effective_bits(columns: int, bits: int) -> float:
    """Return bits for one weight of a row of ``columns``, its share of the row's grids included."""
    return bits + ROW_BITS / columns


def _side(weight: Tensor, mine: Tensor, eta: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the best percentile for the weights of one sign, row by row: ``level [out, in]`` uint8; the others
    ``[out]``.
    """
    logs = (weight.abs() + eta[:, None]).log2().clamp(min=SMALLEST_LOG)
    shown = torch.where(mine, logs, torch.nan)
    top = 2 ** (bits - 1) - 1
    best: dict[str, Tensor] = {}
    for share in SHARES:
        low = torch.nan_to_num(shown.nanquantile(1 - share, dim=1), nan=SMALLEST_LOG)
        high = torch.nan_to_num(shown.nanquantile(share, dim=1), nan=SMALLEST_LOG)
        step, start = to_half_grid(((high - low) / top).clamp(min=2.0**-14)), to_half_grid(low)
        level = ((logs - start[:, None]) / step[:, None]).round().clamp(0, top)
        values = torch.exp2(level * step[:, None] + start[:, None]) - eta[:, None]
        error = ((values - weight.abs()).square() * mine).sum(dim=1)
        found = {"level": level.to(torch.uint8), "step": step, "start": start, "error": error}
        better = error < best["error"] if best else torch.ones_like(error, dtype=torch.bool)
        best = {
            name: torch.where(better.reshape(-1, *[1] * (value.dim() - 1)), value, best.get(name, value))
            for name, value in found.items()
        }
    return best
