"""What every group of layers costs in quality, in every format, at every timestep: measured, one group at a time.

For group ``g`` in format ``f`` on recorded call ``k`` the layers of ``g`` alone are put into the float model and

    e[g, f, k] = |F_gf(x_k) - F(x_k)|^2 / |F(x_k)|^2

is the change of what the backbone predicts (MixDQ, section 3.2, measures pictures instead; those are made for whole plans here).
Calls are spread evenly over the timesteps. Beside the truth stand proxies that need no pass for every group:

- ``layer``: the error of the group's own outputs, relative to them, on calibration tokens: what methods minimise.
- ``hessian``: ``tr(H_W) / n |Q(W) - W|^2``, HAWQ's (arXiv 1911.03852, eq. 2) with the Gauss-Newton Hessian of the prediction's
  squared error, whose trace Hutchinson's estimator gives: the squared gradient of ``v . F(x)`` for normal ``v``.
- ``outputs``: the same at the layers' outputs, with the output's whole error: sees activations too.
- ``relevance``: ``sum |W * d(v . F)/dW|`` times the grid's error ``2^(-2 bits)``: a first-order relevance by format.
- ``baq``: ``c 2^(-2 bits)`` with ``c = tr(H_W) var(W)``, the loss behind BAQ's closed form (arXiv 2506.05664).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff import ops
from qdiff.candidates import FLOAT, Candidates
from qdiff.events import Progress
from qdiff.files import write_json
from qdiff.formats import FORMATS
from qdiff.layers import QuantLinear
from qdiff.models.base import Model
from qdiff.scratch import Scratch
from qdiff.trajectory import Step, Trajectory

PROXIES = ("layer", "hessian", "outputs", "relevance", "baq")
PROBES = 4  # calls with a random direction each, for the proxies


@dataclass
class Sensitivity:
    """The table, as JSON values.

    Args:
        groups: names, with the layers of each.
        formats: names of the recipes.
        timesteps: of the calls.
        errors: ``[group][format][call]``; ``None`` where a group cannot have a format.
        tokens: rows that each group's input has in one sample's call.
        proxies: by name ``[group][format]``.
    """

    groups: dict[str, list[str]]
    formats: list[str]
    timesteps: list[float]
    errors: list[list[list[float] | None]]
    tokens: list[int]
    proxies: dict[str, list[list[float | None]]]

    def table(self, weights: Tensor | None = None) -> Tensor:
        """Errors ``[group, format]`` over all calls, float64; infinite where a format is not to be had.

        Args:
            weights: of the calls ``[K]``; ``None``: all the same.
        """
        calls = len(self.timesteps)
        by_call = torch.full((len(self.groups), len(self.formats), calls), math.inf, dtype=torch.float64)
        for group, formats in enumerate(self.errors):
            for format, found in enumerate(formats):
                if found is not None:
                    by_call[group, format] = torch.tensor(found, dtype=torch.float64)
        if weights is None:
            return by_call.mean(dim=2)
        return (by_call * (weights.double() / weights.double().sum())).sum(dim=2)

    def rank_correlations(self) -> dict[str, float | None]:
        """Spearman's correlation of each proxy with the truth, over all groups and formats that have an error; ``None`` where
        there is none (too few values, or all alike)."""
        from scipy.stats import spearmanr

        truth = self.table().flatten()
        found: dict[str, float | None] = {}
        for name, rows in self.proxies.items():
            values = torch.tensor([math.nan if v is None else v for row in rows for v in row], dtype=torch.float64)
            both = truth.isfinite() & values.isfinite() & (truth > 0)
            ranked = int(both.sum()) > 2 and len(values[both].unique()) > 1
            value = float(spearmanr(truth[both].numpy(), values[both].numpy()).statistic) if ranked else math.nan
            found[name] = value if math.isfinite(value) else None
        return found

    def save(self, path: Path) -> None:
        """Writes ``sensitivity.json``."""
        write_json(path, {**asdict(self), "rank_correlations": self.rank_correlations()})


def measure(
    model: Model, candidates: Candidates, trajectory: Trajectory, calls: int, scratch: Scratch | None
) -> Sensitivity:
    """Puts every group into every format, one at a time, and calls the backbone.

    Args:
        model: float; its backbone is not changed.
        calls: how many recorded calls are looked at.
        scratch: where finished groups are kept, so that a killed measurement goes on with the next.
    """
    steps = spread(trajectory, calls)
    backbone = candidates.backbone
    with torch.inference_mode():
        reference = [model.family.call(model.backbone, step.inputs).float() for step in steps]
        tokens = _tokens(model, candidates, steps[0])
    proxies = proxies_of(model, candidates, steps)
    errors: list[list[list[float] | None]] = []
    with Progress("sensitivity", len(candidates.groups)) as progress:
        for index, group in enumerate(candidates.groups):
            part = f"group-{index:05d}"
            kept = None if scratch is None else scratch.load(part)
            if kept is not None:
                rows = kept[1]
            else:
                rows = []
                for format, possible in enumerate(candidates.possible(group)):
                    if not possible:
                        rows.append(None)
                        continue
                    candidates.put(group, format)
                    with torch.inference_mode():
                        rows.append(
                            [_error(model, backbone, step, goal) for step, goal in zip(steps, reference, strict=True)]
                        )
                candidates.put(group, FLOAT)
                if scratch is not None:
                    scratch.save(part, {}, rows)
            errors.append(rows)
            progress.advance()
    return Sensitivity(
        dict(candidates.groups), candidates.names, [step.timestep for step in steps], errors, tokens, proxies
    )


def spread(trajectory: Trajectory, calls: int) -> list[Step]:
    """``calls`` recorded calls, evenly over the timesteps and over the shards; all of them when there are no more."""
    shards = len(trajectory.paths)
    count = sum(1 for _ in trajectory.steps(0))
    wanted: dict[int, set[int]] = {}
    for index in range(min(calls, shards * count)):
        place = index * count // calls if calls < count else index % count
        shard = (index // count + index % count) % shards  # a round through the timesteps, then the next shard for each
        wanted.setdefault(shard, set()).add(place)
    found = [
        step for shard in sorted(wanted) for place, step in enumerate(trajectory.steps(shard)) if place in wanted[shard]
    ]
    return sorted(found, key=lambda step: (-step.timestep, step.shard))


def _error(model: Model, backbone: nn.Module, step: Step, reference: Tensor) -> float:
    got = model.family.call(backbone, step.inputs).float()
    return float((got - reference).double().square().sum() / reference.double().square().sum())


def _tokens(model: Model, candidates: Candidates, step: Step) -> list[int]:
    """Rows of each group's input in one call, for one sample of the batch."""
    rows: dict[str, int] = {}
    batch = len(next(iter(step.inputs.values())))

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            width = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            rows[name] = output.numel() // width // batch

        return hook

    first = {group: layers[0] for group, layers in candidates.groups.items()}
    handles = [
        model.backbone.get_submodule(layer).register_forward_hook(watch(group)) for group, layer in first.items()
    ]
    try:
        model.family.call(model.backbone, step.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [rows.get(group, 1) for group in candidates.groups]


def proxies_of(model: Model, candidates: Candidates, steps: list[Step]) -> dict[str, list[list[float | None]]]:
    """The proxies of the module's docstring, ``[group][format]`` each; ``None`` where a group cannot have a format."""
    layers = {name: model.backbone.get_submodule(name) for names in candidates.groups.values() for name in names}
    found = {name: _Gradients() for name in layers}
    handles = [layer.register_forward_hook(found[name].watch) for name, layer in layers.items()]
    flags = {parameter: parameter.requires_grad for parameter in model.backbone.parameters()}
    generator = torch.Generator().manual_seed(0)
    chosen = [steps[round(i * (len(steps) - 1) / max(1, PROBES - 1))] for i in range(min(PROBES, len(steps)))]
    try:
        model.backbone.requires_grad_(False)
        for name, layer in layers.items():
            weight: nn.Parameter = layer.weight  # type: ignore[assignment]
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(found[name].take))
        with Progress("proxies", len(chosen)) as progress:
            for step in chosen:
                prediction = model.family.call(model.backbone, step.inputs)
                prediction.backward(torch.randn(prediction.shape, generator=generator) / prediction.norm())
                progress.advance()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    values = [
        [
            _proxies(candidates, format, names, found) if possible else dict.fromkeys(PROXIES)
            for format, possible in enumerate(candidates.possible(group))
        ]
        for group, names in candidates.groups.items()
    ]
    return {proxy: [[each[proxy] for each in formats] for formats in values] for proxy in PROXIES}


class _Gradients:
    """Sums over the probes of one layer."""

    def __init__(self) -> None:
        self.weight = self.output = self.relevance = self.energy = 0.0

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        self.energy += float(output.detach().double().square().mean())
        output.register_hook(self._output)

    def _output(self, gradient: Tensor) -> None:
        self.output += float(gradient.double().square().sum())

    def take(self, weight: Tensor) -> None:
        """Called as soon as the gradient is there, which then goes: those of all layers would be a second model."""
        assert weight.grad is not None
        self.weight += float(weight.grad.double().square().sum())
        self.relevance += float((weight.grad * weight.detach()).double().abs().sum())
        weight.grad = None


def _proxies(
    candidates: Candidates, format: int, names: list[str], found: dict[str, _Gradients]
) -> dict[str, float | None]:
    """All proxies of one group in one format: sums over its layers."""
    sums = dict.fromkeys(PROXIES, 0.0)
    for name in names:
        entry, gradients = candidates.entries[format][name], found[name]
        module, float_layer = candidates.module(name, format), candidates.float_layer(name)
        weight: Tensor = float_layer.weight.detach().flatten(1)  # type: ignore[operator]
        bits = FORMATS[entry.weights].bits
        relative = 0.0 if entry.sqnr_db is None else 10 ** (-entry.sqnr_db / 10)
        error = _weight_error(module, weight)
        sums["layer"] += relative / len(names)
        sums["hessian"] += math.nan if error is None else gradients.weight / weight.numel() * error
        sums["outputs"] += gradients.output * relative * gradients.energy
        sums["relevance"] += gradients.relevance * 2.0 ** (-2 * bits)
        sums["baq"] += gradients.weight * float(weight.double().var()) * 2.0 ** (-2 * bits)
    return {proxy: None if math.isnan(value) else value for proxy, value in sums.items()}


def _weight_error(module: nn.Module, weight: Tensor) -> float | None:
    """``|Q(W) - W|^2`` in the coordinates of the float weight; ``None`` where a rotation or a branch hides them."""
    if not isinstance(module, QuantLinear):
        quantized: Tensor = module.weight.detach().flatten(1)  # type: ignore[operator]
    elif module.rotation is not None or module.down is not None:
        return None
    else:
        quantized = ops.dequantize_weight(
            module.codes, module.scale, module.tensor_scale, module.form.weights, torch.float32
        )
        if module.multiplier is not None:
            quantized = quantized * module.multiplier.repeat_interleave(weight.shape[1] // len(module.multiplier))
    return float((quantized - weight).double().square().sum())
