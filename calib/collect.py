"""Replays the backbone on the recorded trajectory and fills :class:`qdiff.recording.activation_statistics.Statistics`.

Layers that read the very same tensor inside one module (q, k and v of a self-attention; k and v of a cross-attention) form
a *group*: they share the tensor's statistics, and later one scale and one smoothing, because an engine quantizes that
tensor once. Groups are found by watching one forward pass, not from names, so a new family needs no list of them.

A table has one row for each *value* of the timestep; calls that share one are samples of the same row.

Padding of prompts does not count: attention never looks at it, and there is more of it than of text.

After every shard the state is written whole, so a kill loses at most one shard's replay.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calib.first_token import FirstToken
from qdiff.calib.observers import OBSERVERS, Observer, RowSample
from qdiff.errors import IntegrityError, option
from qdiff.events import Progress, log
from qdiff.files import open_tensors, save_tensors
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.nn.conv import layer_channels, sample_windows, tokens
from qdiff.recording.activation_statistics import InputStatistics, Statistics
from qdiff.recording.trajectory import Step, Trajectory

BeforeHook = Callable[[nn.Module, tuple[Tensor, ...]], None]
AfterHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
PARTIAL = "statistics.partial.safetensors"


def find_groups(model: Model, step: Step) -> dict[str, list[str]]:
    """Return the groups of layers that read the same tensors inside one parent module: all names, by the name of the
    first.

    A layer that the forward calls several times is in one group with those that read all the tensors that it reads, in the same
    order: the statistics of a group are those of its first layer's calls.

    Args:
        model: whose backbone is looked at.
        step: any recorded call; the backbone is run on it once.
    """
    reads: dict[
        str, list[int]
    ] = {}  # numbers of the tensors that each layer reads, layers in the order of their first calls
    alive: dict[str, list[tuple[int, Tensor]]] = {}  # by parent: the tensors that it has seen so far
    count = itertools.count()

    def watch(name: str, parent: str) -> BeforeHook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tensors = alive.setdefault(parent, [])
            number = next((number for number, tensor in tensors if tensor is args[0]), None)
            if number is None:
                number = next(count)
                tensors.append((number, args[0]))
            reads.setdefault(name, []).append(number)

        return hook

    def forget(parent: str) -> AfterHook:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            alive.pop(parent, None)  # keeping every tensor would keep the activations of the whole forward

        return hook

    parents = {name: name.rpartition(".")[0] for name in quantizable_layers(model.backbone)}
    before = {name: watch(name, parent) for name, parent in parents.items()}
    with _hooks(model.backbone, before), contextlib.ExitStack() as stack, torch.inference_mode():
        for parent in set(parents.values()):
            owner = _module_with_forward(model.backbone, parent)
            stack.callback(owner.register_forward_hook(forget(parent)).remove)
        model.family.call(model.backbone, step.inputs)
    firsts: dict[tuple[str, tuple[int, ...]], str] = {}
    groups: dict[str, list[str]] = {}
    for name, numbers in reads.items():
        first = firsts.setdefault((parents[name], tuple(numbers)), name)
        groups.setdefault(first, []).append(name)
    return groups


def _module_with_forward(backbone: nn.Module, name: str) -> nn.Module:
    """Return the module of that name, or the nearest one around it that is called (lists and dicts of modules are
    not).
    """
    module = backbone.get_submodule(name)
    while isinstance(module, nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
        module = backbone.get_submodule(name)
    return module


@contextlib.contextmanager
def _hooks(
    backbone: nn.Module, inputs: Mapping[str, BeforeHook], outputs: Mapping[str, AfterHook] | None = None
) -> Iterator[None]:
    """Register hooks by layer name, before and after its forward, for the length of a block."""
    layers = dict(backbone.named_modules())
    handles = [layers[name].register_forward_pre_hook(hook) for name, hook in inputs.items()]
    handles += [layers[name].register_forward_hook(hook) for name, hook in (outputs or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Collector:
    """Observers on the first layer of every group; see the module's docstring."""

    def __init__(self, model: Model, trajectory: Trajectory, fingerprint: str) -> None:
        self.model, self.trajectory, self.fingerprint = model, trajectory, fingerprint
        values = {step.timestep for step in trajectory}
        self.timesteps = sorted(values, reverse=True)  # samplers go from noise to picture
        self.groups = find_groups(model, next(iter(trajectory)))
        layers = quantizable_layers(model.backbone)
        reached = {name for names in self.groups.values() for name in names}
        for name in layers.keys() - reached:
            log.warning("collect: the pipeline never reached layer %s: it will be kept in 16 bit", name)
        device = model.device
        self.outputs = {name: torch.zeros(len(self.timesteps), device=device) for name in layers}
        self.layers = layers
        self.observers: dict[str, dict[str, Observer]] = {
            group: {
                name: OBSERVERS[name](len(self.timesteps), layer_channels(layers[group]), device) for name in OBSERVERS
            }
            for group in self.groups
        }
        constant = set(model.family.first_token_layers(model.backbone))
        self.firsts = {
            group: FirstToken(layer_channels(layers[group]), device)
            for group, names in self.groups.items()
            if constant.issuperset(names)
        }

    def collect(self, partial: Path) -> Statistics:
        """Replay all shards that ``partial`` does not hold yet and return the statistics."""
        done = self._restore(partial)
        steps = [sum(1 for _ in self.trajectory.steps(shard)) for shard in range(len(self.trajectory.paths))]
        with Progress("collect", sum(steps[done:])) as progress:
            for shard in range(done, len(steps)):
                for step in self.trajectory.steps(shard):
                    self._replay(step)
                    progress.advance()
                self._save(partial, shard + 1)
        inputs = {}
        for group, observers in self.observers.items():
            tables: dict[str, Any] = {}
            for observer in observers.values():
                tables |= observer.result()
            inputs[group] = InputStatistics(self.groups[group], **tables)
            if group in self.firsts:
                inputs[group] = self.firsts[group].into(inputs[group])
        return Statistics(self.timesteps, inputs, self.outputs)

    def _replay(self, step: Step) -> None:
        index = self.timesteps.index(step.timestep)
        generator = torch.Generator().manual_seed(step.shard * 100_003 + index + step.repeat * 1_000_000_007)
        read = self.model.family.read_by(self.model.backbone, step.inputs)

        def watch_input(group: str, observers: dict[str, Observer]) -> BeforeHook:
            layer, first = self.layers[group], self.firsts.get(group)

            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen = args[0].detach().float()
                if first is not None:
                    seen = first.take(seen)
                x = tokens(layer, seen, read.get(group))
                for observer in observers.values():
                    if isinstance(layer, nn.Conv2d) and isinstance(observer, RowSample):
                        columns = layer.weight[0].numel()
                        windows = sample_windows(layer, seen, RowSample.count(columns), generator)
                        observer.update(windows, index, generator)
                    else:
                        observer.update(x, index, generator)

            return hook

        def watch_output(name: str, table: Tensor) -> AfterHook:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen = output.detach()[read[name]] if name in read else output.detach()
                table[index] = torch.maximum(table[index], seen.abs().max().float())

            return hook

        inputs = {group: watch_input(group, observers) for group, observers in self.observers.items()}
        outputs = {name: watch_output(name, table) for name, table in self.outputs.items()}
        with _hooks(self.model.backbone, inputs, outputs), torch.no_grad():
            self.model.family.call(self.model.backbone, step.inputs)

    def _save(self, partial: Path, shards: int) -> None:
        tensors = {
            f"{group}|{name}": tensor
            for group, observers in self.observers.items()
            for observer in observers.values()
            for name, tensor in observer.state().items()
        }
        tensors |= {f"{name}|output": table for name, table in self.outputs.items()}
        tensors |= {f"{group}|first": first.state() for group, first in self.firsts.items()}
        save_tensors(partial, tensors, {"qdiff": json.dumps({"shards": shards, "fingerprint": self.fingerprint})})

    def _restore(self, partial: Path) -> int:
        if not partial.exists():
            return 0
        with open_tensors(partial, "partial statistics") as file:
            header = json.loads((file.metadata() or {}).get("qdiff", "{}"))
            if header.get("fingerprint") != self.fingerprint:
                raise IntegrityError(
                    f"{partial} belongs to another calibration",
                    f"calibrate with {option('force', True)} or into another folder",
                )
            device = self.model.device
            state: dict[str, dict[str, Tensor]] = {group: {} for group in self.groups}
            for key in file.keys():
                group, _, name = key.rpartition("|")
                if name == "output":
                    self.outputs[group] = file.get_tensor(key).to(device)
                elif name == "first":
                    self.firsts[group].restore(file.get_tensor(key).to(device))
                else:
                    state[group][name] = file.get_tensor(key).to(device)
        for group, observers in self.observers.items():
            for observer in observers.values():
                observer.restore(state[group])
        return int(header["shards"])
