"""Which format each group of layers gets: a small integer program, solved exactly.

    minimise sum_i sum_j e[i, j] x[i, j]   with   sum_j x[i, j] = 1,   sum_i sum_j c[i, j] x[i, j] <= budget,   x in {0, 1}

``e`` is what a group costs in quality when it alone is in a format (:mod:`qdiff.sensitivity`), ``c`` what it costs to store or to
run (:mod:`qdiff.costs`). Errors of different layers add up: they are nearly uncorrelated, which the report checks by pictures.
SciPy's HiGHS solves it by branch and bound; there is no heuristic of ours (MixDQ, section 3.3, and HAWQ-V3, eq. 7, have the same
program). A proxy misleads now and then, so :func:`best` gives several solutions to choose from by pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.errors import InputError

GAP = 1e-5  # relative distance to the bound at which HiGHS may stop, where trees grow large; small programs are solved out
SECONDS = 60.0  # for one solution


def allocate(
    errors: Tensor, costs: Tensor, budget: float, forbidden: list[Tensor] | None = None, fixed: float = 0.0
) -> Tensor:
    """The cheapest errors within a budget.

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
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count, formats = errors.shape
    possible = errors.isfinite()
    if not bool(possible.any(dim=1).all()):
        raise InputError(f"item {int((~possible.any(dim=1)).nonzero()[0])} can have none of the formats")
    least = cheapest(errors, costs)
    if least > budget * (1 + 1e-9):
        raise InputError(
            f"the budget {budget + fixed:.6g} is below {least + fixed:.6g}, what the cheapest formats come to",
            "raise the budget, allow cheaper formats, or lower mixed.minimum",
        )
    objective = torch.where(possible, errors, 0.0).double().flatten().numpy()
    objective = objective / max(float(objective.max()), 1e-300)  # HiGHS' tolerances are absolute
    rows = np.repeat(np.arange(count), formats)
    columns = np.arange(count * formats)
    one_each = LinearConstraint(csr_array((np.ones(len(columns)), (rows, columns))), 1, 1)
    scale = max(float(costs.double().sum()), 1e-300)
    within = LinearConstraint(
        csr_array(costs.double().flatten().numpy()[None] / scale), -np.inf, budget * (1 + 1e-9) / scale
    )
    constraints = [one_each, within]
    for solution in forbidden or []:
        chosen = np.zeros(count * formats)
        chosen[np.arange(count) * formats + solution.numpy()] = 1
        constraints.append(LinearConstraint(csr_array(chosen[None]), -np.inf, count - 1))
    result = milp(
        objective,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, possible.flatten().double().numpy()),
        constraints=constraints,
        options={"mip_rel_gap": GAP if count * formats > 1000 else 0.0, "time_limit": SECONDS},
    )
    if result.x is None:
        raise InputError(f"no allocation fits the budget {budget + fixed:.6g} ({result.message})", "raise the budget")
    return torch.from_numpy(result.x.reshape(count, formats).argmax(1))


def best(errors: Tensor, costs: Tensor, budget: float, count: int, fixed: float = 0.0) -> list[Tensor]:
    """Up to ``count`` different solutions of :func:`allocate`, the best first. Arguments and errors as there."""
    found: list[Tensor] = []
    for _ in range(count):
        try:
            found.append(allocate(errors, costs, budget, found, fixed))
        except InputError:
            if not found:
                raise
            break
    return found


def cheapest(errors: Tensor, costs: Tensor) -> float:
    """What the cheapest formats that can be had add up to."""
    return float(torch.where(errors.isfinite(), costs, torch.inf).amin(dim=1).double().sum())


def total(table: Tensor, choice: Tensor) -> float:
    """What the chosen entries of a table ``[N, M]`` add up to."""
    return float(table.double().gather(1, choice[:, None]).sum())


def equal_loss_bits(sensitivities: Tensor, sizes: Tensor, mean: float) -> Tensor:
    """BAQ's closed form: real-valued bits at which every item loses the same.

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
