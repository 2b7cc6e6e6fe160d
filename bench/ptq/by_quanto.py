"""Rows of optimum-quanto: its ``quantize``, ``Calibration`` on the shared recorded calls, and ``freeze``.

Its activations are quantized where they *leave* a quantized layer and where one enters, with static scales from its own moving
average; the scheme is its own, so these rows are peers and not the same format computed by another library.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from bench.ptq.bits import Storage
from bench.ptq.material import Made, Material

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from optimum.quanto import Calibration, QTensor, freeze, qtypes, quantize


def make(material: Material, weights: str, activations: str | None = None) -> Made:
    """Quantize ``model.backbone`` in place; names are quanto's (``qint8``, ``qint4``, ``qfloat8``)."""
    backbone = material.model.backbone
    kinds = {"weights": qtypes[weights], "activations": None if activations is None else qtypes[activations]}
    quantize(backbone, include=list(material.layers), **kinds)
    if activations is not None:
        with torch.no_grad(), Calibration():
            material.replay(backbone)
    with torch.no_grad():
        freeze(backbone)
    layers = {name: module for name, module in backbone.named_modules() if isinstance(_weight(module), QTensor)}
    material.check(set(layers))
    storages = {name: storage(layer) for name, layer in layers.items()}
    if qtypes[weights].bits < 8:
        for name, layer in layers.items():
            backbone.set_submodule(name, OutsideInferenceMode(layer))
    return Made(storages)


class OutsideInferenceMode(nn.Module):
    """A layer that leaves torch's inference mode while it runs: quanto's packed 4-bit weights cannot be viewed in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        """Return the layer's output."""
        with torch.inference_mode(False), torch.no_grad():
            return self.layer(x.clone())


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


def storage(layer: Any) -> Storage:
    """Return how the weight of a frozen layer is stored: one scale a channel, or groups with a shift each."""
    kind = layer.weight_qtype
    if kind.bits == 8:
        return Storage(8)
    return Storage(kind.bits, layer.weight_group_size or 0, zero_point=True)
