"""PTQD (arXiv 2305.10657): take a prediction's quantization noise apart and undo what can be undone.

The noise of a quantized prediction is taken as ``q - f = k f + D``, a part in proportion to the float prediction and a rest with
mean ``mu`` (by channel) and variance ``s²`` (eqs. 8 to 11 there). So

    f = (q - mu) / (1 + k)  with noise of the variance  s² / (1 + k)²  left

and a sampler that adds noise of its own adds so much less that the sum is what it should be. A deterministic sampler has nothing
that could take it in; there only the first part counts. ``k``, ``mu`` and ``s²`` are of a timestep; between those that were seen,
and for another number of steps, they are interpolated.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qdiff.correction.base import CORRECTIONS, Correction, Moment, Score, between
from qdiff.correction.moments import PairMoments


@CORRECTIONS.register("ptqd")
class Ptqd(Correction):
    """See the module's docstring. ``factors`` are ``1 + k``, ``offsets`` are ``mu``, ``variances`` are ``s²``."""

    method: Literal["ptqd"] = "ptqd"
    absorbs_noise: ClassVar[bool] = True
    timesteps: list[float]
    factors: list[float]
    offsets: list[list[float]]
    variances: list[float]

    @classmethod
    def fit(cls, moments: PairMoments, score: Score) -> Self:
        seen = moments.timesteps
        return cls(
            timesteps=seen,
            factors=[moments.factor(t) for t in seen],
            offsets=[moments.offsets(t) for t in seen],
            variances=[moments.residual_variance(t) for t in seen],
        )

    def prediction(self, prediction: Tensor, seen: Tensor, moment: Moment) -> Tensor:
        offsets = [
            between(self.timesteps, list(by_step), moment.timestep) for by_step in zip(*self.offsets, strict=True)
        ]
        mean = torch.tensor(offsets, dtype=prediction.dtype, device=prediction.device)
        mean = mean.reshape(1, -1, *[1] * (prediction.dim() - 2))
        return (prediction - mean) / self._factor(moment)

    def noise_variance(self, moment: Moment) -> float:
        return between(self.timesteps, self.variances, moment.timestep) / self._factor(moment) ** 2

    def _factor(self, moment: Moment) -> float:
        return between(self.timesteps, self.factors, moment.timestep)
