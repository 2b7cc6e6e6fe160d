"""Rows of NVIDIA ModelOpt: its own algorithms, through ``modelopt.torch.quantization.quantize``, on the shared recorded
calls.

A row names one of ModelOpt's published configurations, or the numerics of weights and activations where it publishes none for
the format, and the algorithm. What is changed in a configuration: layers that no row quantizes are disabled, and NVFP4
quantizers name the CPU backend (:mod:`bench.ptq.nvfp4_cpu`). Softmax, attention products and outputs stay float, as in the
configurations.

Afterwards every weight is replaced by its quantized values, as ModelOpt's own ``fold_weight`` does, and its quantizer
switched off: the same numbers, many times faster. (``fold_weight`` itself would merge SVDQuant's branch into the weight,
which would send the quantized input through it; the branch reads the unquantized one.)
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import sys
import warnings
from typing import Any

import torch
from torch import nn

from bench.ptq.bits import Storage
from bench.ptq.material import Made, Material
from bench.ptq.nvfp4_cpu import BACKEND, install

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of missing CUDA extensions
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.utils.layerwise_calib import LayerActivationCollector

Numerics = dict[str, Any]

# Numerics by name, in ModelOpt's terms; the values are those of its configurations (configs/numerics).
NVFP4: Numerics = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
NVFP4_STATIC: Numerics = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
INT4_G64: Numerics = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
FP8_CHANNEL: Numerics = {"num_bits": (4, 3), "axis": 0}
FP8_TENSOR: Numerics = {"num_bits": (4, 3), "axis": None}
INT8_TOKEN: Numerics = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
NUMERICS = {
    "nvfp4": NVFP4,
    "nvfp4_static": NVFP4_STATIC,
    "int4_g64": INT4_G64,
    "fp8_channel": FP8_CHANNEL,
    "fp8_tensor": FP8_TENSOR,
    "int8_token": INT8_TOKEN,
}


def make(
    material: Material,
    preset: str | None = None,
    algorithm: Any = None,
    weights: str | None = None,
    activations: str | None = None,
    activations_after: str | None = None,
    algorithm_after: Any = None,
) -> Made:
    """Quantize ``model.backbone`` in place.

    Args:
        material: what every row is made from.
        preset: name of a configuration of ModelOpt, as ``NVFP4_DEFAULT_CFG``.
        algorithm: in place of the configuration's: a name, a dict with ``method``, or a list of these, one after the other.
        weights: numerics in place of the configuration's; without a preset both say all (``None``: float).
        activations: numerics in place of the configuration's; without a preset both say all (``None``: float).
        activations_after: numerics of activations that are switched on when ``algorithm`` is done. AWQ refuses quantizers by
            token, and its search leaves activations float whatever they will be, so this is what it would have found.
        algorithm_after: runs after that.
    """
    install()
    backbone = material.model.backbone
    config = configuration(backbone, material.layers, preset, algorithm, weights, activations)
    _name_the_blocks(material)
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        backbone = mtq.quantize(backbone, config, lambda module: material.replay(_answering(module)))
        if activations_after is not None:
            numerics = {"cfg": copy.deepcopy(NUMERICS[activations_after]), "enable": True}
            entries = [{"quantizer_name": f"{name}.input_quantizer", **numerics} for name in material.layers]
            mtq.set_quantizer_by_cfg(backbone, entries)
        if algorithm_after is not None:
            backbone = mtq.calibrate(backbone, algorithm_after, lambda module: material.replay(_answering(module)))
        layers = {name: module for name, module in backbone.named_modules() if hasattr(module, "weight_quantizer")}
        material.check({name for name, module in layers.items() if module.weight_quantizer.is_enabled})
        _refuse_other_quantizers(backbone, material)
        storages = {name: storage(layers[name]) for name in material.layers}
        for name in material.layers:
            fold(layers[name])
    material.model.backbone = backbone
    scaled = sum(getattr(layers[name].input_quantizer, "pre_quant_scale", None) is not None for name in material.layers)
    return Made(storages, scaled_inputs=scaled)


def configuration(
    backbone: nn.Module,
    layers: dict[str, Any],
    preset: str | None,
    algorithm: Any,
    weights: str | None = None,
    activations: str | None = None,
) -> dict[str, Any]:
    """Return ModelOpt's configuration for a row; see :func:`make`."""
    if preset is None:
        config: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    else:
        config = copy.deepcopy(getattr(mtq, preset))
    entries: list[dict[str, Any]] = config["quant_cfg"]
    # A configuration's exceptions (a U-Net's proj_out) do not hold for layers that every row quantizes.
    mine = [f"{name}.{part}" for name in layers for part in ("weight_quantizer", "input_quantizer")]
    entries[:] = [entry for entry in entries if not _excepts(entry, mine)]
    for pattern, numerics in (("*weight_quantizer", weights), ("*input_quantizer", activations)):
        if numerics is not None:
            entries.append({"quantizer_name": pattern, "cfg": copy.deepcopy(NUMERICS[numerics])})
    for entry in entries:
        for cfg in _attributes(entry):
            blocks = cfg.get("block_sizes") or {}
            if tuple(_listed(cfg.get("num_bits"))) == (2, 1) and blocks.get("type") == "dynamic":
                cfg["backend"] = BACKEND
    for name, module in backbone.named_modules():
        if name and name not in layers and not list(module.children()):
            entries.append({"quantizer_name": f"{name}.*", "enable": False})
    if algorithm is not None:
        config["algorithm"] = copy.deepcopy(algorithm)
    return config


def _excepts(entry: dict[str, Any], quantizers: list[str]) -> bool:
    pattern = entry["quantizer_name"]
    return entry.get("enable") is False and pattern != "*" and bool(fnmatch.filter(quantizers, pattern))


def _attributes(entry: dict[str, Any]) -> list[dict[str, Any]]:
    cfg = entry.get("cfg")
    return [] if cfg is None else cfg if isinstance(cfg, list) else [cfg]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _name_the_blocks(material: Material) -> None:
    """Tell ModelOpt's layerwise calibration which modules are the blocks, by its registration for new architectures."""
    backbone, attribute = material.model.backbone, material.model.family.block_list
    kind = type(backbone)
    if attribute is not None:
        LayerActivationCollector.register_decoder_layer_support(
            lambda model: isinstance(model, kind), lambda model: model.get_submodule(attribute)
        )


def _answering(module: nn.Module) -> Any:
    """Return ``module`` with an answer for the calls that ModelOpt's layerwise calibration cuts off, which return
    nothing.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        result = module(*args, **kwargs)
        return (None,) if result is None else result

    return call


def _refuse_other_quantizers(backbone: nn.Module, material: Material) -> None:
    allowed = {f"{name}.{part}" for name in material.layers for part in ("weight_quantizer", "input_quantizer")}
    for name, module in backbone.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            owner = name if name in allowed else name.rpartition(".")[0]  # members of a SequentialQuantizer
            if owner not in allowed:
                raise RuntimeError(f"ModelOpt also quantizes {name}, which no other row does")


def storage(layer: Any) -> Storage:
    """Return how the weight of a quantized layer is stored, read from its quantizer."""
    quantizer = layer.weight_quantizer
    first = quantizer if isinstance(quantizer, TensorQuantizer) else quantizer[0]
    branch = getattr(quantizer, "svdquant_lora_a", None)
    rank = 0 if branch is None else int(branch.shape[0])
    sizes = first.block_sizes or {}
    block = sizes.get(-1) or 0
    if isinstance(first.num_bits, int):
        bits = first.num_bits
    else:
        bits = 1 + sum(first.num_bits)
    if sizes.get("scale_bits") is not None:
        return Storage(bits, block, 1 + sum(sizes["scale_bits"]), tensor_scale=True, rank=rank)
    per_tensor = not block and first.axis is None
    # A second quantizer of the weight (INT4, then FP8) adds its tensor scale.
    return Storage(bits, block, tensor_scale=first is not quantizer, rank=rank, per_tensor=per_tensor)


def fold(layer: Any) -> None:
    """Replace the weight by its quantized values."""
    layer.weight.data = layer.weight_quantizer(layer.weight.data).clone()
    layer.weight_quantizer.disable()
