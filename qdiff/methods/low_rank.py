"""A low-rank branch in 16 bit beside the quantized weight: W = up · down + R, and only R is quantized.

SVDQuant (arXiv 2411.05007) takes the largest singular directions out of the smoothed weight, so that what is left has fewer
outliers, and then goes on: quantize R, refit the branch to W - Q(R). Each candidate is judged by the outputs; the best is kept.

With ``weighted`` the branch minimises the error of the outputs, not of the weight: with the inputs' second moment H = S Sᵀ,
``‖(D - up · down) S‖`` is least for the SVD of D S with S⁻¹ multiplied back (the Hessian-weighted form). That is what makes a
small rank worth having. Both factors are rounded to float16, as they are stored, before R is formed: R holds that error too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats.scales import fits_float16, to_half_grid
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels

Rank = Annotated[int, Field(ge=1)]
Times = Annotated[int, Field(ge=1, le=1000)]
DAMPING = 0.01


def factors(matrix: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``down [rank, in]``, ``up [out, rank]``: the best approximation of ``matrix [out, in]``, on the float16
    grid.

    Args:
        matrix: ``[out, in]``.
        rank: of the approximation.
        root: S ``[in, in]`` of the weighted form, float64; ``None``: unweighted.
    """
    wide = matrix.double()
    u, s, vt = torch.linalg.svd(wide if root is None else wide @ root, full_matrices=False)
    up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vt[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
        balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
        up, down = up * balance, down / balance[:, None]
    return to_half_grid(down.float()), to_half_grid(up.float())


@METHODS.register("low_rank")
def low_rank(
    layer_group: LayerGroup,
    decisions: Decisions,
    rank: Rank = 32,
    iterations: Times = 4,
    weighted: bool = True,
    minimum_gain_db: Decibels = 0.1,
) -> Decisions:
    """Add a branch of ``rank`` to every layer of the group where it gains at least ``minimum_gain_db``.

    Raises:
        InputError: the rank is not smaller than the layer.
    """
    for name, weight in zip(layer_group.names, layer_group.weights, strict=True):
        if rank >= min(weight.shape):
            raise InputError(
                f"low_rank: rank {rank} is not smaller than layer {name} of shape {list(weight.shape)}",
                "choose a smaller rank, or keep this layer (recipe: ignore)",
            )
    moved = layer_group.transformed_weights(decisions)
    root = _root(layer_group, decisions) if weighted else None
    best, least = decisions, (plain := layer_group.error(decisions))
    branches = tuple(factors(weight, rank, root) for weight in moved)
    for _ in range(iterations):
        trial = replace(decisions, low_rank=branches, rounded=None, rounding="nearest")
        error = layer_group.error(trial)
        if error < least:
            best, least = trial, error
        quantized = layer_group.nearest_weights(trial)
        branches = tuple(
            factors(weight - rest.dequantize(), rank, root) for weight, rest in zip(moved, quantized, strict=True)
        )
    gain = decibels(least, plain)
    if best.low_rank is not None and not fits_float16(*itertools.chain(*best.low_rank)):
        return decisions.decide("low_rank", "no low-rank branch (its factors are beyond float16)")
    if best is decisions or gain < minimum_gain_db:
        return decisions.decide("low_rank", f"no low-rank branch (rank {rank} would gain {gain:.1f} dB)")
    return decisions.decide("low_rank", f"rank {rank} gains {gain:.1f} dB", low_rank=best.low_rank)


def _root(layer_group: LayerGroup, decisions: Decisions) -> Tensor:
    x = layer_group.rows(held_out=False).x
    moved = decisions.inputs(x).double()
    moment = moved.T @ moved / max(len(moved), 1)
    mean = moment.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.cholesky(
        moment + torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * (DAMPING * mean)
    )
