"""Which blocks a head keeps: the heaviest of each row, and some whatever they weigh.

Every row of a head keeps equally many blocks (:mod:`qdiff.attention.lists` says why). Always among them: the row's own blocks
(the diagonal), and those that hold the first frame, which attention falls back on (a sink). How many a head keeps is decided
for all heads, layers and groups of timesteps together, by what the prediction loses (:mod:`qdiff.allocation.attention_masks`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.attention.lists import Tiling
from qdiff.attention.orders import Grid

STEPS = 16  # densities to choose from are multiples of 1 / STEPS


def always(order: Tensor, grid: Grid, tiling: Tiling) -> Tensor:
    """Return blocks that a head with that order always keeps: bool ``[rows, columns]``."""
    places = torch.arange(tiling.ordered, device=order.device)
    kept = order.new_zeros(tiling.rows, tiling.columns, dtype=torch.bool)
    kept[places // tiling.block_q, places // tiling.block_k] = True
    if grid[0] > 1:
        first = (order < grid[1] * grid[2]).float()
        inside = first.new_zeros(tiling.columns).index_add_(0, places // tiling.block_k, first)
        kept |= inside >= tiling.block_k / 2  # in orders that spread the first frame over all blocks, none is its block
    return kept


def widths(tiling: Tiling) -> list[int]:
    """Return numbers of blocks that a row may keep, rising; the last is all of them."""
    every = tiling.columns
    return sorted({max(1, round(every * part / STEPS)) for part in range(1, STEPS + 1)})


def choose_blocks(mass: Tensor, kept: Tensor, width: int) -> Tensor:
    """Return the ``width`` blocks of each row with the most mass, ``kept`` before others.

    Args:
        mass: ``[rows, columns]``, at least 0: how much attention a block of queries pays to a block of keys.
        kept: bool, the same shape. A row with more of them than ``width`` loses the lightest.
        width: blocks of each row.

    Returns:
        bool ``[rows, columns]`` with exactly ``width`` in each row.
    """
    weight = mass.double() + kept.double() * (1 + mass.double().max())
    chosen = torch.zeros_like(kept)
    return chosen.scatter_(1, weight.topk(width, dim=1).indices, True)


def recall(mass: Tensor, chosen: Tensor) -> float:
    """Return the share of the mass that the chosen blocks hold."""
    total = float(mass.double().sum())
    return float(mass.double()[chosen].sum()) / total if total else 1.0
