"""What is not quantized: its storage, and the layers and parameters that have it.

Storage is 16 bits, as a recipe's ``kept`` says, or 32 where float16 would turn a value into infinity
(:func:`qdiff.formats.scales.to_storage`). It changes no arithmetic: values are used in the dtype that the backbone computes in.
"""

from __future__ import annotations

import torch
from torch import nn

from qdiff.formats import scales
from qdiff.models.layers import quantizable_layers
from qdiff.plan.plan import LayerPlan
from qdiff.quantization.checkpoint import empty_layer


def keep_layer(backbone: nn.Module, plan: LayerPlan, linear: nn.Linear | nn.Conv2d) -> None:
    """Put a float layer, as one that is kept, into the place that its plan names."""
    backbone.set_submodule(plan.name, half_layer(plan, linear))


def half_layer(plan: LayerPlan, layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Return a float layer as one that is kept, in the storage that its plan says."""
    module = empty_layer(plan, 0, None, "float16", layer)
    state = {"weight": layer.weight.detach().to(getattr(torch, plan.weights))}
    if layer.bias is not None:
        state["bias"] = scales.to_storage(layer.bias.detach(), plan.weights).float()
    module.load_state_dict(state, assign=True)
    return module


def round_to_storage(backbone: nn.Module, storage_dtype: str) -> None:
    """Round the parameters outside linear layers to the storage they get, so that this model equals the loaded one."""
    linear = {id(parameter) for layer in quantizable_layers(backbone).values() for parameter in layer.parameters()}
    for parameter in backbone.parameters():
        if id(parameter) not in linear:
            parameter.data = scales.to_storage(parameter.data, storage_dtype).float()
