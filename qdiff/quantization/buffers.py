"""The buffers of a quantized layer (:class:`qdiff.nn.quant_linear.QuantLinear`), from what was decided about its group."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.formats import scales
from qdiff.formats.table import format_named
from qdiff.methods import Decisions, LayerGroup
from qdiff.plan.plan import LayerPlan, StorageDtype


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
    down, up = (None, None) if decisions.low_rank is None else decisions.low_rank[index]
    return {
        "codes": weight.packed(),
        "scale": weight.scale,
        "tensor_scale": weight.tensor_scale,
        "bias": None if total is None else scales.to_storage(total, storage_dtype).float(),
        "input_scale": scale,
        "input_multiplier": None
        if decisions.input_multiplier is None
        else decisions.input_multiplier[:: layer_group.taps],
        "shift": decisions.shift,
        "rotation": None if decisions.rotation is None else decisions.rotation.last,
        "outlier_rotation": None if decisions.rotation is None else decisions.rotation.first,
        "outlier_order": None if decisions.rotation is None else decisions.rotation.order,
        "down": None if down is None else down.to(storage),
        "up": None if up is None else up.to(storage),
        "timestep_scales": stretch,
    }


def output_scale(amax: Tensor, plan: LayerPlan) -> Tensor | None:
    """Return the constant scale of a layer's output from its ranges by timestep ``[T]``; ``None`` when the output stays
    float.
    """
    return None if plan.output is None else scales.choose_scale(amax.max(), format_named(plan.output))
