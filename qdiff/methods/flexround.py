"""FlexRound (arXiv 2306.00317): learn what a weight is divided by before it is rounded.

    w = s1 round(W / (s1 S2 s3)),   S2 [out, in] for each element, s3 [out, 1] for each output channel

(eq. 2 there), learned through a straight-through estimator. Unlike AdaRound's, a weight may move by more than one step, and
large weights move more easily: d/dS2 is proportional to W. ``s1`` is learned in the paper; here it is the stored scale and stays,
because scales of blocks lie on a grid of their own. S2 and s3 begin at 1 (rounding to nearest) and are kept positive by being
powers of e. Where the codes that exist are others than the nearest, S2 begins where the quotient rounds to them, as far as a
positive factor can reach.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.formats import elements
from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.learned import RECONSTRUCTIONS, Fit, Iterations, LearnedWeight, Rate, Share, candidates, code_values


class Divided(LearnedWeight):
    """A weight that is divided elementwise before it is rounded. Args as :class:`LearnedWeight`."""

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        super().__init__(weight, start)
        self.ratio = weight / self.scale
        self.elements = nn.Parameter(_start(self.ratio, start))
        self.channels = nn.Parameter(weight.new_zeros(len(weight), 1))

    def quotient(self) -> Tensor:
        """Return the quotient ``W / (s1 S2 s3)``: ``[out, in]``."""
        return self.ratio * torch.exp(-self.elements - self.channels)

    def forward(self) -> Tensor:
        quotient = self.quotient()
        rounded = elements.round_to_grid(quotient.detach(), self.start.format.element)
        return (quotient + (rounded - quotient.detach())) * self.scale

    def values(self) -> Tensor:
        return elements.round_to_grid(self.quotient(), self.start.format.element)


def _start(ratio: Tensor, start: QuantizedWeight) -> Tensor:
    """Return the log S2 with which the quotient rounds to the codes that exist: just inside their cell; 0 where it does
    already.
    """
    element, chosen = start.format.element, code_values(start)
    below, above = candidates(ratio, chosen, start)
    other = torch.where(below == chosen, above, below)
    inside = chosen + 0.49 * (other - chosen)  # on the side of the weight
    moved = elements.round_to_grid(ratio, element) != chosen
    reachable = moved & (inside * ratio > 0)
    return torch.where(reachable, torch.log((ratio / inside).clamp(min=1e-6)), torch.zeros_like(ratio))


@RECONSTRUCTIONS.register("flexround")
def flexround(fit: Fit, iterations: Iterations = 300, rate: Rate = 1e-3, bias_rate: Share = 0.0) -> None:
    """Learn the divisors of every weight of the block."""
    fit.learn(Divided, iterations, rate, bias_rate=bias_rate)
