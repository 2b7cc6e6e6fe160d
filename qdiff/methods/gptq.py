"""GPTQ: round one column after the other, and let the columns that are still float make up for the error.

With H = 2 X Xᵀ / n of the layer's quantized inputs, the error of column j is spread over the later columns along row j of the
Cholesky factor of H⁻¹ (arXiv 2210.17323, eqs. 2 and 3 in the form of its algorithm 1). Scales are fixed beforehand from the whole
weight, so groups and blocks keep their layout although the columns with the largest diag(H) go first: the static activation order
of MR-GPTQ (arXiv 2509.23202). Everything is computed in float64.

Few tokens make H singular; damping (a share of its mean diagonal) is raised tenfold until it factors. With H = 1 the result
is rounding to nearest. It is kept where the outputs on the fitting tokens are nearer to float than with the codes before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats import scales
from qdiff.formats.weight import QuantizedWeight
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Columns = Annotated[int, Field(ge=1, le=4096)]
ATTEMPTS = 4


def inverse_factor(hessian: Tensor, damping: float, names: list[str]) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float64 ``[in, in]``, and the damping that it
    took.

    Raises:
        InputError: no damping makes it positive definite: the inputs are not numbers, or all are zero.
    """
    mean = hessian.diagonal().mean()
    for attempt in range(
        ATTEMPTS
    ):  # of a wide layer each matrix is hundreds of megabytes: never more than three of them
        share = damping * 10**attempt
        matrix = hessian.clone()
        matrix.diagonal().add_(share * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and mean > 0:
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed:
                return matrix, share
    raise InputError(
        f"gptq: the inputs of layer {names[0]} have no positive definite Hessian, even with damping {share:g}",
        "calibrate with more prompts, or keep this layer (recipe: ignore)",
    )


def round_columns(weight: Tensor, nearest: QuantizedWeight, factor: Tensor, order: Tensor, width: int) -> Tensor:
    """Return values on the grid of ``nearest`` for ``weight [out, in]``, chosen column by column in ``order``.

    Args:
        weight: ``[out, in]``.
        nearest: the weight rounded to nearest, whose grid is kept.
        factor: of the Hessian's inverse, in that order.
        order: of the columns ``[in]``.
        width: columns after which the rest of the weight is updated; it changes speed alone.
    """
    scale, left = nearest.scale_of_each()[:, order], weight.double()[:, order].clone()
    values = torch.empty_like(left)
    for start in range(0, left.shape[1], width):
        stop = min(start + width, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            now = left[:, column]
            rounded = scales.quantize_dequantize(now.float(), scale[:, column], nearest.format).double()
            values[:, column] = rounded
            error = (now - rounded) / factor[column, column]
            left[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return values[:, torch.argsort(order)].float()


@METHODS.register("gptq")
def gptq(
    layer_group: LayerGroup,
    decisions: Decisions,
    damping: Positive = 0.01,
    width: Columns = 128,
    minimum_gain_db: Decibels = 0.0,
) -> Decisions:
    """Round every layer of the group by GPTQ, on the decisions' transform and scales."""
    rows = layer_group.rows(held_out=False)
    if len(rows.x) < 2:
        raise InputError(
            f"gptq: layer {layer_group.names[0]} has {len(rows.x)} tokens to fit on",
            "calibrate with more prompts or steps",
        )
    inputs = layer_group.quantized_inputs(decisions, rows).double()
    hessian = (inputs.T @ inputs).mul_(2 / len(inputs))
    del inputs
    if not hessian.diagonal().any():
        return decisions.decide("gptq", "its input is zero on every token: to nearest")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order].index_select(1, order)
    factor, share = inverse_factor(hessian, damping, layer_group.names)
    del hessian
    nearest = layer_group.nearest_weights(decisions)
    rounded = tuple(
        start.with_values(round_columns(weight, start, factor, order, width))
        for weight, start in zip(layer_group.residuals(decisions), nearest, strict=True)
    )
    gain = decibels(layer_group.error(replace(decisions, rounded=rounded)), layer_group.error(decisions))
    if gain <= minimum_gain_db:
        return decisions.decide("gptq", f"to nearest (GPTQ {gain:+.1f} dB)")
    raised = f", damping {share:g}" if share != damping else ""
    return decisions.decide("gptq", f"GPTQ gains {gain:.1f} dB{raised}", rounded=rounded)
