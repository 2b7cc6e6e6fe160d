"""What every group of layers costs in quality, in every format, at every timestep: measured, one group at a time.

For group ``g`` in format ``f`` on recorded call ``k`` the layers of ``g`` alone are put into the float model and

    e[g, f, k] = |F_gf(x_k) - F(x_k)|^2 / |F(x_k)|^2

is the change of what the backbone predicts. Calls are spread evenly over the timesteps. Where a backbone is too large to be
called for every group and format (``calls = 0``), ``outputs`` below stands in for it: an estimate of the same quantity.

With ``probes`` the same is done to whole pictures, by two measures (MixDQ, arXiv 2405.17873, section 3.2): their squared error,
which noise raises and which is called quality there, and their loss of structure, ``1 - SSIM``, for content. Both are of 8-bit
pictures, so a change of less than half a level counts for more than it is.

Beside the truth stand proxies that need no pass for every group:

- ``layer``: the error of the group's own outputs, relative to them, on calibration tokens: what methods minimise.
- ``hessian``: ``tr(H_W) / n |Q(W) - W|^2``, HAWQ's (arXiv 1911.03852, eq. 2) with the Gauss-Newton Hessian of the prediction's
  squared error, whose trace Hutchinson's estimator gives: the squared gradient of ``v . F(x)`` for normal ``v``.
- ``outputs``: the same at the layers' outputs, with the output's whole error: sees activations too.
- ``relevance``: ``sum |W * d(v . F)/dW|`` times the grid's error ``2^(-2 bits)``: a first-order relevance by format.
- ``baq``: ``c 2^(-2 bits)`` with ``c = tr(H_W) var(W)``, the loss behind BAQ's closed form (arXiv 2506.05664).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.allocation.candidates import FLOAT, Candidates
from qdiff.events import Progress
from qdiff.files import write_json
from qdiff.formats.table import FORMATS
from qdiff.models.model import Model
from qdiff.nn import ops
from qdiff.nn.quant_linear import QuantLinear
from qdiff.parallel import run_all, workers_for
from qdiff.recording.trajectory import Step, Trajectory
from qdiff.runs.partial import Scratch

PROXIES = ("layer", "hessian", "outputs", "relevance", "baq")
ESTIMATE = "outputs"  # of the proxies, the one on the scale of the truth
PROBES = 4  # calls with a random direction each, for the proxies
CONTENT = (
    "*.attn2.*",
    "*.ff.*",
    "*.ffn.*",
)  # layers that decide what a picture shows, where the others decide how well (MixDQ)

PictureErrors = Callable[
    [], tuple[float, float]
]  # squared error and loss of structure of pictures that a backbone makes now


@dataclass
class Sensitivity:
    """The table, as JSON values.

    Args:
        groups: names, with the layers of each.
        formats: names of the recipes.
        timesteps: of the calls.
        errors: ``[group][format][call]``; ``None`` where a group cannot have a format; empty where they are estimated.
        tokens: rows that each group's output has in one sample's call.
        shapes: of one sample of each group's input.
        proxies: by name ``[group][format]``.
        pictures: ``pictures`` and ``structure``, ``[group][format]`` each; empty where none were made.
    """

    groups: dict[str, list[str]]
    formats: list[str]
    timesteps: list[float]
    errors: list[list[list[float] | None]]
    tokens: list[int]
    shapes: list[list[int]]
    proxies: dict[str, list[list[float | None]]]
    pictures: dict[str, list[list[float | None]]] = field(default_factory=dict)

    def tables(self) -> dict[str, Tensor]:
        """Return errors ``[group, format]`` by what they are errors of, float64, each a reason of its own to choose by.

        Of predictions: ``estimated`` where they were not measured, else ``even``, all timesteps alike, and ``late`` and ``early``
        with four times as much weight at one end as at the other. Of pictures, where they were made: ``pictures``,
        ``structure``, and ``apart``, in which layers of :data:`CONTENT` count by structure and the others by the prediction.
        Both are put on one scale by their sums; thrice and a third of that stand for MixDQ's sweep over how much of the budget
        each kind gets.
        """
        rising = torch.linspace(1, 4, len(self.timesteps), dtype=torch.float64)
        prediction = self.table()
        if self.errors:
            found = {"even": prediction, "late": self.table(rising), "early": self.table(rising.flip(0))}
        else:
            found = {"estimated": prediction}
        if self.pictures:
            found |= {name: _whole(rows) for name, rows in self.pictures.items()}
            content = torch.tensor([_is_content(layers) for layers in self.groups.values()])
            structure = found["structure"]
            sums = [float(table[table.isfinite()].sum()) for table in (prediction, structure)]
            for name, factor in (("apart", 1.0), ("apart, more content", 3.0), ("apart, more quality", 1 / 3)):
                scaled = structure * (factor * sums[0] / max(sums[1], 1e-300))
                found[name] = torch.where(content[:, None], scaled, prediction)
        return found

    def table(self, weights: Tensor | None = None) -> Tensor:
        """Return errors ``[group, format]`` over all calls, float64; infinite where a format is not to be had.

        Args:
            weights: of the calls ``[K]``; ``None``: all the same.
        """
        if not self.errors:
            return _whole(self.proxies[ESTIMATE])
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
        """Return Spearman's correlation of each proxy with the truth, over all groups and formats that have an error;
        ``None`` where there is none (too few values, or all alike). The truth is the error of pictures where they were
        made, and the change of the prediction is then one of the proxies, like the loss of structure.
        """
        from scipy.stats import spearmanr

        tables = {name: _whole(rows) for name, rows in self.proxies.items()}
        truth = self.table().flatten()
        if not self.errors and not self.pictures:
            return {}
        if self.pictures:
            tables |= {"prediction": self.table(), "structure": _whole(self.pictures["structure"])}
            truth = _whole(self.pictures["pictures"]).flatten()
        found: dict[str, float | None] = {}
        for name, table in tables.items():
            values = table.flatten()
            both = truth.isfinite() & values.isfinite() & (truth > 0)
            ranked = int(both.sum()) > 2 and len(values[both].unique()) > 1
            value = float(spearmanr(truth[both].numpy(), values[both].numpy()).statistic) if ranked else math.nan
            found[name] = value if math.isfinite(value) else None
        return found

    def save(self, path: Path) -> None:
        """Write ``sensitivity.json``."""
        write_json(path, {**asdict(self), "rank_correlations": self.rank_correlations()})


def measure_sensitivity(
    model: Model,
    candidates: Candidates,
    trajectory: Trajectory,
    calls: int,
    scratch: Scratch,
    picture_errors: PictureErrors | None = None,
) -> Sensitivity:
    """Put every group into every format, one at a time, and call the backbone, several groups side by side
    (:mod:`qdiff.parallel`).

    Args:
        model: float; its backbone is not changed.
        candidates: the formats that every group can have.
        trajectory: the recorded calls.
        calls: how many recorded calls are looked at; 0: errors are estimated.
        scratch: where finished groups are kept, so that a killed measurement goes on with the next.
        picture_errors: compares the pictures that the candidates' backbone makes with the float model's.
    """
    steps = spread(trajectory, calls or PROBES)
    with torch.inference_mode():
        sizes = _sizes(model, candidates, steps[0])
    proxies = proxies_of(model, candidates, steps)
    steps = steps if calls else []
    with torch.inference_mode():
        reference = [model.family.call(model.backbone, step.inputs).float() for step in steps]
    groups = list(candidates.groups) if calls or picture_errors else []

    def rows_of(index: int) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"errors": [], "pictures": [], "structure": []}
        for format, possible in enumerate(candidates.possible(groups[index])):
            errors: list[float] | None = None
            changes: tuple[float | None, float | None] = (None, None)
            if possible:
                candidates.put(groups[index], format)
                with torch.inference_mode():
                    pairs = zip(steps, reference, strict=True)
                    errors = [_error(model, candidates.backbone, step, goal) for step, goal in pairs]
                changes = picture_errors() if picture_errors is not None else changes
            for name, value in zip(made, (errors, *changes), strict=True):
                made[name].append(value)
        candidates.put(groups[index], FLOAT)
        return made

    def part(index: int) -> str:
        return f"group-{index:05d}"

    left = [index for index in range(len(groups)) if scratch.load(part(index)) is None]
    with Progress("sensitivity", len(groups)) as progress:
        progress.advance(len(groups) - len(left))
        run_all(
            left,
            lambda index: scratch.save(part(index), {}, rows_of(index)),
            workers_for(len(left)),
            progress.advance,
            lambda index: f"the layers {', '.join(candidates.groups[groups[index]][:3])}",
        )
    found = [_facts(scratch, part(index)) for index in range(len(groups))]
    return Sensitivity(
        groups=dict(candidates.groups),
        formats=candidates.names,
        timesteps=[step.timestep for step in steps],
        errors=[rows["errors"] for rows in found] if calls else [],
        tokens=[size[0] for size in sizes],
        shapes=[size[1] for size in sizes],
        proxies=proxies,
        pictures={}
        if picture_errors is None
        else {name: [rows[name] for rows in found] for name in ("pictures", "structure")},
    )


def _facts(scratch: Scratch, part: str) -> dict[str, list[Any]]:
    kept = scratch.load(part)
    assert kept is not None, f"{part} was saved"
    facts: dict[str, list[Any]] = kept[1]
    return facts


def _whole(rows: list[list[float | None]]) -> Tensor:
    """Return a table ``[group, format]``, float64; infinite where there is no value."""
    return torch.tensor([[math.inf if value is None else value for value in row] for row in rows], dtype=torch.float64)


def _is_content(layers: list[str]) -> bool:
    return all(any(fnmatch.fnmatch(layer, pattern) for pattern in CONTENT) for layer in layers)


def spread(trajectory: Trajectory, calls: int) -> list[Step]:
    """Return ``calls`` recorded calls, evenly over the timesteps and over the shards; all of them when there are no
    more.
    """
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


def _sizes(model: Model, candidates: Candidates, step: Step) -> list[tuple[int, list[int]]]:
    """Return rows of each group's output and shape of its input in one call, for one sample of the batch."""
    found: dict[str, tuple[int, list[int]]] = {}
    batch = len(step.inputs["timestep"])

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            width = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            found[name] = output.numel() // width // batch, list(inputs[0].shape[1:])

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
    return [found.get(group, (1, [])) for group in candidates.groups]


def proxies_of(model: Model, candidates: Candidates, steps: list[Step]) -> dict[str, list[list[float | None]]]:
    """Return the proxies of the module's docstring, ``[group][format]`` each; ``None`` where a group cannot have a
    format.
    """
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
                noise = torch.randn(prediction.shape, generator=generator).to(prediction.device)
                prediction.backward(noise / prediction.norm())
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
        self.calls = 0

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        self.calls += 1
        self.energy += float(output.detach().double().square().mean())
        output.register_hook(self._output)

    def _output(self, gradient: Tensor) -> None:
        self.output += float(gradient.double().square().sum())

    def take(self, weight: Tensor) -> None:
        """Use the gradient of ``weight`` as soon as it is there, and free it: those of all layers would be as large as
        a second model.
        """
        assert weight.grad is not None
        self.weight += float(weight.grad.double().square().sum())
        self.relevance += float((weight.grad * weight.detach()).double().abs().sum())
        weight.grad = None


def _proxies(
    candidates: Candidates, format: int, names: list[str], found: dict[str, _Gradients]
) -> dict[str, float | None]:
    """Return all proxies of one group in one format: sums over its layers."""
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
        sums["outputs"] += gradients.output * relative * gradients.energy / max(gradients.calls, 1) ** 2
        sums["relevance"] += gradients.relevance * 2.0 ** (-2 * bits)
        sums["baq"] += gradients.weight * float(weight.double().var()) * 2.0 ** (-2 * bits)
    return {proxy: None if math.isnan(value) else value for proxy, value in sums.items()}


def _weight_error(module: nn.Module, weight: Tensor) -> float | None:
    """Return ``|Q(W) - W|^2`` in the coordinates of the float weight; ``None`` where a rotation or a branch hides
    them.
    """
    if not isinstance(module, QuantLinear):
        quantized: Tensor = module.weight.detach().flatten(1)  # type: ignore[operator]
    elif module.rotation is not None or module.down is not None:
        return None
    else:
        quantized = ops.dequantize_weight(
            module.codes, module.scale, module.tensor_scale, module.config.weights, torch.float32
        )
        if module.input_multiplier is not None:
            quantized = quantized * module.input_multiplier.repeat_interleave(
                weight.shape[1] // len(module.input_multiplier)
            )
    return float((quantized - weight).double().square().sum())
