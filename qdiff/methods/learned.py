"""What a method of learned rounding is: it makes a variable of every quantized weight of a block, and finished codes of it.

Group methods (:mod:`qdiff.methods.base`) see layers that read one tensor. Learned rounding needs more: the codes of all layers
of a transformer block are chosen together, so that the *block's* output comes near to the float block's (BRECQ,
arXiv 2102.05426). So these methods have a table of their own, :data:`RECONSTRUCTIONS`, and run after the group methods, on the
transforms, scales and low-rank branches that those decided. None of that changes here: codes do, and biases.

A method is a function ``(fit, **options)`` that says what is learned and how (:meth:`Fit.learn`); the loop, the inputs, the
targets and the judgement are :mod:`qdiff.quantization.reconstruction`'s, the same for all methods. So are the options of
that loop (:class:`ReconstructionOptions`): what a recorded call counts, and whether scales of inputs are learned once the codes
are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.formats import elements
from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.base import check_keywords
from qdiff.registry import Registry

Iterations = Annotated[int, Field(ge=1, le=100_000)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Weighting = Literal["even", "gradient"]


class LearnedWeight(nn.Module, ABC):
    """One weight while its codes are learned.

    Args:
        weight: what was to be rounded ``[out, in]``, float32: transformed, and without the low-rank branch.
        start: codes and scales that the methods before decided. The scales stay.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        super().__init__()
        self.start, self.shape = start, weight.shape
        self.register_buffer("scale", start.scale_of_each(), persistent=False)

    scale: Tensor

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the weight ``[out, in]`` as it is now, differentiable."""

    def penalty(self, progress: float) -> Tensor | None:
        """Return what is added to the loss at ``progress`` (0 … 1) of the iterations, a mean over the weight's
        elements.
        """
        return None

    @abstractmethod
    def values(self) -> Tensor:
        """Return the finished values ``[out, in]`` in codes' units, on the grid."""

    def finished(self) -> QuantizedWeight:
        """Return codes of :meth:`values` on the scales of the start."""
        with torch.no_grad():
            return self.start.with_values(self.values() * self.scale)


class Fit(Protocol):
    """What a method is given: one block, ready to be learned."""

    def learn(
        self,
        make: Callable[[Tensor, QuantizedWeight], LearnedWeight],
        iterations: int,
        rate: float,
        penalty: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:
        """Learn all weights of the block together with Adam.

        Args:
            make: the variable of one weight, from the weight and its codes so far.
            iterations: of one recorded call each.
            rate: of the weights' variables.
            penalty: what :meth:`LearnedWeight.penalty` is multiplied with; the other term is the block's error, 1 at the start.
            bias_rate: rate of the layers' biases; 0: they stay.
        """


Reconstruction = Callable[..., None]
RECONSTRUCTIONS: Registry[Reconstruction] = Registry("reconstruction", InputError)


@dataclass(frozen=True)
class ReconstructionOptions:
    """Options that go with every method.

    Args:
        weighting: what recorded calls count: all the same, or by timestep what makes gradients agree
            (:mod:`qdiff.quantization.timestep_weights`).
        input_scale_iterations: for how many calls the constant scales of inputs are learned
            (:mod:`qdiff.quantization.learned_input_scales`).
        input_scale_rate: Adam's at the first of them, as a share of the scale.
    """

    weighting: Weighting = "even"
    input_scale_iterations: Annotated[int, Field(ge=0, le=100_000)] = 0
    input_scale_rate: Rate = 2e-3


@dataclass(frozen=True)
class Reconstruct:
    """A recipe's ``sequential.reconstruct``, checked: the method's name, its own options, and the others."""

    method: str
    options: Mapping[str, object]
    course: ReconstructionOptions


def check_reconstruction(options: Mapping[str, object]) -> Reconstruct:
    """Return a recipe's ``sequential.reconstruct``.

    Raises:
        InputError: no or an unknown method, an unknown option, or a value that the option does not take.
    """
    left = dict(options)
    if "method" not in left:
        raise InputError(
            "sequential.reconstruct names no method",
            f"add method: one of {', '.join(RECONSTRUCTIONS)}, or leave it out",
        )
    name = str(left.pop("method"))
    own = check_keywords(f"reconstruction {name!r}", left, ("fit",), RECONSTRUCTIONS[name], ReconstructionOptions)
    common: dict[str, Any] = {
        field.name: own.pop(field.name) for field in fields(ReconstructionOptions) if field.name in own
    }
    return Reconstruct(name, own, ReconstructionOptions(**common))


def code_values(weight: QuantizedWeight) -> Tensor:
    """Return codes as values of their grid ``[out, in]``, float32: the weight without its scales."""
    return elements.decode(weight.codes, weight.format.element).float()


def candidates(ratio: Tensor, chosen: Tensor, start: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the two values of the grid, lower and upper, between which AdaRound decides, in codes' units.

    One of them is the value ``chosen`` so far, the other its neighbour on the side of ``ratio``. Rounded to nearest that is
    floor and ceiling of ``ratio``; where GPTQ moved a value further, its code stays possible. Both are equal where ``ratio``
    lies on the chosen value or beyond the grid's end. Across a binade's border the two lie on different steps.
    """
    element = start.format.element
    towards = (ratio - chosen).sign()
    quarter = elements.step(chosen, element) / 4  # below a power of two the next value is half a step away
    below, above = elements.neighbours(chosen + towards * quarter, element)
    still = towards == 0
    return torch.where(still, chosen, below), torch.where(still, chosen, above)
