"""Predictors of a block's quantization error from what it changed the step before, and the threshold that keeps a budget.

    E_rel(block, t) = slope * change(block, t - 1) + intercept          (6Bit-Diffusion, arXiv 2603.18742)

fitted by least squares on the recorded trajectory, every sample a branch of guidance of one prompt. How well they predict is
told on prompts that they were not fitted on.
"""

from __future__ import annotations

from torch import Tensor

from qdiff.allocation.route_table import Costs


def fit(changes: Tensor, errors: Tensor, held_out: Tensor) -> tuple[float, float, float | None]:
    """Return the slope and the intercept of one block, and R^2 on the held-out samples (``None`` where there are none,
    or all errors alike).

    Args:
        changes: ``[steps, samples]``.
        errors: ``[steps, samples]``, relative, of the cheap branch at the same calls.
        held_out: bool ``[samples]``.
    """
    before, after = changes[:-1].double(), errors[1:].double()
    x, y = before[:, ~held_out].flatten(), after[:, ~held_out].flatten()
    spread = (x - x.mean()).square().sum()
    slope = 0.0 if float(spread) == 0 else float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean()) - slope * float(x.mean())
    x, y = before[:, held_out].flatten(), after[:, held_out].flatten()
    left, whole = (y - slope * x - intercept).square().sum(), (y - y.mean()).square().sum()
    return slope, intercept, None if y.numel() < 2 or float(whole) == 0 else 1 - float(left / whole)


def threshold(scores: Tensor, costs: Costs, budget: float) -> float:
    """Return the least threshold whose routes keep a budget.

    Bits fall as the threshold rises, one block and step after the other, so it is found by bisection among the scores.

    Args:
        scores: predicted errors ``[blocks, steps, calls]``; infinite where the careful branch is taken in any case. A batch of
            samples counts as one call.
        costs: of the careful and the cheap branch.
        budget: mean bits that the routes may take.

    Returns:
        careful above it. The largest finite score, where even that spends more than the budget.
    """
    ordered = scores[scores.isfinite()].unique()
    if not len(ordered):
        return 0.0

    def spent(limit: float) -> float:
        return costs.used((scores <= limit).long().flatten(1))

    if spent(float("-inf")) <= budget:
        return -1.0
    low, high = 0, len(ordered) - 1
    while low < high:
        middle = (low + high) // 2
        if spent(float(ordered[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return float(ordered[low])
