"""From decisions about a group of layers to one layer: its entry in the plan, its configuration, and its buffers.

A decision passes through three values: :class:`qdiff.methods.base.Decisions` (tensors), :class:`qdiff.plan.plan.LayerPlan` (JSON
that a person reads) and :class:`qdiff.nn.quant_linear.QuantLinearConfig` (which pieces the layer has). It has the same name in
all of them, and the three functions here are the only ones that carry it over.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from qdiff.formats import scales
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup
from qdiff.nn.conv import Window
from qdiff.nn.quant_linear import QuantLinearConfig
from qdiff.nn.transform import PIECES
from qdiff.plan.plan import LayerPlan, StorageDtype


def plan_of(entry: LayerPlan, layer_group: LayerGroup, decisions: Decisions, sqnr_db: float) -> LayerPlan:
    """Return the entry of a layer with what was decided about its group.

    Args:
        entry: of the layer, as the recipe alone has it.
        layer_group: that the layer belongs to.
        decisions: about the group.
        sqnr_db: of the layer's output on held-out tokens.
    """
    return entry.model_copy(
        update={
            "weights": (decisions.weight_format or layer_group.weight_format).name,
            "per_token": layer_group.scales_per_token(decisions),
            "smoothing": decisions.smoothing,
            **asdict(decisions.pieces),
            "scale_rule": decisions.scale_rule,
            "rounding": decisions.rounding,
            "bias_correction": decisions.bias_correction is not None,
            "clip": decisions.clip,
            "timestep_scales": decisions.timestep_scales,
            "input_scale_rule": "range" if decisions.input_scale is None else "learned",
            "methods": list(decisions.methods),
            "why": "; ".join(note for note in (*decisions.notes, entry.why) if note),
            "sqnr_db": round(sqnr_db, 3),
        }
    )


def config_of(plan: LayerPlan, timesteps: int, storage_dtype: StorageDtype, window: Window | None) -> QuantLinearConfig:
    """Return which pieces the layer of a plan's entry has.

    Args:
        plan: of the layer.
        timesteps: number of the calibrated ones.
        storage_dtype: of its low-rank branch.
        window: of a convolution.
    """
    out_features, in_features = plan.matrix
    return QuantLinearConfig(
        in_features,
        out_features,
        plan.bias or plan.bias_correction,
        plan.weights,
        plan.activations,
        per_token=plan.per_token,
        timesteps=timesteps if plan.timestep_scales else 0,
        output=plan.output,
        storage_dtype=storage_dtype,
        window=window,
        **{piece: getattr(plan, piece) for piece in PIECES},
    )


def buffers_of(
    layer_group: LayerGroup, decisions: Decisions, index: int, bias: Tensor | None, storage_dtype: StorageDtype
) -> dict[str, Tensor | None]:
    """Return the buffers of a group's layer ``index`` (:class:`qdiff.nn.quant_linear.QuantLinear`), but for its output's
    scale.
    """
    storage = getattr(torch, storage_dtype)
    weight = layer_group.quantized_weights(decisions)[index]
    scale, stretch = layer_group.activation_scale(decisions)
    given = layer_group.biases(decisions)[index]
    bias = None if bias is None else bias.detach().float()
    total = given if bias is None else bias if given is None else bias + given
    return {
        "codes": weight.packed(),
        "scale": weight.scale,
        "tensor_scale": weight.tensor_scale,
        "bias": None if total is None else scales.to_storage(total, storage_dtype).float(),
        "input_scale": scale,
        **decisions.buffers(index, layer_group.taps, storage),
        "timestep_scales": stretch,
    }


def output_scale(amax: Tensor, plan: LayerPlan) -> Tensor | None:
    """Return the constant scale of a layer's output from its ranges by timestep ``[T]``; ``None`` when the output stays
    float.
    """
    return None if plan.output is None else scales.choose_scale(amax.max(), format_named(plan.output))
