"""Rotation of the input (:mod:`qdiff.nn.rotations`): an outlier is spread over its block before the quantizer sees it.

It helps grids whose step follows the largest value (INT4, INT8, MXFP4), and costs NVFP4 something: a float grid is fine near
zero, where rotated values are not (MR-GPTQ, arXiv 2509.23202: NVFP4 94.7 % to 93.8 %). So *no rotation* is always a candidate.
For MR-GPTQ's own setting let the block be that of the format and let ``scales`` and ``gptq`` follow.

Which kinds are tried is the ``choice``: ``error`` tries all of ``kinds`` and keeps the best; ``fluctuation`` is LRQ-DiT's rule
(arXiv 2508.03485): with J = ‖X‖_F / sqrt(N C) below 1 a Hadamard matrix, above it the rotation fitted to outliers.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qdiff.errors import InputError
from qdiff.methods.base import METHODS, Decibels, Decisions, LayerGroup, decibels
from qdiff.nn.rotations import BLOCKS, Rotation, hadamard, largest_block, outlier_rotation

Kind = Literal["hadamard", "randomised", "outlier"]
Kinds = Annotated[tuple[Kind, ...], Field(min_length=1)]
Most = Annotated[int, Field(ge=4, le=256)]


def fluctuation(x: Tensor) -> float:
    """Return the fluctuation J of LRQ-DiT: the root mean square of tokens ``x [N, in]``."""
    return float(x.double().square().mean().sqrt())


def rotated(layer_group: LayerGroup, decisions: Decisions, kind: Kind, block: int) -> Decisions:
    """Return the decisions with a rotation of that kind, in place of one that is there."""
    if kind == "hadamard":
        return decisions.decide("rotate", "", rotation=Rotation(hadamard(block).to(layer_group.weights[0])))
    if kind == "randomised":
        signs = torch.ones(layer_group.weights[0].shape[1])
        generator = torch.Generator().manual_seed(zlib.crc32(layer_group.names[0].encode()))
        signs[torch.rand(len(signs), generator=generator) < 0.5] = -1
        signs, last = signs.to(layer_group.weights[0]), hadamard(block).to(layer_group.weights[0])
        multiplier = signs if decisions.input_multiplier is None else decisions.input_multiplier * signs
        shift = None if decisions.shift is None else decisions.shift * signs
        return decisions.decide("rotate", "", input_multiplier=multiplier, shift=shift, rotation=Rotation(last))
    x = layer_group.rows(held_out=False).x
    unrotated = decisions.decide("rotate", "", rotation=None)
    return decisions.decide("rotate", "", rotation=outlier_rotation(unrotated.inputs(x), block))


@METHODS.register("rotate")
def rotate(
    layer_group: LayerGroup,
    decisions: Decisions,
    kinds: Kinds = ("hadamard", "randomised", "outlier"),
    most: Most = 64,
    choice: Literal["error", "fluctuation"] = "error",
    minimum_gain_db: Decibels = 0.3,
) -> Decisions:
    """Rotate where that gains at least ``minimum_gain_db`` (a product with a small matrix is not free).

    Args:
        layer_group: the layers that share an input.
        decisions: what was decided before.
        kinds: of rotations that are tried.
        most: the largest block to mix; the largest power of 4 that divides the layer's columns is taken.
        choice: what a rotation is chosen by.
        minimum_gain_db: of the layers' outputs.

    Raises:
        InputError: no block divides the columns.
    """
    columns = layer_group.weights[0].shape[1]
    block = largest_block(columns, most)
    if not block:
        raise InputError(
            f"rotate: no block of {', '.join(map(str, BLOCKS))} divides the {columns} columns of layer {layer_group.names[0]}",
            "keep this layer (recipe: ignore), or leave rotate out",
        )
    plain = layer_group.error(decisions)
    if choice == "fluctuation":
        x = layer_group.rows(held_out=False).x
        kinds = ("hadamard",) if fluctuation(decisions.inputs(x)) < 1 else ("outlier",)
    trials = [(kind, rotated(layer_group, decisions, kind, block)) for kind in kinds]
    least, kind, best = min(
        ((layer_group.error(trial), kind, trial) for kind, trial in trials), key=lambda trial: trial[0]
    )
    gain = decibels(least, plain)
    if gain < minimum_gain_db:
        return decisions.decide("rotate", f"no rotation ({kind} of {block} {gain:+.1f} dB)")
    return decisions.decide(
        "rotate",
        f"{kind} rotation of {block} gains {gain:.1f} dB",
        input_multiplier=best.input_multiplier,
        shift=best.shift,
        rotation=best.rotation,
    )
