"""Q-Drift (arXiv 2603.18095): quantization noise spreads the latents; a slightly longer step takes that spread back.

A step of the probability flow is ``x' = x + (l' - l) eps`` in the noise level ``l = sigma / alpha``. With a prediction whose
error has the variance ``V = Var(q - eps | q)``, the latents keep their distribution if the step is

    x' = x + (l' - l) (1 + c) q,      c = |l' - l| / (2 l) V

``V`` is measured in predictions of any kind and brought to noise by how noise follows from them: ``eps = alpha v + sigma x`` and
``eps = (x - alpha x0) / sigma``. Flow matching steps by the velocity itself, in ``sigma``: there the same rule is ours, not the
paper's. Schedulers of higher order get the longer prediction too; their history then holds it.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from torch import Tensor

from qdiff.correction.base import CORRECTIONS, Correction, Moment, Score, between
from qdiff.correction.moments import PairMoments


@CORRECTIONS.register("q_drift")
class QDrift(Correction):
    """See the module's docstring. ``variances`` are ``V`` of the predictions as they are."""

    method: Literal["q_drift"] = "q_drift"
    timesteps: list[float]
    variances: list[float]

    @classmethod
    def fit(cls, moments: PairMoments, score: Score) -> Self:
        seen = moments.timesteps
        return cls(timesteps=seen, variances=[moments.error_variance_given(t) for t in seen])

    def prediction(self, prediction: Tensor, seen: Tensor, moment: Moment) -> Tensor:
        return scale_noise(prediction, seen, moment, 1 + self.lengthening(moment))

    def lengthening(self, moment: Moment) -> float:
        """Return the factor ``c``."""
        if not 0 < moment.level < math.inf:  # only noise is seen: a prediction of any length names the same
            return 0.0
        alpha, sigma = moment.alpha, moment.alpha * moment.level
        to_noise = {"epsilon": 1.0, "flow": 1.0, "v_prediction": alpha**2, "sample": (alpha / sigma) ** 2}
        variance = between(self.timesteps, self.variances, moment.timestep) * to_noise[moment.predicts]
        return abs(moment.next_level - moment.level) / (2 * moment.level) * variance


def scale_noise(prediction: Tensor, seen: Tensor, moment: Moment, factor: float) -> Tensor:
    """Return the prediction whose noise is ``factor`` times that of ``prediction`` (of flow matching: whose velocity
    is).
    """
    if factor == 1:
        return prediction
    alpha, sigma = moment.alpha, moment.alpha * moment.level
    if moment.predicts == "v_prediction":
        return factor * prediction + (factor - 1) * (sigma / alpha) * seen
    if moment.predicts == "sample":
        return factor * prediction + (1 - factor) / alpha * seen
    return factor * prediction
