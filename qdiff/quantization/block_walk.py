"""Block by block along the quantized prefix: what the layers of a block really read once the blocks before it are quantized.

Methods that choose codes for given inputs (GPTQ, AdaRound) should see the inputs that the deployed model will have, with the
errors of everything before, so that each block makes up for them. The recorded calls are replayed once up to the first
block; from there one block at a time is run on the states that the quantized blocks before it produced, and only those
states (one tensor a call) and one block's tokens are held. Never the activations of the whole model.

A family names its blocks (``Family.blocks``) in the order in which they are called; every block takes the hidden states as its
first argument and returns them. In a DiT that is a chain: what a block returns is all that the next one reads, so its states are
moved along (:class:`BlockWalk`). In a U-Net a block reads skip connections and what lies between blocks too, so the recorded
calls are replayed up to every block anew (:class:`ReplayWalk`): half a forward for each block and call, and the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.models.model import Model
from qdiff.nn.conv import sample_windows
from qdiff.nn.conv import tokens as tokens_of
from qdiff.nn.quant_linear import TimestepIndex
from qdiff.recording.activation_statistics import InputStatistics
from qdiff.recording.trajectory import Step

LEAST_TOKENS = 16  # of a sample, for their mean to be of use: its two rows are then at most an eighth of the product


class _Stop(Exception):
    """Leaves the backbone at its first block."""


@dataclass
class Call:
    """One recorded call at the door of a block: the hidden states, what else blocks are given, the timestep's index and value,
    the shard (its prompts), and which tokens of a layer's input count where not all do.
    """

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timestep: int
    number: int
    value: float
    shard: int
    read: dict[str, Tensor]


class BlockWalk:
    """The recorded calls on their way through the blocks.

    Args:
        model: its backbone is replaced layer by layer by the caller while the walk goes on.
        timestep_index: of the backbone's quantized layers; blocks are called without the backbone that would set it.
        steps: recorded calls.
        timesteps: the calibrated values, as in the statistics.
        tokens: about how many tokens of each tensor to keep for fitting and judging, over all calls.
        backbone: in place of the model's.

    Raises:
        InputError: the family has no list of blocks, or there is no call.
    """

    def __init__(
        self,
        model: Model,
        timestep_index: TimestepIndex,
        steps: Iterable[Step],
        timesteps: list[float],
        tokens: int,
        backbone: nn.Module | None = None,
    ) -> None:
        self.family, self.backbone = model.family, model.backbone if backbone is None else backbone
        self.timestep_index, self.timesteps = timestep_index, torch.tensor(timesteps, device=model.device)
        self.blocks = self.family.blocks(self.backbone)
        if not self.blocks:
            raise InputError(
                f"{model.family.title} has no list of blocks to walk through", "leave `sequential` out of the recipe"
            )
        self.tokens = tokens
        self.calls = self._calls(steps, timesteps)
        if not self.calls:
            raise InputError("no recorded call to walk with", "calibrate with more prompts or steps")

    def _calls(self, steps: Iterable[Step], timesteps: list[float]) -> list[Call]:
        return [
            self._call(*self._door(self.blocks[0], step), timesteps.index(step.timestep), number, step)
            for number, step in enumerate(steps)
        ]

    def _call(
        self, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], timestep: int, number: int, step: Step
    ) -> Call:
        read = self.family.read_by(self.backbone, step.inputs)
        return Call(states, args, kwargs, timestep, number, step.timestep, step.shard, read)

    def _door(self, block: str, step: Step) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return states and other arguments that the block is called with when the recorded call is replayed up to
        it.
        """
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, *rest = args if args else (kwargs.pop("hidden_states"),)
            seen.append((states, tuple(rest), kwargs))
            raise _Stop

        handle = self.backbone.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Stop):
                self.family.call(self.backbone, step.inputs)
        finally:
            handle.remove()
        return seen[0]

    def enter(self, block: str) -> None:
        """Bring every call to the door of the block. Here they are there already."""

    def leave(self, block: str) -> None:
        """Go on to the next block; this one is as it will be."""
        self.advance(block)

    def observe(
        self, block: str, statistics: dict[str, InputStatistics], without: Collection[int] = ()
    ) -> dict[str, InputStatistics]:
        """Return statistics of the block's groups on the present states: other tokens, and ranges at least as wide as
        before.

        Args:
            block: name of the block, whose layers are still float.
            statistics: of the float model, by group.
            without: numbers of calls whose tokens are not kept, because something is to be judged on them; their ranges count.
        """
        self.enter(block)
        rows_per_call = max(2, -(-self.tokens // max(1, len(self.calls) - len(without))))
        groups = {name: entry for name, entry in statistics.items() if name.startswith(f"{block}.")}
        rows: dict[str, list[Tensor]] = {name: [] for name in groups}
        indices: dict[str, list[Tensor]] = {name: [] for name in groups}
        means: dict[str, list[Tensor]] = {name: [] for name in groups}
        samples: dict[str, list[Tensor]] = {name: [] for name in groups}
        low = {name: entry.low.to(self.timesteps.device, copy=True) for name, entry in groups.items()}
        high = {name: entry.high.to(self.timesteps.device, copy=True) for name, entry in groups.items()}
        current: list[Call] = []
        layers = {name: self.backbone.get_submodule(name) for name in groups}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                call, layer, seen = current[0], layers[name], args[0].detach().float()
                x, at = tokens_of(layer, seen, call.read.get(name)), call.timestep
                low[name][at] = torch.minimum(low[name][at], x.amin(dim=0))
                high[name][at] = torch.maximum(high[name][at], x.amax(dim=0))
                if call.number in without:
                    return
                generator = torch.Generator().manual_seed(call.number)
                if isinstance(layer, nn.Conv2d):
                    kept = sample_windows(layer, seen, rows_per_call, generator)
                else:
                    chosen = torch.randperm(len(x), generator=generator)[:rows_per_call].to(x.device)
                    kept = x[chosen].clone()
                    if name not in call.read and seen.dim() > 2 and seen.shape[-2] >= LEAST_TOKENS:
                        of, own = (chosen // seen.shape[-2]).unique(return_inverse=True)
                        samples[name].append(own + sum(map(len, means[name])))
                        means[name].append(seen.mean(dim=-2).flatten(0, -2)[of])
                rows[name].append(kept)
                indices[name].append(torch.full((len(kept),), at, device=x.device))

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
        try:
            for call in self.calls:
                current[:] = [call]
                with torch.no_grad():
                    self.run(block, call)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: replace(
                entry,
                low=low[name],
                high=high[name],
                rows=torch.cat(rows[name]),
                rows_timestep=torch.cat(indices[name]),
                means=torch.cat(means[name]) if means[name] else None,
                rows_sample=torch.cat(samples[name]) if means[name] else None,
            )
            for name, entry in groups.items()
        }

    def advance(self, block: str) -> None:
        """Move every call through the block as it is now."""
        for call in self.calls:
            with torch.no_grad():
                call.states = self.run(block, call)

    def run(self, block: str, call: Call) -> Tensor:
        """Return what the block as it is now makes of a call's states; with gradients where they are on."""
        self.timestep_index.set(self.timesteps.new_tensor([call.value]), self.timesteps)
        result = self.backbone.get_submodule(block)(call.states, *call.args, **call.kwargs)
        return result[0] if isinstance(result, tuple) else result


class ReplayWalk(BlockWalk):
    """The recorded calls at the door of one block after the other, where blocks are no chain: every call is replayed up to it
    through what the backbone is by then.
    """

    def _calls(self, steps: Iterable[Step], timesteps: list[float]) -> list[Call]:
        self._steps = list(steps)
        nothing = torch.zeros(0)
        return [
            self._call(nothing, (), {}, timesteps.index(step.timestep), number, step)
            for number, step in enumerate(self._steps)
        ]

    def enter(self, block: str) -> None:
        for call, step in zip(self.calls, self._steps, strict=True):
            call.states, call.args, call.kwargs = self._door(block, step)

    def advance(self, block: str) -> None:
        """Bring every call behind the block."""
        self.enter(block)
        super().advance(block)

    def leave(self, block: str) -> None:
        """Do nothing: the next block is entered from the beginning."""
