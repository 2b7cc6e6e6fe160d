"""Distillation: the quantized model as a whole, trained for a few passes over the recorded calls to predict what the float model
predicts.

Rounding weights better, layer by layer or block by block, ends where the error of the *activations* begins: with NVFP4 on
both sides that is most of it (docs/log). What is left to gain is that layers learn to make up for each other. So codes and
biases of all quantized layers are trained together, through the quantized graph itself (straight-through where it rounds), on
the recorded calls and against the float model's own predictions: no data and no labels, as in QAD (arXiv 2601.20088) and
EfficientDM (arXiv 2310.03270). Scales, transforms and low-rank branches stay, so the result is a checkpoint like any other.
Attentions that follow block lists do so here as well, and layers learn to make up for what is not read.

- **Loss**: squared error of the prediction, relative to what it was at that timestep before. Late steps have the smallest signal
  and the largest relative error; without the division they would be all that counts. Half of the loss is the same of every
  block's output, against the float model's own on that call: a prediction is a few numbers a token, of which a model learns by
  heart what belongs to the prompts; with all that leads to it, what it learns holds for others too (docs/log).
- **Length**: two passes. Steps on more prompts are worth far more than passes over few: what a model goes on to learn is these
  prompts, and predictions that are nearer to float on them make pictures of others worse (docs/log).
- **Variables** begin at the codes that exist and are in their units: a code changes when its variable has crossed half of a
  step. Nothing of the float weights is needed, so it works on any plan, also on blocks that were restored after a kill.
- **Which layers**: all, or those that the recipe names. With the time embedding's layers alone, quantized with scales by
  timestep, it is the first half of QuEST's selective finetuning (arXiv 2402.03666), under its global loss.
- **Judgement**: on the calls of prompts that were held out (:func:`qdiff.quantization.reconstruction.split`). Where the
  trained model is not nearer to float there, everything stays as it was.

It costs memory: a variable, a gradient and Adam's two moments for each weight, and the float model as the teacher, six times the
float model; with ``rate: 0`` biases alone are trained, which costs next to none, and with ``blocks: 0`` no teacher stays. Killed
runs go on from the last :data:`KEEP_EVERY` steps, to the same bytes.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.events import Progress
from qdiff.formats import elements, scales
from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.base import decibels
from qdiff.methods.learned import LearnedWeight, code_values
from qdiff.models.model import Model
from qdiff.nn.quant_linear import QuantLinear
from qdiff.plan.plan import LayerPlan, Plan
from qdiff.plan.recipe import Distillation, match
from qdiff.quantization.reconstruction import LearnedLinear, codes_of, learned_layer, split
from qdiff.recording.trajectory import Step, Trajectory
from qdiff.runs.partial import Scratch

PART, KEEP_EVERY = "distillation", 50
CALLS_FOR_UNIT = 24  # on which a block's error is called 1 in the loss


class CodeVariable(LearnedWeight):
    """A weight whose codes move when its variable has gone far enough. Args as :class:`LearnedWeight`, whose ``weight`` is the
    quantized one.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        super().__init__(weight, start)
        self.variable = nn.Parameter(code_values(start))

    def forward(self) -> Tensor:
        return (self.variable + (self.values() - self.variable).detach()) * self.scale

    def values(self) -> Tensor:
        return elements.round_to_grid(self.variable.detach(), self.start.format.element)


@dataclass(frozen=True)
class Distilled:
    """What came of it: mean error on held-out calls, relative to the energy of the float predictions, before and after; and the
    layers that were trained.
    """

    before: float
    after: float
    layers: frozenset[str]

    @property
    def better(self) -> bool:
        """Return whether the trained model is nearer to float."""
        return self.after < self.before

    def __str__(self) -> str:
        gain = decibels(self.after, self.before)
        kept = "distillation" if self.better else "distillation not kept"
        return f"{kept}: prediction {decibels(self.before, 1):.2f} dB, {gain:+.2f} on held-out prompts"


def float_predictions(model: Model, trajectory: Iterable[Step]) -> list[Tensor]:
    """Return what the float model predicts on every recorded call: the targets. Call it before a layer is quantized."""
    with torch.no_grad():
        return [model.family.call(model.backbone, step.inputs) for step in trajectory]


class _Outputs:
    """What blocks of a backbone gave in its last forward: ``found``, by name."""

    def __init__(self, backbone: nn.Module, blocks: list[str]) -> None:
        self.found: dict[str, Tensor] = {}
        self._handles = [backbone.get_submodule(name).register_forward_hook(self._keep_of(name)) for name in blocks]

    def _keep_of(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.found[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def remove(self) -> None:
        """Look no more."""
        self.found = {}
        for handle in self._handles:
            handle.remove()


class _Blocks:
    """Errors of the blocks' outputs, of the call that the backbone has just made.

    Args:
        teacher: the float backbone.
        names: of the blocks, in both.
    """

    def __init__(self, model: Model, teacher: nn.Module, names: list[str]) -> None:
        self.model, self.teacher, self.names = model, teacher, names
        self.ours, self.theirs = _Outputs(model.backbone, names), _Outputs(teacher, names)

    def errors(self, step: Step) -> Tensor:
        """Return the error of each block, relative to the energy of the float block's output: ``[blocks]``."""
        with torch.no_grad():
            self.model.family.call(self.teacher, step.inputs)
        pairs = [(self.ours.found[name], self.theirs.found[name]) for name in self.names]
        return torch.stack([(a - b).square().mean() / b.square().mean().clamp(min=1e-30) for a, b in pairs])

    def remove(self) -> None:
        """Leave both models as they were."""
        self.ours.remove()
        self.theirs.remove()


def distil(
    model: Model,
    trajectory: Trajectory,
    targets: list[Tensor],
    how: Distillation,
    scratch: Scratch | None = None,
    teacher: nn.Module | None = None,
) -> Distilled:
    """Train the quantized layers of ``model.backbone`` in place.

    Args:
        model: whose backbone is quantized.
        trajectory: the recorded calls.
        targets: :func:`float_predictions` of the same trajectory.
        how: steps, rates and what is trained.
        scratch: where the state is kept, so that a killed run goes on.
        teacher: the float backbone, of which the blocks' outputs are targets too; ``None``: predictions alone are.
    """
    with torch.enable_grad():  # whatever the caller runs in
        return _Work(model, list(trajectory), targets, how, teacher).run(scratch)


def distilled(plan: Plan, result: Distilled) -> Plan:
    """Return the plan of a model that was trained as a whole. Errors of trained layers, not what they are trained for,
    are left out.
    """

    def entry(layer: LayerPlan) -> LayerPlan:
        if layer.name not in result.layers:
            return layer
        changes: dict[str, object] = {
            "methods": [*layer.methods, "distil"],
            "why": f"{layer.why}; {result}".removeprefix("; "),
        }
        if result.better:
            changes |= {"rounding": "distil", "sqnr_db": None}
        return layer.model_copy(update=changes)

    return plan.model_copy(update={"layers": [entry(layer) for layer in plan.layers]})


class _Work:
    def __init__(
        self, model: Model, steps: list[Step], targets: list[Tensor], how: Distillation, teacher: nn.Module | None
    ) -> None:
        self.model, self.steps, self.targets, self.how = model, steps, targets, how
        self.backbone, self.teacher = model.backbone, teacher
        self.energies = [float(target.square().mean().clamp(min=1e-30)) for target in targets]
        self.fitting, self.held_out = split(steps)
        self.iterations = how.steps(len(self.fitting))
        self.quantized = {n: m for n, m in self.backbone.named_modules() if isinstance(m, QuantLinear)}
        patterns = how.layers.get(model.family.name, [])
        if patterns:
            chosen = match("distil.layers: the", patterns, model.family.name, list(self.quantized))
            self.quantized = {name: layer for name, layer in self.quantized.items() if name in chosen}

    def run(self, scratch: Scratch | None) -> Distilled:
        errors = self._errors(self.held_out)
        before = sum(errors.values()) / len(errors)
        usual = self._by_timestep(errors)
        learned = self._replace_layers()
        variables = [p for layer in learned.values() for p in layer.learned.parameters() if p.requires_grad]
        biases = [layer.bias for layer in learned.values() if isinstance(layer.bias, nn.Parameter)]
        groups = [{"params": variables, "rate": self.how.rate}, {"params": biases, "rate": self.how.bias_rate}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
        with self._blocks() as (blocks, unit):
            self._train(scratch, variables + biases, optimizer, blocks, unit, usual, before)
        self._finish(learned)
        after = self._errors(self.held_out)
        result = Distilled(before, sum(after.values()) / len(after), frozenset(learned))
        if not result.better:
            for name, layer in self.quantized.items():
                self.backbone.set_submodule(name, layer)
        return result

    def _train(
        self,
        scratch: Scratch | None,
        variables: list[nn.Parameter],
        optimizer: torch.optim.Adam,
        blocks: _Blocks | None,
        unit: Tensor,
        usual: dict[float, float],
        before: float,
    ) -> None:
        first = self._restore(scratch, variables, optimizer)
        with Progress("distil", self.iterations) as progress:
            progress.advance(first)
            for iteration in range(first, self.iterations):
                if scratch is not None and iteration % KEEP_EVERY == 0 and iteration > first:
                    self._keep(scratch, variables, optimizer, iteration)
                share = 1 - iteration / self.iterations
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * share
                number = self._call(iteration)
                loss = self._error(number) / usual.get(self.steps[number].timestep, before)
                if blocks is not None:
                    theirs = (blocks.errors(self.steps[number]) / unit).mean()
                    loss = (1 - self.how.blocks) * loss + self.how.blocks * theirs
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.advance()

    @contextlib.contextmanager
    def _blocks(self) -> Iterator[tuple[_Blocks | None, Tensor]]:
        """Yield what tells the blocks' errors where they count, and those errors before, on held-out calls:
        ``[blocks]``. The hooks are removed when the context ends, also after an error.
        """
        names = self.model.family.blocks(self.backbone)
        if self.teacher is None or not self.how.blocks or not names:
            yield None, torch.zeros(0)
            return
        blocks = _Blocks(self.model, self.teacher, names)
        try:
            errors = []
            with torch.no_grad():
                for number in self.held_out[:: -(-len(self.held_out) // CALLS_FOR_UNIT)]:
                    self.model.family.call(self.backbone, self.steps[number].inputs)
                    errors.append(blocks.errors(self.steps[number]))
            yield blocks, torch.stack(errors).mean(dim=0).clamp(min=1e-30)
        finally:
            blocks.remove()

    def _call(self, iteration: int) -> int:
        """Return every call once before any comes again, in an order that the iteration alone decides."""
        epoch, place = divmod(iteration, len(self.fitting))
        generator = torch.Generator().manual_seed(zlib.crc32(f"distil {epoch}".encode()))
        return self.fitting[int(torch.randperm(len(self.fitting), generator=generator)[place])]

    def _error(self, number: int) -> Tensor:
        output = self.model.family.call(self.backbone, self.steps[number].inputs)
        return (output - self.targets[number]).square().mean() / self.energies[number]

    def _errors(self, numbers: list[int]) -> dict[int, float]:
        with torch.no_grad():
            return {number: float(self._error(number)) for number in numbers}

    def _by_timestep(self, errors: dict[int, float]) -> dict[float, float]:
        seen: dict[float, list[float]] = {}
        for number, error in errors.items():
            seen.setdefault(self.steps[number].timestep, []).append(error)
        return {timestep: max(sum(found) / len(found), 1e-30) for timestep, found in seen.items()}

    def _replace_layers(self) -> dict[str, LearnedLinear]:
        learned = {}
        for name, layer in self.quantized.items():
            start = codes_of(layer)
            learned[name] = learned_layer(layer, CodeVariable(start.dequantize(), start), self.how.bias_rate > 0)
            learned[name].learned.requires_grad_(self.how.rate > 0)
            self.backbone.set_submodule(name, learned[name])
        return learned

    def _finish(self, learned: dict[str, LearnedLinear]) -> None:
        """Put layers with the trained codes in the place of those that were trained."""
        for name, layer in learned.items():
            state = {key: value.clone() for key, value in self.quantized[name].state_dict().items()}
            state["codes"] = layer.learned.finished().packed()
            if isinstance(layer.bias, nn.Parameter):
                state["bias"] = scales.to_storage(layer.bias.detach(), layer.config.storage_dtype).float()
            with torch.device("meta"):
                placed = type(self.quantized[name])(layer.config, layer.timestep_index)
            placed.load_state_dict(state, assign=True)
            self.backbone.set_submodule(name, placed)

    def _keep(
        self, scratch: Scratch, variables: list[nn.Parameter], optimizer: torch.optim.Adam, iteration: int
    ) -> None:
        tensors = {f"{i}|value": variable.detach() for i, variable in enumerate(variables)}
        for i, variable in enumerate(variables):
            moments = optimizer.state[variable]
            tensors |= {f"{i}|{name}": value for name, value in moments.items()}
        scratch.save(PART, tensors, {"iteration": iteration})

    def _restore(self, scratch: Scratch | None, variables: list[nn.Parameter], optimizer: torch.optim.Adam) -> int:
        found = None if scratch is None else scratch.load(PART)
        if found is None:
            return 0
        tensors, facts = found
        for i, variable in enumerate(variables):
            variable.data.copy_(tensors[f"{i}|value"])
            mine = {key.partition("|")[2]: value for key, value in tensors.items() if key.startswith(f"{i}|")}
            optimizer.state[variable] = {
                name: value if name == "step" else value.to(variable.device)
                for name, value in mine.items()
                if name != "value"
            }
        return int(facts["iteration"])
