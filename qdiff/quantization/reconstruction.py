"""Learned rounding of one block: its quantized weights together, so that its output comes near to the float block's.

The block is fed what the quantized blocks before it hand over; the target is what the *float* model's block gives for the same
call, on the float prefix ("asym" in Q-Diffusion, arXiv 2302.04304): the block also makes up for errors that came in. The walk of
the float model (a second :class:`qdiff.quantization.block_walk.BlockWalk`) goes beside the quantized one, one block at a
time, so the float block itself need not be kept: its outputs are taken before its layers are replaced.

What is trained is the quantized graph itself: activation quantizers, low-rank branches, multipliers and rotations are those of
the layers, straight-through where they round (:mod:`qdiff.nn.ops`). Only the weight is a variable (:class:`LearnedLinear`). Once
its codes are finished, the constant scales of the layers' inputs may be learned in the same way
(:mod:`qdiff.quantization.learned_input_scales`).

Every call's error is taken relative to its target's energy: steps with small signals would not count otherwise. The sum is
divided by the block's error before, so that a method's penalty means the same for every block and model. Timesteps count the
same, or what makes their gradients agree (:mod:`qdiff.quantization.timestep_weights`).

Calls of some prompts are held out, from the methods before as well: prompts share their text tokens, and what was fitted on
a prompt looks better on it than it is. What was learned, codes and then scales, is kept only where it is nearer to float on the
held-out calls; there all calls count the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.events import Progress
from qdiff.formats.table import format_named
from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.base import Decisions, LayerGroup, decibels
from qdiff.methods.learned import RECONSTRUCTIONS, LearnedWeight, Reconstruct, ReconstructionOptions, Weighting
from qdiff.nn.quant_linear import QuantConv2d, QuantLinear
from qdiff.plan.plan import LayerPlan
from qdiff.quantization.block_walk import BlockWalk, Call
from qdiff.quantization.learned_input_scales import LearnedInputScale
from qdiff.quantization.timestep_weights import agreeing, mean_gradient
from qdiff.recording.trajectory import Step

CALLS_FOR_SCALE = 16  # whose error is called 1 in the loss
CALLS_FOR_GRADIENT = 4  # of each timestep
LEARNED_SCALES = "lsq"  # what plans call it


@dataclass
class Decided:
    """A group whose methods have decided: all that is needed to place its layers, and to place them again."""

    members: list[LayerPlan]
    layer_group: LayerGroup
    decisions: Decisions
    biases: list[Tensor | None]

    def only(self, layers: Sequence[int]) -> Decided:
        """Return the decisions for some of the group's layers, by their numbers."""
        layer_group, decisions = self.layer_group, self.decisions
        parts: dict[str, Any] = {
            name: tuple(value[layer] for layer in layers)
            for name in ("low_rank", "rounded", "bias_correction")
            if (value := getattr(decisions, name)) is not None
        }
        return Decided(
            [self.members[layer] for layer in layers],
            layer_group.only(layers),
            replace(decisions, **parts),
            [self.biases[layer] for layer in layers],
        )


class LearnedLinear(QuantLinear):
    """A quantized layer whose weight is a variable; :class:`LearnedConv2d` is the same of a convolution.

    Args:
        layer: the quantized layer; its buffers are shared, not copied.
        weight: the variable.
        bias: whether the bias is learned too.
    """

    def __init__(self, layer: QuantLinear, weight: LearnedWeight, bias: bool) -> None:
        with torch.device("meta"):
            super().__init__(layer.config, layer.timestep_index)
        self.load_state_dict(layer.state_dict(), assign=True)
        self.learned = weight
        if bias and self.bias is not None:
            start = self.bias.detach().clone()
            del self.bias
            self.bias = nn.Parameter(start)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return self.learned()


class LearnedConv2d(LearnedLinear, QuantConv2d):
    """See :class:`LearnedLinear`."""


def learned_layer(layer: QuantLinear, weight: LearnedWeight, bias: bool) -> LearnedLinear:
    """Return the layer of that kind whose weight is a variable."""
    return (LearnedConv2d if isinstance(layer, QuantConv2d) else LearnedLinear)(layer, weight, bias)


class BlockFit:
    """One block on its recorded calls; what a method of :data:`RECONSTRUCTIONS` learns with (:class:`qdiff.methods.learned.Fit`).

    Args:
        walk: the quantized model's, at the door of the block, whose layers are quantized.
        reference: the float model's, behind the block.
        weights: of every quantized layer what was to be rounded ``[out, in]``.
        weighting: see :class:`qdiff.methods.learned.ReconstructionOptions`.
    """

    def __init__(
        self,
        walk: BlockWalk,
        reference: BlockWalk,
        block: str,
        weights: dict[str, Tensor],
        weighting: Weighting = "even",
    ) -> None:
        self.walk, self.block, self.weights = walk, block, weights
        self.targets = [call.states for call in reference.calls]
        self.energies = [float(target.square().mean().clamp(min=1e-30)) for target in self.targets]
        self.fitting, self.held_out = split(walk.calls)
        self.unit = max(self.error(self.fitting[:: -(-len(self.fitting) // CALLS_FOR_SCALE)]), 1e-30)
        self.weighting = weighting
        self.importance = torch.ones(len(walk.timesteps))  # of every timestep in the loss
        self.learned: dict[str, LearnedLinear] = {}

    def error(self, numbers: Iterable[int]) -> float:
        """Return the mean over calls of the squared error of the block's output, relative to the target's energy."""
        with torch.no_grad():
            errors = [float(self._error(number)) for number in numbers]
        return sum(errors) / len(errors)

    def layer(self, name: str) -> QuantLinear:
        """Return a quantized layer of the block, as it is now."""
        layer = self.walk.backbone.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        return layer

    @property
    def emphasis(self) -> str:
        """Return what timesteps count, in words; nothing where they count the same."""
        low, high = float(self.importance.min()), float(self.importance.max())
        return "" if low == high else f", timesteps weighted {low:.2f} to {high:.2f}"

    def learn(
        self,
        make: Callable[[Tensor, QuantizedWeight], LearnedWeight],
        iterations: int,
        rate: float,
        penalty: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:
        """Learn as :class:`qdiff.methods.learned.Fit` says."""
        for name, weight in self.weights.items():
            layer = self.layer(name)
            self.learned[name] = learned_layer(layer, make(weight, codes_of(layer)), bias_rate > 0)
            self.walk.backbone.set_submodule(name, self.learned[name])
        variables = [p for layer in self.learned.values() for p in layer.learned.parameters()]
        biases = [layer.bias for layer in self.learned.values() if isinstance(layer.bias, nn.Parameter)]
        groups = [{"params": variables, "lr": rate}, {"params": biases, "lr": bias_rate}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        count = sum(weight.numel() for weight in self.weights.values())
        if self.weighting == "gradient":
            self._weigh(variables + biases)

        def loss(number: int, done: float) -> Tensor:
            total = self._loss(number)
            for layer in self.learned.values():
                extra = layer.learned.penalty(done) if penalty else None
                if extra is not None:
                    total = total + penalty * extra * (layer.learned.scale.numel() / count)
            return total

        self._descend("reconstruct", iterations, optimizer, loss)

    def learn_input_scales(self, scales: list[LearnedInputScale], iterations: int, rate: float) -> None:
        """Learn the constant scales of inputs together with Adam, at a rate that falls to 0 along a cosine."""
        optimizer = torch.optim.Adam([scale.variable for scale in scales], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

        def loss(number: int, done: float) -> Tensor:
            for scale in scales:
                scale.install()
            return self._loss(number)

        self._descend("input scales of", iterations, optimizer, loss, schedule)

    def _descend(
        self,
        what: str,
        iterations: int,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[int, float], Tensor],
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """Step down ``loss`` of one fitting call and the share of iterations done, every call before any comes again."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.block.encode()))
        order: list[int] = []
        with Progress(f"{what} {self.block}", iterations) as progress:
            for iteration in range(iterations):
                order = order or torch.randperm(len(self.fitting), generator=generator).tolist()
                optimizer.zero_grad()
                loss(self.fitting[order.pop()], iteration / iterations).backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                progress.advance()

    def _weigh(self, variables: list[nn.Parameter]) -> None:
        """Give timesteps the weights with which the gradients of ``variables``, as they are now, agree best."""
        calls: dict[int, list[int]] = {}
        for number in self.fitting:
            calls.setdefault(self.walk.calls[number].timestep, []).append(number)
        gradients = [
            mean_gradient([partial(self._loss, number) for number in numbers[:CALLS_FOR_GRADIENT]], variables)
            for numbers in calls.values()
        ]
        self.importance[list(calls)] = agreeing(torch.stack(gradients))

    def _loss(self, number: int) -> Tensor:
        return self._error(number) * float(self.importance[self.walk.calls[number].timestep]) / self.unit

    def _error(self, number: int) -> Tensor:
        output = self.walk.run(self.block, self.walk.calls[number])
        return F.mse_loss(output, self.targets[number]) / self.energies[number]


def split(calls: Sequence[Call | Step]) -> tuple[list[int], list[int]]:
    """Return numbers of the calls to fit on and of those held out: whole shards, because the calls of one have their
    prompts in common; of a single shard every fourth call.
    """
    shards = sorted({call.shard for call in calls})
    if len(shards) > 1:
        kept = set(shards[-max(1, len(shards) // 8) :])
        held = [number for number, call in enumerate(calls) if call.shard in kept]
    else:
        held = list(range(3, len(calls), 4)) or [len(calls) - 1]
    fitting = [number for number in range(len(calls)) if number not in set(held)]
    return fitting or held, held


def codes_of(layer: QuantLinear) -> QuantizedWeight:
    """Return the codes and scales of a quantized layer."""
    return QuantizedWeight.from_packed(format_named(layer.config.weights), layer.codes, layer.scale, layer.tensor_scale)


def reconstruct(
    how: Reconstruct,
    walk: BlockWalk,
    reference: BlockWalk,
    block: str,
    groups: list[Decided],
    place: Callable[[Decided], None],
) -> None:
    """Learn the rounding of a block whose groups are placed, then scales of inputs if asked to, and place the groups
    again with what was learned, where that is better.

    Args:
        how: iterations, rates and what is learned.
        walk: see :class:`BlockFit`.
        reference: see :class:`BlockFit`.
        block: name.
        groups: of the block's layers, as decided.
        place: puts the layers of a group into the backbone.
    """
    weights = {
        name: weight
        for group in groups
        for name, weight in zip(group.layer_group.names, group.layer_group.residuals(group.decisions), strict=True)
    }
    if not weights:
        return
    fit = BlockFit(walk, reference, block, weights, how.course.weighting)
    rounded = _better(fit, how.method, groups, place, lambda: _with_rounding(fit, how, groups))
    static = [group for group in rounded if group.layer_group.static(group.decisions)]
    if static and how.course.input_scale_iterations:
        _better(fit, LEARNED_SCALES, static, place, lambda: _with_input_scales(fit, how.course, static))


def _better(
    fit: BlockFit,
    method: str,
    groups: list[Decided],
    place: Callable[[Decided], None],
    learn: Callable[[], list[Decided]],
) -> list[Decided]:
    """Return groups as they were or as ``learn`` makes them, whichever brings the block nearer to float; placed, with a
    note.
    """
    before = fit.error(fit.held_out)
    with torch.enable_grad():  # whatever the caller runs in
        learned = learn()
    for group in learned:
        place(group)
    after = fit.error(fit.held_out)
    said = f"block {decibels(before, 1):.2f} -> {decibels(after, 1):.2f} dB on held-out calls{fit.emphasis}"
    better = after < before
    note = f"{method}: {said}" if better else f"{method} not kept: {said}"
    kept = []
    for group in learned if better else groups:
        decisions = group.decisions
        named = replace(decisions, notes=(*decisions.notes, note), methods=(*decisions.methods, method))
        kept.append(replace(group, decisions=named))
        place(kept[-1])
    return kept


def _with_rounding(fit: BlockFit, how: Reconstruct, groups: list[Decided]) -> list[Decided]:
    RECONSTRUCTIONS[how.method](fit, **how.options)
    return [_learned(group, fit.learned, how.method) for group in groups]


def _with_input_scales(fit: BlockFit, course: ReconstructionOptions, groups: list[Decided]) -> list[Decided]:
    """Return groups, each of which reads one tensor and gets one scale."""
    scales = [LearnedInputScale([fit.layer(name) for name in group.layer_group.names]) for group in groups]
    fit.learn_input_scales(scales, course.input_scale_iterations, course.input_scale_rate)
    return [
        replace(group, decisions=replace(group.decisions, input_scale=scale.finished()))
        for group, scale in zip(groups, scales, strict=True)
    ]


def _learned(group: Decided, layers: dict[str, LearnedLinear], method: str) -> Decided:
    mine = [layers[name] for name in group.layer_group.names]
    rounded = tuple(layer.learned.finished() for layer in mine)
    decisions = replace(group.decisions, rounded=rounded, rounding=method)
    # What was learned on is what is stored: the bias as it was trained, whatever the new codes make of a shift.
    given = group.layer_group.biases(replace(decisions, bias_correction=None))
    totals = [layer.bias for layer in mine]
    if all(total is None for total in totals):
        return replace(group, decisions=decisions)
    correction = []
    for total, bias, taken in zip(totals, group.biases, given, strict=True):
        assert total is not None, "layers of a group have a bias or have none"
        rest = total.detach() - (0 if bias is None else bias.detach().float())
        correction.append(rest - (0 if taken is None else taken))
    return replace(group, decisions=replace(decisions, bias_correction=tuple(correction)))
