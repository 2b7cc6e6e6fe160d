"""First and second moments of pairs of predictions, float ``f`` and quantized ``q``, by timestep and channel.

All that the methods estimate follows from the sums of f, q, f², q² and f q; tensors are looked at once and not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_F, _Q, _FF, _QQ, _FQ = range(5)


class PairMoments:
    """Sums over pairs of guided predictions ``[batch, channels, ...]``, float64."""

    def __init__(self) -> None:
        self._sums: dict[float, Tensor] = {}
        self._counts: dict[float, int] = {}

    def add(self, timestep: float, expected: Tensor, got: Tensor) -> None:
        """Add the predictions of both models in one call."""
        f, q = (tensor.double().movedim(1, 0).flatten(1) for tensor in (expected, got))
        sums = torch.stack([f.sum(1), q.sum(1), (f * f).sum(1), (q * q).sum(1), (f * q).sum(1)])  # [5, channels]
        self._sums[timestep] = self._sums.get(timestep, torch.zeros_like(sums)) + sums
        self._counts[timestep] = self._counts.get(timestep, 0) + f.shape[1]

    @property
    def timesteps(self) -> list[float]:
        """Return those that were seen, in the sampler's order."""
        return sorted(self._sums, reverse=True)

    def _means(self, timestep: float) -> Tensor:
        return self._sums[timestep] / self._counts[timestep]

    def factor(self, timestep: float) -> float:
        """Return the number ``1 + k`` with the least squared ``q - (1 + k) f``, means of channels apart."""
        means = self._means(timestep)
        covariance = (means[_FQ] - means[_F] * means[_Q]).sum()
        variance = (means[_FF] - means[_F].square()).sum()
        return float(covariance / variance) if variance > 0 else 1.0

    def offsets(self, timestep: float) -> list[float]:
        """Return the mean of ``q - (1 + k) f`` for each channel."""
        means, factor = self._means(timestep), self.factor(timestep)
        return (means[_Q] - factor * means[_F]).tolist()

    def residual_variance(self, timestep: float) -> float:
        """Return the variance of ``q - (1 + k) f`` around those means."""
        means, factor = self._means(timestep), self.factor(timestep)
        f, q = means[_FF] - means[_F].square(), means[_QQ] - means[_Q].square()
        crossed = means[_FQ] - means[_F] * means[_Q]
        return max(0.0, float((q - 2 * factor * crossed + factor**2 * f).mean()))

    def error_variance_given(self, timestep: float) -> float:
        """Return ``Var(q - f | q)``: what a line in q leaves of the error's variance."""
        means = self._means(timestep)
        f, q = means[_FF] - means[_F].square(), means[_QQ] - means[_Q].square()
        crossed = means[_FQ] - means[_F] * means[_Q]
        error, with_q = (q - 2 * crossed + f).sum(), (q - crossed).sum()
        explained = with_q.square() / q.sum() if float(q.sum()) > 0 else 0.0
        return max(0.0, float((error - explained) / len(f)))
