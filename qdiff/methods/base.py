"""What a quantization method is given and what it decides.

A *problem* is a group of layers that read one tensor, with that tensor's statistics. A *solution* is the decisions so far.
A method takes both and returns a solution that is no worse on the fitting tokens; the recipe says which methods run, in
which order, with which options. The error that methods compare is the one that matters downstream: of the layers' outputs,
relative to the float outputs, on real tokens.

A solution has two parts. The *transform* (smoothing, shift, rotation, low-rank branch) changes nothing without rounding; what it
leaves for the quantizers are :meth:`Problem.inputs` and :meth:`Problem.residuals`. The *rounding* (which rule chooses the
weights' scales, and codes that GPTQ or AdaRound chose instead of the nearest ones) belongs to one transform: changing the
transform drops the codes. So methods of the transform come first in a recipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from qdiff.errors import InputError, nearest
from qdiff.formats import dynamic, scales
from qdiff.formats import weight as weights
from qdiff.formats.table import Format
from qdiff.formats.weight import QuantizedWeight
from qdiff.nn.quant_linear import transform
from qdiff.nn.rotations import Rotation
from qdiff.recording.activation_statistics import InputStatistics
from qdiff.registry import Registry

TRANSFORM = ("multiplier", "shift", "rotation", "low_rank")
LARGEST_STRETCH = 1e4  # of r[t]
# Methods that mix columns, or move them where the padding's zeros would not follow: recipes pass them over at convolutions.
LINEAR_ONLY = frozenset({"awq", "shift", "center", "repq", "rotate", "low_rank"})


@dataclass(frozen=True)
class Solution:
    """Decisions about one group. ``notes`` says why, one sentence a method.

    Args:
        strength: SmoothQuant's, for the plan; the numbers are in ``multiplier``.
        multiplier, shift: ``[in]``; ``(x * multiplier - shift)`` is what is rotated and quantized.
        centered: whether tokens are quantized without the mean of their sample (:func:`qdiff.nn.quant_linear.centered`).
        rotation: of the moved input; ``None``: none.
        low_rank: for each layer ``(down [rank, in], up [out, rank])`` in transformed coordinates, or ``None``: no branch.
        weight_format: in place of the problem's, with the same bits and scales; ``None``: the problem's.
        rule: how the weights' scales are chosen (:data:`qdiff.formats.weight.Rule`).
        rounded: for each layer its weight as a method rounded it; ``None``: to nearest.
        rounding: name of that method, for the plan.
        correction: for each layer what its bias has to add ``[out]``.
        clip, timestep_scales: of static activations.
        by_token: activation scales by token, or one constant; ``None``: as the problem says.
        input_scale: what :meth:`Problem.activation_scale` gives, as it was learned after all methods; ``None``: from the ranges.
    """

    strength: float | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = None
    centered: bool = False
    rotation: Rotation | None = None
    low_rank: tuple[tuple[Tensor, Tensor], ...] | None = None
    weight_format: Format | None = None
    rule: weights.Rule = "amax"
    rounded: tuple[QuantizedWeight, ...] | None = None
    rounding: str = "nearest"
    correction: tuple[Tensor, ...] | None = None
    clip: float = 1.0
    timestep_scales: bool = False
    by_token: bool | None = None
    input_scale: tuple[Tensor, Tensor | None] | None = None
    methods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def decide(self, method: str, note: str, **changes: Any) -> Solution:
        """This solution with ``changes`` made by ``method``; codes rounded for another transform or rule are dropped."""
        if "rounded" not in changes and any(name in changes for name in (*TRANSFORM, "rule", "weight_format")):
            changes |= {"rounded": None, "rounding": "nearest"}
        elif "rounded" in changes:
            changes.setdefault("rounding", method)
        return replace(self, methods=(*self.methods, method), notes=(*self.notes, note), **changes)

    @property
    def rank(self) -> int:
        """Rank of the low-rank branches; 0: none."""
        return 0 if self.low_rank is None else self.low_rank[0][0].shape[0]


class Rows(NamedTuple):
    """Calibration tokens ``x [N, in]``, the index of each one's timestep ``[N]``, and the mean of its sample ``[N, in]`` where
    that is known."""

    x: Tensor
    timestep: Tensor
    means: Tensor | None = None


@dataclass
class Problem:
    """One group of layers.

    Args:
        names: the layers.
        weights: their float weights ``[out, in]``, in the same order.
        statistics: of the tensor they read.
        weight_format, activation_format: what they become; activations in a plain format stay as they are.
        by_token: dynamic activation scales, one for each token, unless a solution decides otherwise.
        kind: ``Linear`` or ``Conv2d``.
        taps: of convolutions, columns for each channel of the input; their weights are matrices here and their tokens windows.
    """

    names: list[str]
    weights: list[Tensor]
    statistics: InputStatistics
    weight_format: Format
    activation_format: Format
    by_token: bool = False
    kind: str = "Linear"
    taps: int = 1
    _targets: dict[str, list[Tensor]] = field(default_factory=dict)

    def only(self, layers: Sequence[int]) -> Problem:
        """Of some of the layers, by their numbers."""
        return replace(
            self,
            names=[self.names[layer] for layer in layers],
            weights=[self.weights[layer] for layer in layers],
            _targets={},
        )

    def scales_by_token(self, solution: Solution) -> bool:
        """Whether each token of the input gets a scale at run time."""
        return self.by_token if solution.by_token is None else solution.by_token

    def static(self, solution: Solution) -> bool:
        """Whether the input gets one constant scale."""
        format = self.activation_format
        return format.quantized and not format.block and not self.scales_by_token(solution)

    @property
    def convolution(self) -> bool:
        """Whether the layer reads windows, among which zeros of the padding, and not tokens."""
        return self.kind == "Conv2d"

    def by_channel(self, columns: Tensor) -> Tensor:
        """``columns [in]`` with the largest of each channel's columns in all of them."""
        return columns.unflatten(0, (-1, self.taps)).amax(dim=1).repeat_interleave(self.taps)

    def rows(self, held_out: bool) -> Rows:
        """The calibration tokens: even ones to fit, odd ones to judge."""
        known, part = self.statistics, slice(int(held_out), None, 2)
        means = None if known.means is None or known.rows_sample is None else known.means[known.rows_sample[part]]
        return Rows(known.rows[part].float(), known.rows_timestep[part], means)

    def inputs(self, solution: Solution, x: Tensor) -> Tensor:
        """What the transform makes of the input ``x [N, in]``, before its quantizer."""
        x = transform(x, solution.multiplier, solution.shift)
        return x if solution.rotation is None else solution.rotation.forward(x)

    def transformed_weights(self, solution: Solution) -> list[Tensor]:
        """The weights that :meth:`inputs` are to be multiplied with."""
        moved = self.weights
        if solution.multiplier is not None:
            moved = [weight / solution.multiplier for weight in moved]
        if solution.rotation is not None:
            moved = [solution.rotation.weight(weight) for weight in moved]
        return moved

    def residuals(self, solution: Solution) -> list[Tensor]:
        """The transformed weights without what their low-rank branches hold: what is quantized."""
        moved = self.transformed_weights(solution)
        if solution.low_rank is None:
            return moved
        return [weight - up @ down for weight, (down, up) in zip(moved, solution.low_rank, strict=True)]

    def ranges(self, solution: Solution) -> Tensor:
        """Largest magnitude of the transformed input at each timestep, times ``clip``, ``[T]``.

        Exact from the channels' ranges without rotation; otherwise that of the calibration tokens. Centered tokens are at most as
        far from their mean as a channel's range is wide.
        """
        if solution.rotation is None:
            low, high = (self.inputs(solution, end) for end in (self.statistics.low, self.statistics.high))
            widest = torch.maximum(low.abs(), high.abs())
            if solution.centered:
                widest = torch.maximum(widest, (high - low).abs())
            return widest.amax(dim=1) * solution.clip
        magnitudes = self.inputs(solution, self.statistics.rows.float()).abs().amax(dim=1)
        ranges = magnitudes.new_zeros(len(self.statistics.amax))
        return ranges.scatter_reduce(0, self.statistics.rows_timestep, magnitudes, "amax") * solution.clip

    def activation_scale(self, solution: Solution) -> tuple[Tensor | None, Tensor | None]:
        """The constant scale ``[]`` and, with per-timestep scales, the stretch ``r [T]`` (Q(x * r[t]) / r[t]).

        Of formats with run-time blocks the scale is the tensor's, or ``None`` where they have none, or where scales are by token.
        """
        if solution.input_scale is not None:
            return solution.input_scale
        widest = (ranges := self.ranges(solution)).max()
        if self.activation_format.tensor_scale:
            return scales.choose_tensor_scale(widest, self.activation_format), None
        if not self.static(solution):
            return None, None
        scale = scales.choose_scale(widest, self.activation_format)
        if not solution.timestep_scales:
            return scale, None
        return scale, scales.to_half_grid(
            torch.where(ranges > 0, widest / ranges, torch.ones_like(ranges)).clamp(max=LARGEST_STRETCH)
        )

    def quantized_inputs(self, solution: Solution, rows: Rows) -> Tensor:
        """What the layer's products see of the input: ``[N, in]``; of centered tokens the sum of the rows that make their
        output."""
        x = self.inputs(solution, rows.x)
        if not self.activation_format.quantized:
            return x
        scale, stretch = self.activation_scale(solution)
        if self.activation_format.block:
            quantized = partial(dynamic.quantize_dequantize_blocks, format=self.activation_format, tensor_scale=scale)
            if not solution.centered:
                return quantized(x)
            assert rows.means is not None, "what is centered has means"
            mean = self.inputs(solution, rows.means)
            coarse = quantized(mean)
            return quantized(x - mean) + coarse + quantized(mean - coarse)
        if scale is None:
            return dynamic.quantize_dequantize_tokens(x, self.activation_format)
        if stretch is None:
            return scales.quantize_dequantize(x, scale, self.activation_format)
        by_row = stretch[rows.timestep][:, None]
        return scales.quantize_dequantize(x * by_row, scale, self.activation_format) / by_row

    def weight_tensor_scale(self, solution: Solution) -> Tensor | None:
        """The tensor scale that all weights of the group share, because engines may run them as one; ``None`` without one."""
        amax = torch.stack([weight.abs().max() for weight in self.residuals(solution)]).max()
        return weights.choose_weight_tensor_scale(amax, solution.weight_format or self.weight_format, solution.rule)

    def nearest_weights(self, solution: Solution) -> list[QuantizedWeight]:
        """The residual weights rounded to nearest, with the solution's rule for their scales."""
        tensor_scale, format = self.weight_tensor_scale(solution), solution.weight_format or self.weight_format
        return [
            weights.quantize_weight(weight, format, solution.rule, tensor_scale=tensor_scale)
            for weight in self.residuals(solution)
        ]

    def quantized_weights(self, solution: Solution) -> list[QuantizedWeight]:
        """Every layer's quantized weight: as a method rounded it, else to nearest."""
        return list(solution.rounded) if solution.rounded is not None else self.nearest_weights(solution)

    def biases(self, solution: Solution) -> list[Tensor | None]:
        """What each layer's bias has to add ``[out]``: what the shift took, and what a method found to be missing.

        The shift is given back through the *quantized* weight, ``Q(W) s``: the error of the weights then meets ``x`` and not
        ``x - s``, which after a GELU is much larger.
        """
        given: list[Tensor | None] = [None] * len(self.names)
        if solution.shift is not None:
            shift = solution.shift if solution.rotation is None else solution.rotation.forward(solution.shift)
            given = [row[0] for row in self._products(solution, shift[None], shift[None])]
        if solution.correction is None:
            return given
        return [found if bias is None else bias + found for bias, found in zip(given, solution.correction, strict=True)]

    def _products(self, solution: Solution, rounded: Tensor, moved: Tensor) -> list[Tensor]:
        """What each layer's quantized weight makes of ``rounded [..., in]`` and its low-rank branch of ``moved``."""
        results = [rounded @ weight.dequantize().T for weight in self.quantized_weights(solution)]
        if solution.low_rank is None:
            return results
        return [y + (moved @ down.T) @ up.T for y, (down, up) in zip(results, solution.low_rank, strict=True)]

    def outputs(self, solution: Solution, rows: Rows) -> list[Tensor]:
        """Each layer's output ``[N, out]`` as it will be computed, bias left out."""
        moved = self.inputs(solution, rows.x)
        rounded = self.quantized_inputs(solution, rows)
        results = self._products(solution, rounded, moved)
        return [y if bias is None else y + bias for y, bias in zip(results, self.biases(solution), strict=True)]

    def errors(self, solution: Solution, held_out: bool = False) -> list[float]:
        """Normalised mean square error of each layer's output, bias left out, on fitting or on held-out tokens."""
        rows = self.rows(held_out)
        key = "held" if held_out else "fit"
        if key not in self._targets:
            self._targets[key] = [rows.x @ weight.T for weight in self.weights]
        return [
            float((output - target).double().square().sum() / target.double().square().sum().clamp(min=1e-30))
            for output, target in zip(self.outputs(solution, rows), self._targets[key], strict=True)
        ]

    def error(self, solution: Solution) -> float:
        """Mean of :meth:`errors` on the fitting tokens: what methods minimise."""
        errors = self.errors(solution)
        return sum(errors) / len(errors)


# Types of methods' options, checked in recipes before anything runs.
Decibels = Annotated[float, Field(allow_inf_nan=False)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]

Method = Callable[..., Solution]
METHODS: Registry[Method] = Registry("method", InputError)


def check_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's options for a method, checked against the method's own annotations and converted to them.

    Raises:
        InputError: unknown method or option, or a value that the option does not take.
    """
    return check_keywords(f"method {name!r}", options, ("problem", "solution"), METHODS[name])


def check_keywords(
    what: str, options: dict[str, Any], given: tuple[str, ...], *functions: Callable[..., Any]
) -> dict[str, Any]:
    """Options checked against the annotations of functions and converted to them; ``given`` are arguments that are no options.

    Raises:
        InputError: an option that no function has, or a value that it does not take. ``what`` begins the message.
    """
    known = [name for function in functions for name in inspect.signature(function).parameters if name not in given]
    types = {
        name: type for function in functions for name, type in get_type_hints(function, include_extras=True).items()
    }
    checked = {}
    for option, value in options.items():
        if option not in known:
            close = nearest(option, known)
            raise InputError(
                f"{what} has no option {option!r}",
                f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}",
            )
        try:
            checked[option] = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            message = f"{what}: {option} = {value!r}: {error.errors()[0]['msg']}"
            raise InputError(message, "docs/guide/recipes.md says what it takes") from None
    return checked


def apply_method(name: str, options: dict[str, Any], problem: Problem, solution: Solution) -> Solution:
    """Runs one method with a recipe's options. Raises as :func:`check_options`."""
    if problem.convolution and name in LINEAR_ONLY:
        return solution.decide(name, f"no {name} of a convolution")
    return METHODS[name](problem, solution, **check_options(name, options))


def decibels(error: float, reference: float) -> float:
    """How much smaller ``error`` is than ``reference``, in dB."""
    import math

    return 10 * math.log10(max(reference, 1e-30) / max(error, 1e-30))
