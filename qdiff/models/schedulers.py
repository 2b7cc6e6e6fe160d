"""Which schedulers can sample a model: told by sampling, not by a list of classes.

A scheduler is right for a model when the predictions that it asks for are those that the model was trained to make: at these
timesteps, of an input that is scaled like this. diffusers' lists of compatible classes do not say that: they name EDM's for
models that know no EDM preconditioning, leave LCM's and TCD's out, which a model with a fused LCM-LoRA wants, and are empty for
flow matching. And a class that does not know an entry of the configuration (a shift of the noise, flow sigmas) ignores it and
samples noise.

So a scheduler is tried on data of which the ideal prediction is known. For a normal distribution ``N(m, s^2)`` and
``x_t = a x + b n``, ``E[x | x_t] = m + a s^2 (x_t - a m) / (a^2 s^2 + b^2)``, with ``a`` and ``b`` from the noise schedule of
the *model's own* scheduler at the timestep that is asked for. What comes out has to be ``N(m, s^2)`` again. A class takes
milliseconds. Whether a model was *distilled* for few steps cannot be seen so: LCM and TCD are offered with a word about it.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from qdiff.correction.scheduler import Scheduler
from qdiff.errors import UsageError, nearest, option
from qdiff.events import log
from qdiff.models.quiet import quiet

SHORT = {
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver-singlestep": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
FOR_DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
# Entries of a configuration that say what the model was trained on, not how it is sampled.
_OF_THE_MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "snr_shift_scale", "use_flow_sigmas", "sigma_data", "clip_sample", "thresholding",
)  # fmt: skip
_TRIAL_STEPS = 20
_MEAN, _SPREAD = 1.0, 0.5  # of the data that a scheduler is tried on: the mean is +1 and -1 in turns
_NEAR, _NARROW, _WIDE = 0.1, 0.25, 0.75  # how far the mean may be off, and within what the spread has to be
Kind = Literal["noise", "flow", "edm"]


def schedulers_for(current: Scheduler, pipeline: object | None = None) -> dict[str, type[Scheduler]]:
    """Return schedulers that can sample what ``current`` can, by class name and short name.

    Args:
        current: the pipeline's own scheduler.
        pipeline: whose loop they run in; it may ask a scheduler for more than others do.
    """
    usable = {cls.__name__: cls for cls in _classes(current) if can_sample(cls, current, pipeline)}
    usable.update({alias: usable[name] for alias, name in SHORT.items() if name in usable})
    return usable


def named(name: str, current: Scheduler, pipeline: object | None, weights: str) -> Scheduler:
    """Return the scheduler of that name with ``current``'s configuration.

    Raises:
        UsageError: unknown, or it cannot sample this model; names those that can.
    """
    import diffusers

    full = SHORT.get(name, name)
    cls = type(current) if full == type(current).__name__ else getattr(diffusers, full, None)
    if not _is_whole(cls) or not can_sample(cls, current, pipeline):
        usable = schedulers_for(current, pipeline)
        close = nearest(name, usable)
        raise UsageError(
            f"unknown or unusable scheduler {name!r} for {weights} weights",
            (f"did you mean {', '.join(close)}? " if close else "") + f"usable: {', '.join(sorted(usable))}",
        )
    if cls.__name__ in FOR_DISTILLED and cls is not type(current):
        log.warning("%s is for models that were distilled for few steps, by a fused LoRA or else", cls.__name__)
    return configured(cls, current)


def configured(cls: type[Scheduler], current: Scheduler) -> Scheduler:
    """Return a scheduler of a class with another's configuration."""
    config = current.config
    known = inspect.signature(cls.__init__).parameters
    # One number under two names: the shift of a flow's noise.
    pairs = (("shift", "flow_shift"), ("flow_shift", "shift"))
    # What was a default of its own class is left to the other class's defaults by diffusers; the model stays what it is.
    given = {name: config[name] for name in _OF_THE_MODEL if name in known and name in config}
    given |= {to: config[old] for to, old in pairs if to in known and to not in config and old in config}
    if "clip_sample" in known and "clip_sample" not in config:
        given["clip_sample"] = False  # their default is that of pixels; latents are larger than 1
    made: Scheduler = cls.from_config(config, **given)
    return made


def can_sample(cls: type[Scheduler], current: Scheduler, pipeline: object | None = None) -> bool:
    """Return whether a scheduler of that class samples the model of ``current``; see the module's docstring."""
    if cls is type(current):
        return True
    if not _suits(cls, pipeline):
        return False
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mean, spread = _moments(_sample(configured(cls, current), _Ideal.of(current)))
    except Exception:  # whatever a class says about a configuration that is not for it
        return False
    return abs(mean - _MEAN) < _NEAR and _NARROW < spread < _WIDE  # NaN is not either


def check_steps(scheduler: Scheduler, steps: int) -> None:
    """Refuse numbers of steps that a scheduler does not take, by its own word.

    Raises:
        UsageError: with the most or the fewest that it takes.
    """
    refusal = _refusal(scheduler, steps)
    if refusal is None or all(_refusal(scheduler, count) for count in (1, 2, 4, 10, 25, 50)):
        return  # taken, or refused for something else than the number, which the pipeline gives
    fewer = next((count for count in range(steps - 1, 0, -1) if _refusal(scheduler, count) is None), None)
    more = next((count for count in range(steps + 1, 51) if _refusal(scheduler, count) is None), None)
    limit = f"at most {fewer}" if fewer is not None else f"at least {more}"
    raise UsageError(
        f"{type(scheduler).__name__} does not take {steps} steps: {refusal[:200]}",
        f"it takes {limit}: {option('steps', fewer or more)}, or choose another with {option('scheduler')}",
    )


def count_calls(scheduler: Scheduler, steps: int) -> int:
    """Return how many timesteps a scheduler goes through in so many steps: more than those where it is of higher
    order.
    """
    trial = copy.deepcopy(scheduler)
    try:
        trial.set_timesteps(steps)
    except Exception:  # it asks for more than a number, or refuses it: who samples will hear why
        return steps
    return len(trial.timesteps)


def _refusal(scheduler: Scheduler, steps: int) -> str | None:
    try:
        copy.deepcopy(scheduler).set_timesteps(steps)
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _classes(current: Scheduler) -> list[type[Scheduler]]:
    """Return all schedulers of diffusers that are installed whole, and ``current``'s own class, first."""
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    with quiet():
        every = [getattr(diffusers, name, None) for name in names]
    return [type(current), *(cls for cls in every if _is_whole(cls) and cls is not type(current))]


def _is_whole(cls: object) -> TypeGuard[type[Scheduler]]:
    """Return whether that is a scheduler's class, and not diffusers' stand-in for one whose package is not
    installed.
    """
    from diffusers import SchedulerMixin

    return isinstance(cls, type) and issubclass(cls, SchedulerMixin) and not hasattr(cls, "_backends")


def _suits(cls: type[Scheduler], pipeline: object | None) -> bool:
    """Return whether a class has what a pipeline's loop asks of its scheduler."""
    if pipeline is None:
        return True
    asked: set[str] = set()
    for method in ("__call__", "prepare_latents"):
        function = inspect.unwrap(getattr(type(pipeline), method, lambda: None))
        asked |= set(function.__code__.co_names)
    wanted = [name for name in ("scale_model_input", "init_noise_sigma", "add_noise") if name in asked]
    return all(hasattr(cls, name) or _sets(cls, name) for name in wanted)


def _sets(cls: type[Scheduler], name: str) -> bool:
    return name in inspect.unwrap(cls.__init__).__code__.co_names


def _moments(sample: Tensor) -> tuple[float, float]:
    """Return mean, with the sign of the data's mean, and spread around it."""
    signs = _signs(sample)
    return float((sample * signs).mean()), float((sample - _MEAN * signs).std())


def _signs(like: Tensor) -> Tensor:
    return torch.ones_like(like).reshape(-1).cumsum(0).remainder(2).mul(2).sub(1).reshape(like.shape)


@dataclass(frozen=True)
class _Ideal:
    """The predictions of a model that has learned ``N(m, s^2)`` on the noise schedule of a scheduler.

    Args:
        kind: how timesteps say how much noise there is: by a table of variances, by ``t / 1000`` (flow matching), or by
            ``log(sigma) / 4`` (EDM, arXiv 2206.00364, with its preconditioning).
        predicts: what the output is.
        log_ratios: of ``noise``: ``log(b / a)`` by timestep.
    """

    kind: Kind
    predicts: str
    log_ratios: Tensor
    timesteps: int = 1000
    sigma_data: float = 0.5

    @classmethod
    def of(cls, scheduler: Scheduler) -> _Ideal:
        """Return the ideal of a model that this scheduler samples."""
        config = scheduler.config
        predicts = str(config.get("prediction_type", "flow_prediction"))
        nothing, count = torch.zeros(0), int(config.get("num_train_timesteps", 1000))
        if type(scheduler).__name__.startswith("EDM"):
            return cls("edm", predicts, nothing, count, float(config["sigma_data"]))
        if config.get("use_flow_sigmas", False) or predicts == "flow_prediction":
            return cls("flow", predicts, nothing, count)
        kept = scheduler.alphas_cumprod.double().cpu().clamp(1e-9, 1 - 1e-9)
        return cls("noise", predicts, ((1 - kept) / kept).log() / 2, count)

    def __call__(self, seen: Tensor, timestep: float) -> Tensor:
        """Return the prediction for what a backbone is given."""
        mean = _MEAN * _signs(seen)
        if self.kind == "edm":
            sigma, data = math.exp(4 * timestep), self.sigma_data
            noisy = seen * math.sqrt(sigma**2 + data**2)
            clean = mean + _SPREAD**2 / (_SPREAD**2 + sigma**2) * (noisy - mean)
            skip = data**2 / (sigma**2 + data**2)
            out = sigma * data / math.sqrt(sigma**2 + data**2)
            return (clean - skip * noisy) / (-out if self.predicts == "v_prediction" else out)
        if self.kind == "flow":
            noise_share = min(max(timestep / self.timesteps, 1e-6), 1.0)
            signal_share = 1 - noise_share
        else:
            ratio = math.exp(self._log_ratio(timestep))
            signal_share = 1 / math.sqrt(1 + ratio**2)
            noise_share = ratio * signal_share
        spread = signal_share**2 * _SPREAD**2 + noise_share**2
        clean = mean + signal_share * _SPREAD**2 / spread * (seen - signal_share * mean)
        noise = (seen - signal_share * clean) / noise_share
        if self.kind == "flow":
            return noise - clean
        if self.predicts == "sample":
            return clean
        return signal_share * noise - noise_share * clean if self.predicts == "v_prediction" else noise

    def _log_ratio(self, timestep: float) -> float:
        """Return the log ratio, linear between timesteps, as the schedulers that have some of them in between take it."""
        place = min(max(timestep, 0.0), len(self.log_ratios) - 1.0)
        low = min(int(place), len(self.log_ratios) - 2)
        return float(torch.lerp(self.log_ratios[low], self.log_ratios[low + 1], place - low))


def _sample(scheduler: Scheduler, model: _Ideal) -> Tensor:
    """Return what a scheduler draws with the ideal predictions: ``[1, 1, 64, 64]``, float64."""
    scheduler.set_timesteps(_TRIAL_STEPS)
    latents = torch.randn(1, 1, 64, 64, dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None)
        seen = latents if scale is None else scale(latents, timestep)
        latents = scheduler.step(model(seen, float(timestep)), timestep, latents, return_dict=False)[0]
    return latents
