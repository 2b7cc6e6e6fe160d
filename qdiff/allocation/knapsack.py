"""Which format each group of layers gets: a small integer program, solved exactly.

    minimise sum_i sum_j e[i, j] x[i, j]   with   sum_j x[i, j] = 1,   sum_i sum_j c[i, j] x[i, j] <= budget,   x in {0, 1}

``e`` is what a group costs in quality when it alone is in a format (:mod:`qdiff.allocation.sensitivity`), ``c`` what it
costs to store or to run (:mod:`qdiff.allocation.costs`). Errors of different layers add up: they are nearly uncorrelated,
which the report checks by pictures. SciPy's HiGHS solves it by branch and bound; there is no heuristic of ours (MixDQ,
section 3.3, and HAWQ-V3, eq. 7, have the same program). A proxy misleads now and then, so :func:`best` gives several
solutions to choose from by pictures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qdiff.errors import InputError

GAP = 1e-5  # of the whole error: distance to the bound at which HiGHS may stop in programs of more than SMALL choices
SMALL = 1000
SECONDS = 60.0  # for one solution
CORE = 64  # choices beyond one for each item that are looked at first
PATIENCE = 3  # rounds of four times as many choices that may bring nothing, in programs of more than SMALL choices
BISECTIONS = 100


def allocate(
    errors: Tensor, costs: Tensor, budget: float, forbidden: list[Tensor] | None = None, fixed: float = 0.0
) -> Tensor:
    """Return the cheapest errors within a budget.

    Args:
        errors: ``[N, M]``, of item ``i`` in format ``j``, at least 0; infinite where a format is not to be had.
        costs: ``[N, M]``, finite, at least 0.
        budget: what the costs may add up to.
        forbidden: earlier solutions ``[N]`` that are not wanted again.
        fixed: what was taken off the budget before, for messages.

    Returns:
        the format of every item, int64 ``[N]``.

    Raises:
        InputError: no solution costs so little; says how little the cheapest costs.
    """
    errors, costs = errors.double(), costs.double()
    count = len(errors)
    possible = errors.isfinite()
    if not bool(possible.any(dim=1).all()):
        raise InputError(f"item {int((~possible.any(dim=1)).nonzero()[0])} can have none of the formats")
    least = cheapest(errors, costs)
    if least > budget * (1 + 1e-9):
        raise InputError(
            f"the budget {budget + fixed:.6g} is below {least + fixed:.6g}, what the cheapest formats come to",
            "raise the budget, allow cheaper formats, or lower mixed.minimum",
        )
    reduced, bound = _relaxed(errors, costs, budget)
    order = reduced[possible].sort().values
    small, core, found = errors.numel() <= SMALL, CORE, [math.inf]
    while True:
        slack = float(order[min(count + core, len(order)) - 1])
        choice = _solve(errors, costs, budget, (reduced <= slack) & possible, forbidden or [])
        everything = count + core >= len(order)
        if choice is not None:
            found.append(total(errors, choice))
            # whatever was left out costs the bound and its own reduced cost at least
            proven = everything or found[-1] - bound <= max(slack, 0.0 if small else GAP * abs(bound))
            stuck = len(found) > PATIENCE and found[-1] >= found[-PATIENCE]
            if proven or (stuck and not small):
                return choice
        elif everything:
            raise InputError(
                f"no allocation fits the budget {budget + fixed:.6g} but those that were found", "raise the budget"
            )
        core *= 4


def _relaxed(errors: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, float]:
    """Return what every choice costs beyond the best one at the budget's price, ``[N, M]``, and the relaxed program's
    optimum: no solution with a choice of reduced cost ``r`` is better than the optimum plus ``r`` (Pisinger, A minimal
    algorithm for the multiple-choice knapsack problem, EJOR 1995, section 3).

    The price is that of one unit of the budget, at which the cheapest sum of errors and prices just fits.
    """
    low, high = 0.0, 1e-12

    def fits(price: float) -> bool:
        return total(costs, (errors + price * costs).argmin(dim=1)) <= budget

    if not fits(0.0):
        high = float((errors[errors.isfinite()].max() - errors.min()) / costs.abs().max().clamp(min=1e-300)) + 1e-12
        while not fits(high) and high < 1e300:
            high *= 4
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
    price = high if low else 0.0
    priced = errors + price * costs
    least = priced.amin(dim=1, keepdim=True)
    return priced - least, float(least.sum()) - price * budget


def _solve(errors: Tensor, costs: Tensor, budget: float, among: Tensor, forbidden: list[Tensor]) -> Tensor | None:
    """Return the best choice among the marked ones, ``None`` where none of them fits."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    open_items = (among.sum(dim=1) > 1).nonzero().flatten()
    fixed = among.long().argmax(dim=1)  # of items with one choice
    settled = torch.ones(len(errors), dtype=torch.bool)
    settled[open_items] = False
    left = budget - float(costs.gather(1, fixed[:, None]).flatten()[settled].sum())
    bans = [ban for ban in forbidden if bool((ban == fixed)[settled].all())]
    items, formats = among[open_items].nonzero(as_tuple=True)
    if not len(items):
        return fixed if left >= -1e-9 * abs(budget) and not bans else None
    rows = open_items[items]
    objective = errors[rows, formats].numpy()
    gap = 0.0
    if errors.numel() > SMALL:
        everything = float(errors.gather(1, fixed[:, None]).sum())
        gap = min(GAP * everything / max(float(errors[open_items].amin(dim=1).sum()), 1e-300), 0.1)
    objective = objective / max(float(objective.max()), 1e-300)  # HiGHS' tolerances are absolute
    spent = costs[rows, formats].numpy()
    scale = max(float(spent.sum()), 1e-300)
    places = np.arange(len(items))
    one_each = csr_array((np.ones(len(items)), (items.numpy(), places)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(spent[None] / scale), -np.inf, (left + 1e-9 * abs(budget)) / scale),
    ]
    for ban in bans:
        chosen = (ban[rows] == formats).double().numpy()
        constraints.append(LinearConstraint(csr_array(chosen[None]), -np.inf, len(open_items) - 1))
    result = milp(
        objective,
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    choice = fixed.clone()
    taken = torch.from_numpy(result.x > 0.5)
    choice[rows[taken]] = formats[taken]
    return choice


def best(errors: Tensor, costs: Tensor, budget: float, count: int, fixed: float = 0.0) -> list[Tensor]:
    """Return up to ``count`` different solutions of :func:`allocate`, the best first. Arguments and errors as there."""
    found: list[Tensor] = []
    for _ in range(count):
        try:
            found.append(allocate(errors, costs, budget, found, fixed))
        except InputError:
            if not found:
                raise
            break
    return sorted(found, key=lambda choice: total(errors, choice))


def cheapest(errors: Tensor, costs: Tensor) -> float:
    """Return what the cheapest formats that can be had add up to."""
    return float(torch.where(errors.isfinite(), costs, torch.inf).amin(dim=1).double().sum())


def total(table: Tensor, choice: Tensor) -> float:
    """Return what the chosen entries of a table ``[N, M]`` add up to."""
    return float(table.double().gather(1, choice[:, None]).sum())


def equal_loss_bits(sensitivities: Tensor, sizes: Tensor, mean: float) -> Tensor:
    """Return the closed form of BAQ: real-valued bits at which every item loses the same.

    With losses ``c_i 2^(-2 R_i)`` and ``sum_i n_i R_i = mean sum_i n_i`` the optimum is ``R_i = mean + 1/2 log2(c_i / g)``, where
    ``g`` is the geometric mean of the ``c_i``, weighted by ``n_i`` (BAQ, arXiv 2506.05664, section 3; there for equal sizes and
    losses by weight, so ``c_i`` is a loss by weight here too).

    Args:
        sensitivities: ``c [N]``, above 0.
        sizes: ``n [N]``, weights of each item.
        mean: bits on average.

    Returns:
        ``R [N]``, float64.
    """
    logarithms = sensitivities.double().log2()
    sizes = sizes.double()
    return mean + 0.5 * (logarithms - (sizes * logarithms).sum() / sizes.sum())
