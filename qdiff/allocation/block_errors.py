"""What both branches of every block do on the recorded trajectory: errors of their own output, and of the prediction.

Routes go by the timestep's value. Where a sampler calls twice at one value, the first call is measured; the router begins anew at
the second, with every block evaluated.

Everything is measured with the float model's states as input, one block at a time, like sensitivities
(:mod:`qdiff.allocation.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, option
from qdiff.events import Progress
from qdiff.models.model import Model
from qdiff.recording.trajectory import Step, Trajectory
from qdiff.routing.blocks import disturbed
from qdiff.routing.follow import NOISE


@dataclass
class Measured:
    """``samples`` are the recorded prompts, with guidance twice; none where nothing follows what blocks change.

    Args:
        timesteps: falling.
        changes: ``[blocks, steps, samples]`` of the float model.
        drifts: the same; infinite at the first step.
        errors: ``[blocks, steps, samples]``: the cheap branch's output against float, L1, relative.
        predictions: ``[blocks, steps, branches]``: squared relative error of the prediction.
        reused: ``[blocks, steps]``: the same when the block adds what it added the step before; infinite at the first, and
            everywhere where that was not tried.
        together: ``[steps]``: the same when all blocks err a little (:data:`qdiff.routing.follow.NOISE`).
        prompts: ``[samples]``: of which prompt.
    """

    timesteps: list[float]
    changes: Tensor
    drifts: Tensor
    errors: Tensor
    predictions: Tensor
    reused: Tensor
    together: Tensor
    prompts: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the timesteps."""
        names = ("changes", "drifts", "errors", "predictions", "reused", "together", "prompts")
        return {name: getattr(self, name).contiguous() for name in names}


def measure_block_errors(
    model: Model,
    trial: nn.Module,
    blocks: Sequence[str],
    branches: Sequence[Sequence[nn.Module]],
    trajectory: Trajectory,
    guided: bool,
    changes: bool = True,
    reuse: bool = True,
) -> Measured:
    """Replay the trajectory.

    Args:
        model: for its family.
        trial: a float backbone whose blocks can be replaced; it sets the timestep index that the branches read.
        blocks: names, in the order of the chain.
        branches: of each block, the cheap one last.
        trajectory: the recorded calls.
        guided: whether each prompt is twice in a batch.
        changes: whether to watch all calls for what blocks change, which predictors and reuse are made from.
        reuse: whether to try every block with what it added the step before.

    Raises:
        InputError: a recording whose shards have other timesteps than each other.
    """
    timesteps = list(dict.fromkeys(trajectory.timesteps(0)))
    if any(list(dict.fromkeys(trajectory.timesteps(shard))) != timesteps for shard in range(len(trajectory.paths))):
        raise InputError(
            "the recorded trajectories have different timesteps, and changes from step to step cannot be compared",
            f"calibrate with {option('timesteps', 'uniform')}",
        )
    with torch.inference_mode():
        nothing = torch.zeros(len(blocks), len(timesteps), 0, dtype=torch.float64)
        local: _Local = (nothing, nothing, nothing), []
        if changes:
            local = _local(model, trial, blocks, branches, trajectory, guided)
        predictions, reused, together = _predictions(model, trial, blocks, branches, trajectory, reuse)
    (changed, errors, drifts), prompts = local
    return Measured(timesteps, changed, drifts, errors, predictions, reused, together, torch.tensor(prompts))


_Local = tuple[tuple[Tensor, ...], list[int]]  # changes, errors and drifts [blocks, steps, samples]; prompts of samples


def _local(
    model: Model,
    trial: nn.Module,
    blocks: Sequence[str],
    branches: Sequence[Sequence[nn.Module]],
    trajectory: Trajectory,
    guided: bool,
) -> _Local:
    watch = _Watch([each[-1] for each in branches])
    handles = [
        trial.get_submodule(name).register_forward_hook(watch.hook(index), with_kwargs=True)
        for index, name in enumerate(blocks)
    ]
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    prompts: list[int] = []
    try:
        with Progress("changes of blocks", len(trajectory.paths)) as progress:
            for shard in range(len(trajectory.paths)):
                watch.begin()
                for step in trajectory.steps(shard, once=True):
                    model.family.call(trial, step.inputs)
                    watch.step()
                for kept, values in zip(parts, watch.taken(), strict=True):
                    kept.append(values)
                batch = parts[0][-1].shape[2]
                count, first = batch // (2 if guided else 1), max(prompts, default=-1) + 1
                prompts += [first + sample % count for sample in range(batch)]
                progress.advance()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(torch.cat(each, dim=2) for each in parts), prompts


class _Watch:
    """Runs the cheap branch of every block beside it, on what the block is given."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        self.branches = branches
        self.begin()

    def begin(self) -> None:
        self._steps: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        self._now: list[tuple[Tensor, Tensor, Tensor]] = []
        self._deltas: dict[int, Tensor] = {}

    def hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            delta = out - states
            got = self.branches[index](*args, **kwargs)
            drift = torch.full((len(states),), torch.inf, device=states.device)
            if index in self._deltas:
                drift = _size(delta - self._deltas[index]) / _size(self._deltas[index])
            self._deltas[index] = delta
            self._now.append((_size(delta) / _size(states), _size(got - out) / _size(out), drift))

        return watch

    def step(self) -> None:
        self._steps.append(self._now)
        self._now = []

    def taken(self) -> list[Tensor]:
        """Return changes, errors and drifts ``[blocks, steps, samples]``."""
        return [
            torch.stack([torch.stack([block[kind] for block in step]) for step in self._steps], dim=1).cpu()
            for kind in range(3)
        ]


def _size(x: Tensor) -> Tensor:
    return x.abs().flatten(1).double().sum(dim=1)


def _predictions(
    model: Model,
    trial: nn.Module,
    blocks: Sequence[str],
    branches: Sequence[Sequence[nn.Module]],
    trajectory: Trajectory,
    reuse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors of the prediction by branch, of reuse, and of noise in all blocks. One call for every timestep,
    from one shard after the other.
    """
    shards = len(trajectory.paths)
    pairs: dict[int, tuple[Step | None, Step]] = {}
    for shard in range(shards):
        before = None
        for place, step in enumerate(trajectory.steps(shard, once=True)):
            if place % shards == shard:
                pairs[place] = before, step
            before = step
    found = torch.zeros(len(blocks), len(pairs), max(len(each) for each in branches), dtype=torch.float64)
    reused = torch.full((len(blocks), len(pairs)), torch.inf, dtype=torch.float64)
    together = torch.zeros(len(pairs), dtype=torch.float64)
    with Progress("errors of blocks", len(pairs)) as progress:
        for place, (before, step) in sorted(pairs.items()):
            reference, outputs = _watched(model, trial, blocks, step, lambda states, out: out)
            kept = None if before is None or not reuse else _deltas(model, trial, blocks, before)
            float_blocks: list[nn.Module] = []
            for index, name in enumerate(blocks):
                block = trial.get_submodule(name)

                def error(module: nn.Module) -> float:
                    trial.set_submodule(name, module)  # noqa: B023
                    got = model.family.call(trial, step.inputs).double() - reference  # noqa: B023
                    return float(got.square().sum() / reference.square().sum())  # noqa: B023

                for branch, module in enumerate(branches[index]):
                    found[index, place, branch] = error(module)
                if kept is not None:
                    reused[index, place] = error(_Adds(kept[index]))
                # The blocks before the next one have said what they say: computing them again would double the time.
                trial.set_submodule(name, _Returns(outputs[index]))
                float_blocks.append(block)
            for name, block in zip(blocks, float_blocks, strict=True):
                trial.set_submodule(name, block)
            together[place] = _together(model, trial, blocks, step, reference)
            progress.advance()
    return found, reused, together


def _together(model: Model, trial: nn.Module, blocks: Sequence[str], step: Step, reference: Tensor) -> float:
    """Return the error of the prediction when all blocks err a little."""
    before = [trial.get_submodule(name) for name in blocks]
    for index, (name, module) in enumerate(zip(blocks, before, strict=True)):
        trial.set_submodule(name, _Errs(module, index))
    error = model.family.call(trial, step.inputs).double() - reference
    for name, module in zip(blocks, before, strict=True):
        trial.set_submodule(name, module)
    return float(error.square().sum() / reference.square().sum())


class _Errs(nn.Module):
    """A block with noise, as a :class:`qdiff.routing.blocks.BranchedBlock` has it."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        self.block, self.index = block, index

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block with the arguments of its own ``forward``."""
        return disturbed(hidden_states, self.block(hidden_states, *args, **kwargs), NOISE, self.index)


class _Adds(nn.Module):
    """A block that adds what it added before."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block with the arguments of its own ``forward``."""
        return hidden_states + self.delta


class _Returns(nn.Module):
    """A block whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block with the arguments of its own ``forward``."""
        return self.output


def _deltas(model: Model, trial: nn.Module, blocks: Sequence[str], step: Step) -> list[Tensor]:
    """Return what every block adds in a call."""
    return _watched(model, trial, blocks, step, lambda states, out: out - states)[1]


def _watched(
    model: Model, trial: nn.Module, blocks: Sequence[str], step: Step, look: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the prediction of a call as float64, and what ``look`` makes of every block's input and output."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        found.append(look(args[0] if args else kwargs["hidden_states"], out))

    handles = [trial.get_submodule(name).register_forward_hook(keep, with_kwargs=True) for name in blocks]
    try:
        return model.family.call(trial, step.inputs).double(), found
    finally:
        for handle in handles:
            handle.remove()
