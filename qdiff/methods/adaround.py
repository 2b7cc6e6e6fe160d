"""AdaRound (arXiv 2004.10568): each weight is rounded up or down, whichever brings the block's output nearer to float.

With neighbours ``lower`` and ``upper`` on the grid (:func:`qdiff.methods.learned.candidates`), in codes' units,

    w = s (lower + (upper - lower) h),   h(V) = clip(sigmoid(V / u) (zeta - gamma) + gamma, 0, 1),   zeta = 1.1, gamma = -0.1

(eqs. 16 and 23 there) begins at the float weight exactly, and at the end h is cut at one half, so what is stored lies on the
grid whatever h was. In between the paper computes with the soft h, and a penalty ``1 - |2h - 1|^beta`` (eq. 24) with beta falling
from 20 to 2 after a warm-up drives every h to 0 or 1 (``straight_through: false``). That takes thousands of iterations: after 300
the soft block was 0.8 dB nearer to float and the cut one 0.1 (docs/log). So the default computes with the cut h from the
start, the gradient going straight through to the soft one, without a penalty: what is learned on is what is stored.

On a grid of floats the step differs from binade to binade. ``u`` is 1 in AdaRound; FP4DiT (arXiv 2503.15465) takes
``u = upper - lower``, which cancels the step in dw/dV = s (upper - lower) h'(V / u) / u: every binade moves at one rate. For
integers both are the same.

``lean`` moves the start from the float weight (0) towards the codes that exist (1), GPTQ's for instance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.learned import RECONSTRUCTIONS, Fit, Iterations, LearnedWeight, Rate, Share, candidates, code_values

ZETA, GAMMA = 1.1, -0.1
WARM_UP, BETA_FIRST, BETA_LAST = 0.2, 20.0, 2.0


class RoundedUpOrDown(LearnedWeight):
    """A weight whose elements choose between two neighbours. Args as :class:`LearnedWeight`; others in the module's docstring."""

    def __init__(
        self,
        weight: Tensor,
        start: QuantizedWeight,
        scale_aware: bool = True,
        lean: float = 0.0,
        straight_through: bool = False,
    ) -> None:
        super().__init__(weight, start)
        self.straight_through = straight_through
        ratio, chosen = weight / self.scale, code_values(start)
        self.lower, self.upper = candidates(ratio, chosen, start)
        self.gap = self.upper - self.lower
        open_ = self.gap > 0
        unit = torch.where(open_, self.gap, torch.ones_like(self.gap))
        exact = ((ratio - self.lower) / unit).clamp(0, 1)
        h = torch.where(open_, torch.lerp(exact, (chosen - self.lower) / unit, lean), torch.zeros_like(exact))
        self.unit = unit if scale_aware else torch.ones_like(unit)
        share = ((h - GAMMA) / (ZETA - GAMMA)).double()
        self.variable = nn.Parameter((torch.logit(share) * self.unit).float())

    def soft(self) -> Tensor:
        """Return h(V) ``[out, in]``."""
        return (torch.sigmoid(self.variable / self.unit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        h = self.soft()
        if self.straight_through:
            h = h + ((h >= 0.5).float() - h).detach()
        return torch.addcmul(self.lower, self.gap, h) * self.scale

    def penalty(self, progress: float) -> Tensor | None:
        if progress < WARM_UP or self.straight_through:
            return None
        beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * (progress - WARM_UP) / (1 - WARM_UP)
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).mean()

    def values(self) -> Tensor:
        return torch.where(self.soft() >= 0.5, self.upper, self.lower)


@RECONSTRUCTIONS.register("adaround")
def adaround(
    fit: Fit,
    iterations: Iterations = 300,
    rate: Rate = 1e-2,
    straight_through: bool = True,
    penalty: Rate = 0.1,
    scale_aware: bool = True,
    lean: Share = 0.6,
    bias_rate: Share = 0.0,
) -> None:
    """Learn whether each weight of the block is rounded up or down. With ``lean`` of one half or more it begins at the
    codes that exist.
    """

    def make(weight: Tensor, start: QuantizedWeight) -> RoundedUpOrDown:
        return RoundedUpOrDown(weight, start, scale_aware, lean, straight_through)

    fit.learn(make, iterations, rate, penalty, bias_rate)
