"""Runs the user's real pipeline once and keeps what its backbone was given.

Every call is kept, also where a sampler comes to a timestep's value twice (:mod:`qdiff.recording.trajectory`).

One shard for each batch of prompts. A shard depends on the model, its own prompts and its own seeds alone, so a run that
was killed goes on with the first shard that is missing and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qdiff import device
from qdiff.calib.timesteps import STRATEGIES
from qdiff.errors import InputError, option
from qdiff.events import Progress
from qdiff.models.model import Model, Request
from qdiff.models.parts import captured
from qdiff.recording.trajectory import SHARD, require_shard, save_shard


@dataclass(frozen=True)
class Recording:
    """What to record.

    Args:
        prompts: one trajectory each.
        seed: picture i starts from the noise of ``seed + i``.
        steps, guidance, scheduler: as in :class:`qdiff.models.model.Request`.
        strategy, keep: which steps to keep (:mod:`qdiff.calib.timesteps`) and how many.
        batch: prompts that the pipeline denoises together; also the size of a shard.
        other_guidance: further guidance scales: shard ``i`` has the one with number ``i`` modulo how many there are.
    """

    prompts: Sequence[str]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    strategy: str = "uniform"
    keep: int = 25
    batch: int = 4
    other_guidance: tuple[float, ...] = ()

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return -(-len(self.prompts) // self.batch)

    def request(self, shard: int) -> Request:
        """Return the pictures of one shard."""
        first = shard * self.batch
        prompts = self.prompts[first : first + self.batch]
        seeds = range(self.seed + first, self.seed + first + len(prompts))
        scales = (self.guidance, *self.other_guidance)
        guidance = scales[shard % len(scales)]
        return Request(prompts, list(seeds), steps=self.steps, guidance=guidance, scheduler=self.scheduler)


class _Stop(Exception):
    """Leaves the pipeline's loop."""


def seconds_per_call(model: Model, recording: Recording) -> tuple[float, int]:
    """Return seconds of one backbone call of the recording's batch size and the bytes of its inputs, measured on the
    first step of the first shard.
    """
    started, inputs_bytes = 0.0, 0
    seconds: list[float] = []

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal started, inputs_bytes
        inputs_bytes = sum(tensor.numel() * tensor.element_size() for tensor in captured(model, args, kwargs).values())
        device.finish(model.device)
        started = time.perf_counter()

    def after(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        device.finish(model.device)
        seconds.append(time.perf_counter() - started)
        raise _Stop

    hooks = [
        model.backbone.register_forward_pre_hook(before, with_kwargs=True),
        model.backbone.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        model.generate(recording.request(0))
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    _require_steps(seconds)
    return seconds[0], inputs_bytes


def record(model: Model, recording: Recording, folder: Path, owner: str = "") -> list[Path]:
    """Write the missing shards of ``recording`` into ``folder``; return all shards' paths.

    Args:
        model: the float model.
        recording: what is to be recorded.
        folder: of the shards.
        owner: fingerprint of what decides the recording; shards carry it, and those of others are refused.

    Raises:
        IntegrityError: a shard that is there is damaged or another calibration's.
    """
    STRATEGIES[recording.strategy]
    paths = [folder / SHARD.format(index) for index in range(recording.shards)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    for index, path in enumerate(paths):
        if index not in missing:
            require_shard(path, owner)
    calls = model.calls_of_a_picture(recording.steps, recording.guidance, recording.scheduler)
    with Progress("record", len(missing) * calls) as progress:
        for index in missing:
            _record_shard(model, recording, index, folder, owner, progress)
    return paths


def joined(
    timesteps: list[float], calls: list[dict[str, torch.Tensor]], branches: int = 2
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Return one of each ``branches`` calls that follow each other, the last first: the unguided half leads, as
    elsewhere.

    Calls are counted, not told apart by their timestep: a sampler may come to a timestep twice.

    Raises:
        InputError: the branches of a step do not have one timestep.
    """
    groups = [slice(start, start + branches) for start in range(0, len(calls), branches)]
    if any(len(set(timesteps[group])) != 1 or len(timesteps[group]) != branches for group in groups):
        raise InputError(
            f"the pipeline does not call its backbone {branches} times for each timestep",
            f"use another {option('guidance')}",
        )
    together = [
        {name: torch.cat([call[name] for call in reversed(calls[group])]) for name in calls[group][0]}
        for group in groups
    ]
    return [timesteps[group.start] for group in groups], together


def _record_shard(model: Model, recording: Recording, index: int, folder: Path, owner: str, progress: Progress) -> None:
    calls: list[dict[str, torch.Tensor]] = []
    timesteps: list[float] = []

    def watch(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs = captured(model, args, kwargs)
        timesteps.append(float(inputs["timestep"].reshape(-1)[0]))
        calls.append({name: tensor.detach().clone() for name, tensor in inputs.items()})
        progress.advance()

    hook = model.backbone.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        model.generate(recording.request(index), on_step=lambda step, t, latents: None)
    finally:
        hook.remove()
    _require_steps(timesteps)
    if model.family.branches_apart:
        timesteps, calls = joined(timesteps, calls, model.calls_per_step(recording.guidance))
    if len({len(call["timestep"]) for call in calls}) != 1:
        raise InputError(
            "the pipeline calls its backbone with batches of different sizes in one trajectory",
            f"calibrate without guidance ({option('guidance', 1)})",
        )
    generator = torch.Generator().manual_seed(recording.seed * 1_000_003 + index)
    kept = STRATEGIES[recording.strategy](timesteps, recording.keep, generator)
    specs = {spec.name: spec for spec in model.family.inputs(model.config)}
    varying = {name: torch.stack([calls[i][name] for i in kept]) for name in calls[0] if specs[name].varies}
    constant = {name: calls[0][name] for name in calls[0] if not specs[name].varies}
    for name, tensor in {**varying, **constant}.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"the float model itself makes NaN or infinity ({name})",
                "its weights are damaged, or it needs another scheduler",
            )
    save_shard(folder, index, [timesteps[i] for i in kept], varying, constant, owner)


def _require_steps(timesteps: Sequence[float]) -> None:
    """Refuse a recording without a single call of the backbone.

    Raises:
        InputError: the pipeline never called it.
    """
    if not timesteps:
        raise InputError("the pipeline never called its backbone", f"check {option('steps')} and the scheduler")
