"""Decide which blocks of its keys each attention head reads, for all heads, layers and groups of timesteps within one density.

How many blocks a head keeps is a knapsack problem over the errors that calibration measured (:func:`allocate_blocks`); which
ones is :mod:`qdiff.attention.masks`' (the heaviest, and those that a head always reads).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qdiff.allocation.knapsack import allocate
from qdiff.attention import masks
from qdiff.attention.orders import order_named
from qdiff.attention.schedule import Schedule
from qdiff.attention.statistics import AttentionStatistics
from qdiff.errors import InputError
from qdiff.plan.attention_plan import AttentionPlan, HeadPlan, SparseLayer


def decide_masks(
    statistics: AttentionStatistics, density: float, numerics: str, timesteps: list[float], dense_layers: int
) -> tuple[AttentionPlan, Tensor]:
    """Return which blocks every head reads.

    Args:
        statistics: of the self-attentions that may be sparse.
        density: mean share of the blocks, over layers and groups that are sparse.
        numerics: a name of :data:`qdiff.attention.numerics.NUMERICS`.
        timesteps: recorded ones, for the overall density.
        dense_layers: self-attentions that are not in ``statistics`` and stay dense.

    Returns:
        the plan, and bool masks ``[groups, heads of all layers, rows, columns]``.

    Raises:
        InputError: a density that cannot be had.
    """
    tiling, columns = statistics.tiling, statistics.tiling.columns
    wanted = allocate_blocks(statistics.errors, statistics.options, columns, density)
    chosen = torch.zeros(statistics.mass.shape, dtype=torch.bool)
    layers = []
    for layer, name in enumerate(statistics.layers):
        heads = []
        for head, order in enumerate(statistics.orders[layer]):
            kept = masks.always(order_named(order, statistics.grid), statistics.grid, tiling)
            entry = HeadPlan(order=order, density=[], recall=[], error=[])
            for group in range(len(chosen)):
                mass, width = statistics.mass[group, layer, head].float(), int(wanted[group, layer, head])
                chosen[group, layer, head] = masks.choose_blocks(mass, kept, width)
                entry.density.append(width / columns)
                entry.recall.append(masks.recall(mass, chosen[group, layer, head]))
                option = statistics.options.index(width)
                entry.error.append(float(statistics.errors[group, layer, head, option]))
            heads.append(entry)
        layers.append(SparseLayer(name=name, heads=heads))
    by_group = wanted.double().mean(dim=(1, 2)) / columns
    plan = AttentionPlan(
        numerics=numerics,
        asked=density,
        density=float(by_group.mean()),
        overall=_overall(by_group, statistics.edges, timesteps, len(statistics.layers), dense_layers),
        tokens=tiling.tokens,
        text=tiling.text,
        block_q=tiling.block_q,
        block_k=tiling.block_k,
        grid=statistics.grid,
        edges=statistics.edges,
        layers=layers,
    )
    return plan, chosen.flatten(1, 2)


def _overall(by_group: Tensor, edges: list[float], timesteps: list[float], sparse: int, dense: int) -> float:
    schedule = Schedule(edges, [])
    densities = [1.0, *by_group.tolist()]
    steps = [densities[schedule.group(timestep)] for timestep in timesteps]
    mean = sum(steps) / len(steps)
    return (mean * sparse + dense) / (sparse + dense)


def allocate_blocks(errors: Tensor, options: list[int], columns: int, density: float) -> Tensor:
    """Return how many blocks each row keeps, by group of timesteps, layer and head: the least error within one budget.

    Args:
        errors: ``[groups, layers, heads, options]``: what is lost when a head keeps ``options[i]`` blocks.
        options: rising.
        columns: all blocks of a row.
        density: mean share of the blocks that may be read.

    Returns:
        int64 ``[groups, layers, heads]``.

    Raises:
        InputError: a density that even the fewest blocks exceed.
    """
    if options[0] / columns > density:
        raise InputError(
            f"a density of {density:g} is below {options[0] / columns:.3f}, one block of {columns} in a row",
            f"at least {math.ceil(1000 * options[0] / columns) / 1000:g} can be had",
        )
    flat = errors.reshape(-1, len(options))
    monotone = flat.flip(1).cummax(dim=1).values.flip(1)  # reading more is never worse: what says so is noise
    costs = torch.tensor(options, dtype=torch.float64).expand_as(flat)
    choice = allocate(monotone, costs, density * columns * len(flat))
    return torch.tensor(options)[choice].view(errors.shape[:-1])
