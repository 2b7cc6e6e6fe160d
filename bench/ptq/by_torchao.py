"""Rows of torchao: the configurations of its public ``quantize_`` that run on a CPU. None of them is calibrated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.ptq.bits import Storage
from bench.ptq.material import Made, Material

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchao.quantization as ao
    from torchao.quantization import PerGroup, PerRow, quantize_

GROUP = 64
INT4: Any = getattr(torch, "int4")  # noqa: B009 - the stubs of torch do not know it


def _mx(element: torch.dtype) -> Any:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common import KernelPreference

    return MXDynamicActivationMXWeightConfig(
        activation_dtype=element, weight_dtype=element, kernel_preference=KernelPreference.EMULATED
    )


def _nvfp4() -> Any:
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)


def _nvfp4_weights() -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


# name -> configuration, and how a weight is stored. Made when asked for: some cannot even be imported everywhere.
CONFIGURATIONS: dict[str, tuple[Callable[[], Any], Storage]] = {
    "int8": (ao.Int8DynamicActivationInt8WeightConfig, Storage(8)),
    "int8_weights": (ao.Int8WeightOnlyConfig, Storage(8)),
    "int4_weights": (
        lambda: ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(GROUP)),
        Storage(4, GROUP),
    ),
    "int4_int8": (
        lambda: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(GROUP)),
        Storage(4, GROUP),
    ),
    "fp8": (lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), Storage(8)),
    "nvfp4": (_nvfp4, Storage(4, 16, 8, tensor_scale=True)),
    "nvfp4_weights": (_nvfp4_weights, Storage(4, 16, 8, tensor_scale=True)),
    "mxfp8": (lambda: _mx(torch.float8_e4m3fn), Storage(8, 32, 8)),
    "mxfp4": (lambda: _mx(torch.float4_e2m1fn_x2), Storage(4, 32, 8)),
}
BFLOAT16 = ("fp8", "mxfp8", "mxfp4", "nvfp4")  # what only takes weights and activations in bfloat16


class InBFloat16(nn.Module):
    """A layer that computes in bfloat16 inside a float32 model: torchao's low-bit products take nothing else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output ``[..., out]`` for ``x [..., in]``, in the dtype of ``x``."""
        return self.layer(x.bfloat16()).to(x.dtype)


def make(material: Material, configuration: str) -> Made:
    """Quantize ``model.backbone`` in place."""
    config, storage = CONFIGURATIONS[configuration]
    backbone = material.model.backbone
    layers = {name: backbone.get_submodule(name) for name in material.layers}
    before = {name: layer.weight for name, layer in layers.items()}
    chosen = set(layers.values())
    if configuration in BFLOAT16:
        for name, layer in layers.items():
            layer.bfloat16()
            backbone.set_submodule(name, InBFloat16(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(backbone, config(), filter_fn=lambda module, name: module in chosen)
    changed = {
        name
        for name in layers
        if type(_inner(backbone.get_submodule(name)).weight) is not type(before[name])
        or type(_inner(backbone.get_submodule(name)).weight.data) is not torch.Tensor
    }
    material.check(changed)
    note = "products in bfloat16" if configuration in BFLOAT16 else ""
    return Made(dict.fromkeys(material.layers, storage), note)


def _inner(layer: nn.Module) -> Any:
    return layer.layer if isinstance(layer, InBFloat16) else layer
