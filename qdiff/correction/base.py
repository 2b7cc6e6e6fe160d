"""What a correction is: numbers, and what they do to one step of the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from qdiff.correction.moments import PairMoments
from qdiff.errors import InputError, IntegrityError, command
from qdiff.registry import Registry

Predicts = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Moment:
    """Where in the sampler's schedule a step begins.

    Args:
        timestep: its value.
        progress: 0 at the first step, 1 at the last.
        level, next_level: noise over signal before and after the step, ``sigma / alpha``; of flow matching ``sigma`` itself.
        predicts: what the backbone's output is.
    """

    timestep: float
    progress: float
    level: float
    next_level: float
    predicts: Predicts

    @property
    def alpha(self) -> float:
        """Return the share of the signal in what the backbone sees, variance preserving."""
        return float((1 + self.level**2) ** -0.5)


class Correction(BaseModel, ABC):
    """Changes what goes into a scheduler's step. Without a reason to, a method leaves a part as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    absorbs_noise: ClassVar[bool] = False
    searches: ClassVar[bool] = False  # whether fitting makes pictures

    @classmethod
    @abstractmethod
    def fit(cls, moments: PairMoments, score: Score) -> Self:
        """Return the correction that fits a quantized model.

        Args:
            moments: of float and quantized predictions.
            score: how good the pictures of a correction are, larger is better; every call makes pictures.
        """

    def sample(self, sample: Tensor, moment: Moment) -> Tensor:
        """Return what the step begins at, for the latents ``sample``."""
        return sample

    def prediction(self, prediction: Tensor, seen: Tensor, moment: Moment) -> Tensor:
        """Return what the step is made with, for a guided prediction of what the backbone saw, ``seen``."""
        return prediction

    def noise_variance(self, moment: Moment) -> float:
        """Return the variance of the noise that quantization leaves in a corrected prediction; samplers that add noise
        add less.
        """
        return 0.0


Score = Callable[[Correction], float]
CORRECTIONS: Registry[type[Correction]] = Registry("correction", InputError)


def load_correction(value: object) -> Correction:
    """Return a correction from its JSON values.

    Raises:
        IntegrityError: unknown method or fields, or numbers that are none.
    """
    try:
        if not isinstance(value, dict):
            raise InputError("no group of settings")
        return CORRECTIONS[str(value.get("method"))].model_validate(value)
    except (ValidationError, InputError) as error:
        raise IntegrityError(
            f"not a correction: {str(error)[:200]}", f"run: {command('correct', 'RUN', force=True)}"
        ) from None


def between(timesteps: list[float], values: list[float], timestep: float) -> float:
    """Return ``values`` at ``timestep``: linear between those of ``timesteps`` (any order), constant beyond their
    ends.
    """
    pairs = sorted(zip(timesteps, values, strict=True))
    place = bisect_right([t for t, _ in pairs], timestep)
    if place == 0 or place == len(pairs):
        return pairs[min(place, len(pairs) - 1)][1]
    (before, low), (after, high) = pairs[place - 1], pairs[place]
    return low + (high - low) * (timestep - before) / (after - before)
