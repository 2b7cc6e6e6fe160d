"""What a quantization method is given and what it decides.

A *problem* is a group of layers that read one tensor, with that tensor's statistics. A *solution* is the decisions so far.
A method takes both and returns a solution that is no worse on the fitting tokens; the recipe says which methods run, in
which order, with which options. The error that methods compare is the one that matters downstream: of the layers' outputs,
relative to the float outputs, on real tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from qdiff import numerics
from qdiff.errors import InputError, nearest
from qdiff.formats import Format
from qdiff.registry import Registry
from qdiff.statistics import InputStatistics


@dataclass(frozen=True)
class Solution:
    """Decisions about one group. ``notes`` says why, one sentence a method."""

    strength: float | None = None
    multiplier: Tensor | None = None  # [in], 1/s of SmoothQuant
    clip: float = 1.0
    timestep_scales: bool = False
    methods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def decide(self, method: str, note: str, **changes: Any) -> Solution:
        """This solution with ``changes`` made by ``method``."""
        return replace(self, methods=(*self.methods, method), notes=(*self.notes, note), **changes)


@dataclass
class Problem:
    """One group of layers.

    Args:
        names: the layers.
        weights: their float weights ``[out, in]``, in the same order.
        statistics: of the tensor they read.
        weight_format, activation_format: what they become.
    """

    names: list[str]
    weights: list[Tensor]
    statistics: InputStatistics
    weight_format: Format
    activation_format: Format
    _targets: dict[str, list[Tensor]] = field(default_factory=dict)

    def rows(self, held_out: bool) -> tuple[Tensor, Tensor]:
        """Calibration tokens ``[N, in]`` and the index of their timestep ``[N]``: even ones to fit, odd ones to judge."""
        part = slice(int(held_out), None, 2)
        return self.statistics.rows[part].float(), self.statistics.rows_timestep[part]

    def ranges(self, solution: Solution) -> Tensor:
        """Largest magnitude at each timestep after smoothing and clipping, ``[T]``. Exact: from the channels' amax."""
        amax = self.statistics.amax
        if solution.multiplier is not None:
            amax = amax * solution.multiplier
        return amax.amax(dim=1) * solution.clip

    def activation_scale(self, solution: Solution) -> tuple[Tensor, Tensor | None]:
        """The constant scale ``[]`` and, with per-timestep scales, the stretch ``r [T]`` (design: Q(x * r[t]) / r[t])."""
        ranges = self.ranges(solution)
        widest = ranges.max()
        scale = numerics.choose_scale(widest, self.activation_format)
        if not solution.timestep_scales:
            return scale, None
        return scale, numerics.to_half_grid(
            torch.where(ranges > 0, widest / ranges, torch.ones_like(ranges)).clamp(max=1e4)
        )

    def quantized_weights(self, solution: Solution) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of every layer's smoothed weight."""
        smoothed = (
            self.weights if solution.multiplier is None else [weight / solution.multiplier for weight in self.weights]
        )
        return [numerics.quantize_weight(weight, self.weight_format) for weight in smoothed]

    def errors(self, solution: Solution, held_out: bool = False) -> list[float]:
        """Normalised mean square error of each layer's output, bias left out, on fitting or on held-out tokens."""
        x, timestep = self.rows(held_out)
        key = "held" if held_out else "fit"
        if key not in self._targets:
            self._targets[key] = [x @ weight.T for weight in self.weights]
        if solution.multiplier is not None:
            x = x * solution.multiplier
        scale, stretch = self.activation_scale(solution)
        row_stretch = None if stretch is None else stretch[timestep][:, None]
        x = x if row_stretch is None else x * row_stretch
        x = numerics.quantize_dequantize(x, scale, self.activation_format)
        x = x if row_stretch is None else x / row_stretch
        errors = []
        for (codes, weight_scale), target in zip(self.quantized_weights(solution), self._targets[key], strict=True):
            output = x @ numerics.dequantize(codes, weight_scale[:, None], self.weight_format).T
            errors.append(
                float((output - target).double().square().sum() / target.double().square().sum().clamp(min=1e-30))
            )
        return errors

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
    method = METHODS[name]
    known = [
        parameter for parameter in inspect.signature(method).parameters if parameter not in ("problem", "solution")
    ]
    types = get_type_hints(method, include_extras=True)
    checked = {}
    for option, value in options.items():
        if option not in known:
            close = nearest(option, known)
            raise InputError(
                f"method {name!r} has no option {option!r}",
                f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}",
            )
        try:
            checked[option] = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"method {name!r}: {option} = {value!r}: {error.errors()[0]['msg']}") from None
    return checked


def apply_method(name: str, options: dict[str, Any], problem: Problem, solution: Solution) -> Solution:
    """Runs one method with a recipe's options. Raises as :func:`check_options`."""
    return METHODS[name](problem, solution, **check_options(name, options))


def decibels(error: float, reference: float) -> float:
    """How much smaller ``error`` is than ``reference``, in dB."""
    import math

    return 10 * math.log10(max(reference, 1e-30) / max(error, 1e-30))
