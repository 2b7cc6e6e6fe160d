"""What a quantization method is given and what it decides.

A :class:`LayerGroup` are layers that read one tensor, with that tensor's statistics. :class:`Decisions` are what was decided for
them so far. A method takes both and returns decisions that are no worse on the fitting tokens; the recipe says which methods run,
in which order, with which options. The error that methods compare is the one that matters downstream: of the layers' outputs,
relative to the float outputs, on real tokens.

Decisions have two parts. The *transform* (smoothing, shift, rotation, low-rank branch) changes nothing without rounding; what it
leaves for the quantizers are :meth:`Decisions.inputs` and :meth:`LayerGroup.residuals`. The *rounding* (which rule chooses the
weights' scales, and codes that GPTQ or AdaRound chose instead of the nearest ones) belongs to one transform: changing the
transform drops the codes. So methods of the transform come first in a recipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, NamedTuple, TypedDict, Unpack, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from qdiff.errors import InputError, nearest
from qdiff.formats import dynamic, scales
from qdiff.formats import weight as weights
from qdiff.formats.table import Format
from qdiff.formats.weight import QuantizedWeight
from qdiff.nn.rotations import Rotation
from qdiff.nn.transform import CHANGES_WEIGHTS, Transform
from qdiff.plan.ranges import advice
from qdiff.recording.activation_statistics import InputStatistics
from qdiff.registry import Registry

LARGEST_STRETCH = 1e4  # of r[t]
# Methods that mix columns, or move them where the padding's zeros would not follow: recipes pass them over at convolutions.
LINEAR_ONLY = frozenset({"awq", "shift", "center", "repq", "rotate", "low_rank"})


class DecisionChanges(TypedDict, total=False):
    """Fields of :class:`Decisions` that a method changes."""

    smoothing: float | None
    input_multiplier: Tensor | None
    shift: Tensor | None
    centered: bool
    rotation: Rotation | None
    low_rank: tuple[tuple[Tensor, Tensor], ...] | None
    weight_format: Format | None
    scale_rule: weights.Rule
    rounded: tuple[QuantizedWeight, ...] | None
    rounding: str
    bias_correction: tuple[Tensor, ...] | None
    clip: float
    timestep_scales: bool
    per_token: bool | None
    input_scale: tuple[Tensor, Tensor | None] | None


@dataclass(frozen=True)
class Decisions(Transform):
    """Decisions about one group: its transform, and how the rest is rounded. ``notes`` says why, one sentence a method.

    Args:
        smoothing: SmoothQuant's strength, for the plan; the numbers are in ``input_multiplier``.
        weight_format: in place of the group's, with the same bits and scales; ``None``: the group's.
        scale_rule: how the weights' scales are chosen (:data:`qdiff.formats.weight.Rule`).
        rounded: for each layer its weight as a method rounded it; ``None``: to nearest.
        rounding: name of that method, for the plan.
        bias_correction: for each layer what its bias has to add ``[out]``.
        clip, timestep_scales: of static activations.
        per_token: activation scales per token, or one constant; ``None``: as the group says.
        input_scale: what :meth:`LayerGroup.activation_scale` gives, learned after all methods; ``None``: from ranges.
    """

    smoothing: float | None = None
    weight_format: Format | None = None
    scale_rule: weights.Rule = "amax"
    rounded: tuple[QuantizedWeight, ...] | None = None
    rounding: str = "nearest"
    bias_correction: tuple[Tensor, ...] | None = None
    clip: float = 1.0
    timestep_scales: bool = False
    per_token: bool | None = None
    input_scale: tuple[Tensor, Tensor | None] | None = None
    methods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def decide(self, method: str, note: str, **changes: Unpack[DecisionChanges]) -> Decisions:
        """Return these decisions with ``changes`` made by ``method``; codes rounded for another transform or rule are
        dropped.
        """
        if "rounded" not in changes and any(
            name in changes for name in (*CHANGES_WEIGHTS, "scale_rule", "weight_format")
        ):
            changes["rounded"], changes["rounding"] = None, "nearest"
        elif "rounded" in changes:
            changes.setdefault("rounding", method)
        return replace(self, methods=(*self.methods, method), notes=(*self.notes, note), **changes)


class Rows(NamedTuple):
    """Calibration tokens ``x [N, in]``, the index of each one's timestep ``[N]``, and the mean of its sample ``[N, in]`` where
    that is known.
    """

    x: Tensor
    timestep: Tensor
    means: Tensor | None = None


@dataclass
class LayerGroup:
    """One group of layers.

    Args:
        names: the layers.
        weights: their float weights ``[out, in]``, in the same order.
        statistics: of the tensor they read.
        weight_format, activation_format: what they become; activations in a plain format stay as they are.
        per_token: dynamic activation scales, one for each token, unless decisions say otherwise.
        kind: ``Linear`` or ``Conv2d``.
        taps: of convolutions, columns for each channel of the input; their weights are matrices here and their tokens windows.
    """

    names: list[str]
    weights: list[Tensor]
    statistics: InputStatistics
    weight_format: Format
    activation_format: Format
    per_token: bool = False
    kind: str = "Linear"
    taps: int = 1
    _targets: dict[str, list[Tensor]] = field(default_factory=dict)

    def only(self, layers: Sequence[int]) -> LayerGroup:
        """Return the group with some of its layers only, by their numbers."""
        return replace(
            self,
            names=[self.names[layer] for layer in layers],
            weights=[self.weights[layer] for layer in layers],
            _targets={},
        )

    def scales_per_token(self, decisions: Decisions) -> bool:
        """Return whether each token of the input gets a scale at run time."""
        return self.per_token if decisions.per_token is None else decisions.per_token

    def static(self, decisions: Decisions) -> bool:
        """Return whether the input gets one constant scale."""
        format = self.activation_format
        return format.quantized and not format.block and not self.scales_per_token(decisions)

    @property
    def convolution(self) -> bool:
        """Return whether the layer reads windows, among which zeros of the padding, and not tokens."""
        return self.kind == "Conv2d"

    def by_channel(self, columns: Tensor) -> Tensor:
        """Return ``columns [in]`` with the largest value of each channel's columns in all of them."""
        return columns.unflatten(0, (-1, self.taps)).amax(dim=1).repeat_interleave(self.taps)

    def rows(self, held_out: bool) -> Rows:
        """Return the calibration tokens: even ones to fit, odd ones to judge."""
        known, part = self.statistics, slice(int(held_out), None, 2)
        means = None if known.means is None or known.rows_sample is None else known.means[known.rows_sample[part]]
        return Rows(known.rows[part].float(), known.rows_timestep[part], means)

    def transformed_weights(self, decisions: Decisions) -> list[Tensor]:
        """Return the weights that transformed inputs are to be multiplied with."""
        return [decisions.weight(weight) for weight in self.weights]

    def residuals(self, decisions: Decisions) -> list[Tensor]:
        """Return the transformed weights without what their low-rank branches hold: what is quantized."""
        moved = self.transformed_weights(decisions)
        if decisions.low_rank is None:
            return moved
        return [weight - up @ down for weight, (down, up) in zip(moved, decisions.low_rank, strict=True)]

    def ranges(self, decisions: Decisions) -> Tensor:
        """Return the largest magnitude of the transformed input at each timestep, times ``clip``, ``[T]``.

        Exact from the channels' ranges without rotation; otherwise that of the calibration tokens. Centered tokens are at most as
        far from their mean as a channel's range is wide.
        """
        if decisions.rotation is None:
            low, high = (decisions.inputs(end) for end in (self.statistics.low, self.statistics.high))
            widest = torch.maximum(low.abs(), high.abs())
            if decisions.centered:
                widest = torch.maximum(widest, (high - low).abs())
            return widest.amax(dim=1) * decisions.clip
        magnitudes = decisions.inputs(self.statistics.rows.float()).abs().amax(dim=1)
        ranges = magnitudes.new_zeros(len(self.statistics.amax))
        return ranges.scatter_reduce(0, self.statistics.rows_timestep, magnitudes, "amax") * decisions.clip

    def activation_scale(self, decisions: Decisions) -> tuple[Tensor | None, Tensor | None]:
        """Return the constant scale ``[]`` and, with per-timestep scales, the stretch ``r [T]`` (Q(x * r[t]) / r[t]).

        Of formats with run-time blocks the scale is the tensor's, ``None`` where they have none and where scales are per token.
        """
        if decisions.input_scale is not None:
            return decisions.input_scale
        widest = (ranges := self.ranges(decisions)).max()
        if self.activation_format.tensor_scale:
            return scales.choose_tensor_scale(widest, self.activation_format), None
        if not self.static(decisions):
            return None, None
        scale = scales.choose_scale(widest, self.activation_format)
        if not decisions.timestep_scales:
            return scale, None
        return scale, scales.to_half_grid(
            torch.where(ranges > 0, widest / ranges, torch.ones_like(ranges)).clamp(max=LARGEST_STRETCH)
        )

    def quantized_inputs(self, decisions: Decisions, rows: Rows) -> Tensor:
        """Return what the layer's products see of the input: ``[N, in]``; of centered tokens the sum of the rows that
        make their output.
        """
        x = decisions.inputs(rows.x)
        if not self.activation_format.quantized:
            return x
        scale, stretch = self.activation_scale(decisions)
        if self.activation_format.block:
            quantized = partial(dynamic.quantize_dequantize_blocks, format=self.activation_format, tensor_scale=scale)
            if not decisions.centered:
                return quantized(x)
            assert rows.means is not None, "what is centered has means"
            mean = decisions.inputs(rows.means)
            coarse = quantized(mean)
            return quantized(x - mean) + coarse + quantized(mean - coarse)
        if scale is None:
            return dynamic.quantize_dequantize_tokens(x, self.activation_format)
        if stretch is None:
            return scales.quantize_dequantize(x, scale, self.activation_format)
        by_row = stretch[rows.timestep][:, None]
        return scales.quantize_dequantize(x * by_row, scale, self.activation_format) / by_row

    def weight_tensor_scale(self, decisions: Decisions) -> Tensor | None:
        """Return the tensor scale that all weights of the group share, because engines may run them as one; ``None``
        without one.
        """
        amax = torch.stack([weight.abs().max() for weight in self.residuals(decisions)]).max()
        return weights.choose_weight_tensor_scale(
            amax, decisions.weight_format or self.weight_format, decisions.scale_rule
        )

    def nearest_weights(self, decisions: Decisions) -> list[QuantizedWeight]:
        """Return the residual weights rounded to nearest, with the decisions' rule for their scales."""
        tensor_scale, format = self.weight_tensor_scale(decisions), decisions.weight_format or self.weight_format
        return [
            weights.quantize_weight(weight, format, decisions.scale_rule, tensor_scale=tensor_scale)
            for weight in self.residuals(decisions)
        ]

    def quantized_weights(self, decisions: Decisions) -> list[QuantizedWeight]:
        """Return every layer's quantized weight: as a method rounded it, else to nearest."""
        return list(decisions.rounded) if decisions.rounded is not None else self.nearest_weights(decisions)

    def biases(self, decisions: Decisions) -> list[Tensor | None]:
        """Return what each layer's bias has to add ``[out]``: what the shift took, and what a method found to be
        missing.

        The shift is given back through the *quantized* weight, ``Q(W) s``: the error of the weights then meets ``x`` and not
        ``x - s``, which after a GELU is much larger.
        """
        given: list[Tensor | None] = [None] * len(self.names)
        if decisions.shift is not None:
            shift = decisions.shift if decisions.rotation is None else decisions.rotation.forward(decisions.shift)
            given = [row[0] for row in self._products(decisions, shift[None], shift[None])]
        if decisions.bias_correction is None:
            return given
        return [
            found if bias is None else bias + found
            for bias, found in zip(given, decisions.bias_correction, strict=True)
        ]

    def _products(self, decisions: Decisions, rounded: Tensor, moved: Tensor) -> list[Tensor]:
        """Return what each layer's quantized weight makes of ``rounded [..., in]`` and its low-rank branch of
        ``moved``.
        """
        results = [rounded @ weight.dequantize().T for weight in self.quantized_weights(decisions)]
        if decisions.low_rank is None:
            return results
        return [y + (moved @ down.T) @ up.T for y, (down, up) in zip(results, decisions.low_rank, strict=True)]

    def outputs(self, decisions: Decisions, rows: Rows) -> list[Tensor]:
        """Return each layer's output ``[N, out]`` as it will be computed, bias left out."""
        moved = decisions.inputs(rows.x)
        rounded = self.quantized_inputs(decisions, rows)
        results = self._products(decisions, rounded, moved)
        return [y if bias is None else y + bias for y, bias in zip(results, self.biases(decisions), strict=True)]

    def errors(self, decisions: Decisions, held_out: bool = False) -> list[float]:
        """Return the normalised mean square error of each layer's output, bias left out, on fitting or on held-out
        tokens.
        """
        rows = self.rows(held_out)
        key = "held" if held_out else "fit"
        if key not in self._targets:
            self._targets[key] = [rows.x @ weight.T for weight in self.weights]
        return [
            float((output - target).double().square().sum() / target.double().square().sum().clamp(min=1e-30))
            for output, target in zip(self.outputs(decisions, rows), self._targets[key], strict=True)
        ]

    def error(self, decisions: Decisions) -> float:
        """Return the mean of :meth:`errors` on the fitting tokens: what methods minimise."""
        errors = self.errors(decisions)
        return sum(errors) / len(errors)


# Types of methods' options, checked in recipes before anything runs.
Decibels = Annotated[float, Field(allow_inf_nan=False)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]

Method = Callable[..., Decisions]
METHODS: Registry[Method] = Registry("method", InputError)


def check_options(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return a recipe's options for a method, checked against the method's own annotations and converted to them.

    Raises:
        InputError: unknown method or option, or a value that the option does not take.
    """
    group_and_decisions = tuple(inspect.signature(METHODS[name]).parameters)[:2]  # whatever the method calls them
    return check_keywords(f"method {name!r}", options, group_and_decisions, METHODS[name])


def check_keywords(
    what: str, options: Mapping[str, object], given: tuple[str, ...], *functions: Callable[..., object]
) -> dict[str, object]:
    """Return options checked against the annotations of functions and converted to them; ``given`` are arguments that
    are no options.

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
            raise InputError(message, advice(TypeAdapter(types[option]).json_schema())) from None
    return checked


def apply_method(name: str, options: Mapping[str, object], layer_group: LayerGroup, decisions: Decisions) -> Decisions:
    """Run one method with a recipe's options. Raises as :func:`check_options`."""
    if layer_group.convolution and name in LINEAR_ONLY:
        return decisions.decide(name, f"no {name} of a convolution")
    return METHODS[name](layer_group, decisions, **check_options(name, options))


def decibels(error: float, reference: float) -> float:
    """Return how much smaller ``error`` is than ``reference``, in dB."""
    import math

    return 10 * math.log10(max(reference, 1e-30) / max(error, 1e-30))
