"""Which branch each block takes at each timestep, by a budget of bits: a small integer program, solved exactly.

    minimise    sum_bt e[b, t, z_bt]
    subject to  mean over t of sum_b w_b bits_b[z_bt] <= budget
                z_bt the same for all t, but for at most ``routed`` blocks

``e`` is the measured squared error of the prediction when block b alone takes a branch at timestep t, ``w_b`` its share of the
weights. With ``routed = 0`` it is the best plan that never switches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import InputError


@dataclass(frozen=True)
class Costs:
    """What branches cost.

    Args:
        weight_bits, activation_bits: ``[blocks, branches]``, float64.
        shares: ``[blocks]``: of each block in all their weights.
    """

    weight_bits: Tensor
    activation_bits: Tensor
    shares: Tensor

    def used(self, table: Tensor) -> float:
        """Return the mean bits of the weights that a table ``[blocks, timesteps]`` of branches computes with."""
        return self._mean(self.weight_bits, table)

    def used_activations(self, table: Tensor) -> float:
        """Return the same for activations."""
        return self._mean(self.activation_bits, table)

    def resident(self, branches: list[list[int]]) -> float:
        """Return the mean bits of all that is kept in memory: ``branches`` of each block."""
        kept = torch.stack([self.weight_bits[index, chosen].sum() for index, chosen in enumerate(branches)])
        return float((kept * self.shares).sum())

    def _mean(self, bits: Tensor, table: Tensor) -> float:
        return float((bits.gather(1, table) * self.shares[:, None]).mean(dim=1).sum())


def solve_routes(errors: Tensor, costs: Costs, budget: float, routed: int) -> Tensor:
    """Return the cheap blocks and timesteps.

    Args:
        errors: ``[blocks, timesteps, 2]``: careful, cheap.
        costs: of two branches.
        budget: of bits, on average.
        routed: how many blocks may switch.

    Returns:
        int64 ``[blocks, timesteps]``: 0 careful, 1 cheap.

    Raises:
        InputError: a budget that all cheap blocks exceed.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    bits, weights = costs.weight_bits, costs.shares
    blocks, steps, _ = errors.shape
    least = float((bits.amin(dim=1) * weights).sum())
    if budget < least * (1 - 1e-9):
        raise InputError(
            f"the budget of {budget:g} bits is below {least:.4g}, what the cheap branches come to", "raise the budget"
        )
    # x[b, t]: cheap; s[b]: what a block that does not switch has; r[b]: whether it switches
    count = blocks * steps
    gain = (errors[..., 1] - errors[..., 0]).double()
    scale = max(float(gain.abs().max()), 1e-300)
    objective = np.concatenate([(gain / scale).flatten().numpy(), np.zeros(2 * blocks)])
    saved = ((bits[:, 1] - bits[:, 0]) * weights / steps).double()
    spent = np.concatenate([saved.repeat_interleave(steps).numpy(), np.zeros(2 * blocks)])
    careful = float((bits[:, 0] * weights).sum())
    rows = lil_array((2 * count, count + 2 * blocks))
    for block in range(blocks):
        for step in range(steps):
            row = 2 * (block * steps + step)
            for offset, sign in ((0, 1.0), (1, -1.0)):  # |x - s| <= r
                rows[row + offset, block * steps + step] = sign
                rows[row + offset, count + block] = -sign
                rows[row + offset, count + blocks + block] = -1.0
    switching = np.concatenate([np.zeros(count + blocks), np.ones(blocks)])
    result = milp(
        objective,
        integrality=np.ones(count + 2 * blocks),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(spent[None], -np.inf, budget * (1 + 1e-9) - careful),
            LinearConstraint(rows.tocsr(), -np.inf, 0),
            LinearConstraint(switching[None], 0, min(routed, blocks)),
        ],
        options={"mip_rel_gap": 1e-5, "time_limit": 60.0},
    )
    if result.x is None:
        raise InputError(f"no routes fit the budget of {budget:g} bits ({result.message})", "raise the budget")
    return torch.from_numpy(result.x[:count].reshape(blocks, steps).round()).long()
