"""A scheduler of diffusers with a correction before its step.

It holds the scheduler and passes everything on, so a pipeline does not notice. State is the scheduler's own: which step it is,
the scheduler says, or the timestep's value; nothing is counted here.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qdiff.correction.base import Correction, Moment, Predicts

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerOutput


class Scheduler(Protocol):
    """What is asked of a scheduler of diffusers. ``alphas_cumprod`` is there where a table says the noise of each timestep."""

    timesteps: Tensor
    alphas_cumprod: Tensor

    @property
    def config(self) -> Mapping[str, Any]: ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: object) -> Scheduler: ...

    def set_timesteps(self, num_inference_steps: int | None = None, *args: object, **kwargs: object) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: object, **kwargs: object
    ) -> SchedulerOutput | tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Response:
    """What the result of one step is made of: ``sample`` times the latents, ``prediction`` times the output, ``noise`` times a
    standard normal of the scheduler's own.
    """

    sample: float
    prediction: float
    noise: float


class CorrectedScheduler:
    """``scheduler`` with ``correction`` applied in :meth:`step`; every other attribute is the scheduler's."""

    def __init__(self, scheduler: Scheduler, correction: Correction) -> None:
        self.scheduler, self.correction = scheduler, correction
        self._responses: list[Response | None] | None = None

        @functools.wraps(scheduler.step)  # pipelines look at the signature for what a scheduler takes (eta, generator)
        def step(
            model_output: Tensor, timestep: Tensor, sample: Tensor, *args: object, **kwargs: object
        ) -> SchedulerOutput | tuple[Tensor, ...]:
            return self._step(model_output, timestep, sample, *args, **kwargs)

        self.step = step

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # before __init__, while being copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def set_timesteps(self, num_inference_steps: int | None = None, *args: object, **kwargs: object) -> None:
        """Set the timesteps as the scheduler does; a new schedule has new responses."""
        self._responses = None
        self.scheduler.set_timesteps(num_inference_steps, *args, **kwargs)

    def _step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: object, **kwargs: object
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        place = place_of(self.scheduler, float(timestep))
        moment = moment_of(self.scheduler, place, float(timestep))
        if self.correction.absorbs_noise and self._responses is None:
            self._responses = responses(self.scheduler, kwargs)
        seen = self.scheduler.scale_model_input(sample, timestep)
        output = self.correction.prediction(model_output, seen, moment)
        start = self.correction.sample(sample, moment)
        stepped = self.scheduler.step(output, timestep, start, *args, **kwargs)
        response = self._responses[place] if self._responses else None
        share = 1.0 if response is None else noise_share(response, self.correction.noise_variance(moment))
        if response is None or share == 1.0:
            return stepped
        without = response.sample * start + response.prediction * output
        latents = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        latents = without + share * (latents - without)
        if isinstance(stepped, tuple):
            return (latents, *stepped[1:])
        stepped.prev_sample = latents
        return stepped


def place_of(scheduler: Scheduler, timestep: float) -> int:
    """Return the number of a step: the scheduler's own, where it counts; else of the first step at that timestep."""
    index = getattr(scheduler, "step_index", None)
    if index is not None:
        return int(index)
    return int((scheduler.timesteps.double().cpu() - timestep).abs().argmin())


def moment_of(scheduler: Scheduler, place: int, timestep: float) -> Moment:
    """Return where a step begins. Schedulers of higher order come to a timestep twice; one that counts its steps has
    the second at no distance, of one that does not the next other level is meant.
    """
    levels = noise_levels(scheduler)
    later = levels[place + 1 :]
    if getattr(scheduler, "step_index", None) is None:
        later = [level for level in later if level != levels[place]] or later[-1:]
    progress = place / max(1, len(scheduler.timesteps) - 1)
    return Moment(timestep, progress, levels[place], later[0], predicts(scheduler))


def predicts(scheduler: Scheduler) -> Predicts:
    """Return what outputs the scheduler takes."""
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction")  # classes for flow matching alone do not say it
    if config.get("use_flow_sigmas", False) or kind == "flow_prediction":
        return "flow"
    return kind


def noise_levels(scheduler: Scheduler) -> list[float]:
    """Return the noise over the signal before each step and after the last (:class:`qdiff.correction.base.Moment`)."""
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == count + 1:
        return torch.as_tensor(sigmas).double().tolist()
    kept = scheduler.alphas_cumprod.double().cpu()
    at = kept[scheduler.timesteps.cpu().long().clamp(0, len(kept) - 1)]
    return [*((1 - at) / at).sqrt().tolist(), 0.0]


def noise_share(response: Response, variance: float) -> float:
    """Return how much of its own noise a step keeps when predictions bring noise of that ``variance`` (PTQD, eq. 15):
    together they then have the variance that the step means.
    """
    if response.noise == 0:
        return 1.0
    brought = (response.prediction / response.noise) ** 2 * variance
    return max(0.0, 1 - brought) ** 0.5


def responses(scheduler: Scheduler, options: Mapping[str, object]) -> list[Response | None]:
    """Return the :class:`Response` of every step, found by stepping copies of the scheduler with zeros and ones.

    ``None`` where a step adds no noise, or where it is not linear in the two, because it clips or looks at earlier steps.

    Args:
        scheduler: of diffusers, with its timesteps set.
        options: the keywords that the pipeline gives to ``step``.
    """
    options = {**options, "return_dict": False}

    def run(sample: float, predictions: list[float]) -> list[Tensor]:
        copied, found = copy.deepcopy(scheduler), []
        for count in ("_step_index", "_begin_index"):  # some count: from the first step, whichever the pipeline is at
            setattr(copied, count, None)
        if "generator" in options:
            options["generator"] = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every run meets the same noise
            for timestep, prediction in zip(copied.timesteps, predictions, strict=True):
                ones = torch.ones(1, 1, 64, 64, dtype=torch.float64)
                copied.scale_model_input(ones, timestep)
                found.append(copied.step(prediction * ones, timestep, sample * ones, **options)[0])
        return found

    count = len(scheduler.timesteps)
    nothing = run(0.0, [0.0] * count)
    alone = [
        [float((got - quiet).mean()) for got, quiet in zip(run(sample, predictions), nothing, strict=True)]
        for sample, predictions in ((1.0, [0.0] * count), (0.0, [1.0] * count), (0.0, [3.0] * count))
    ]
    odd = [float((got - quiet).mean()) for got, quiet in zip(run(0.0, _every_other(count)), nothing, strict=True)]
    result: list[Response | None] = []
    for place, (by_sample, by_prediction, threefold) in enumerate(zip(*alone, strict=True)):
        close = functools.partial(math.isclose, rel_tol=1e-3, abs_tol=1e-5)
        linear = close(threefold, 3 * by_prediction) and close(odd[place], place % 2 * by_prediction)
        noise = float(nothing[place].std())
        result.append(Response(by_sample, by_prediction, noise) if linear and noise > 1e-6 else None)
    return result


def _every_other(count: int) -> list[float]:
    return [float(place % 2) for place in range(count)]
