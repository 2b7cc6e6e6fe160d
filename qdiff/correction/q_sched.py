"""Q-Sched (arXiv 2509.01624): two numbers of the schedule, searched by looking at pictures.

The step is made with ``c_e(t)`` times the prediction, from ``c_x(t)`` times the latents; both go linearly from a searched value
at the first step to 1 at the last. The paper tries a grid of 10 x 10 values from 0.8 to 1.1, for samplers of 2 to 8 steps; here
a grid of 5 x 5 around 1 is followed by a finer one around its best.

Its objective needs no reference, and so would also "repair" a model that was never quantized. What the search does for the float
model belongs beside its result (:mod:`qdiff.stages.correct` does that); nearness to the float model's pictures, the default
there, has its optimum at 1 for it.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Literal, Self

from torch import Tensor

from qdiff.correction.base import CORRECTIONS, Correction, Moment, Score
from qdiff.correction.moments import PairMoments

SPACINGS = (0.04, 0.01)  # of the grids, one around the best of the other
REACH = (-2, -1, 0, 1, 2)


@CORRECTIONS.register("q_sched")
class QSched(Correction):
    """See the module's docstring; the values at the first step."""

    method: Literal["q_sched"] = "q_sched"
    searches: ClassVar[bool] = True
    prediction_factor: float
    sample_factor: float

    @classmethod
    def fit(cls, moments: PairMoments, score: Score) -> Self:
        best, known = cls(prediction_factor=1.0, sample_factor=1.0), {}
        for spacing in SPACINGS:
            for i, j in product(REACH, REACH):
                candidate = cls(
                    prediction_factor=round(best.prediction_factor + i * spacing, 4),
                    sample_factor=round(best.sample_factor + j * spacing, 4),
                )
                if candidate not in known:
                    known[candidate] = score(candidate)
            best = max(known, key=lambda candidate: known[candidate])
        return best

    def sample(self, sample: Tensor, moment: Moment) -> Tensor:
        return sample * _towards_one(self.sample_factor, moment)

    def prediction(self, prediction: Tensor, seen: Tensor, moment: Moment) -> Tensor:
        return prediction * _towards_one(self.prediction_factor, moment)


def _towards_one(first: float, moment: Moment) -> float:
    return first + (1 - first) * moment.progress
