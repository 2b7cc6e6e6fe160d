"""The rows: a table. A new recipe or method joins by a line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.ptq.material import Made, Material


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        library: who makes it: a key of :data:`MAKERS`.
        format: of weights and activations; rows of one format stand together.
        method: what decides scales and codes.
        options: arguments of the maker.
        twin: name of another row that may give the same predictions, because it says the same in another library.
        model: family that the row is for.
    """

    library: str
    format: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None
    model: str = "pixart"

    @property
    def name(self) -> str:
        """Return what ``--only`` takes, and the name of the row's files."""
        text = f"{self.library} {self.format} {self.method}".lower()
        return "-".join("".join(c if c.isalnum() or c in ".+_" else " " for c in text).split())

    def make(self, material: Material) -> Made:
        """Change ``material.model.backbone``."""
        module = importlib.import_module(MAKERS[self.library])
        return module.make(material, **self.options)


MAKERS = {
    "qdiff": "bench.ptq.by_qdiff",
    "ModelOpt": "bench.ptq.by_modelopt",
    "torchao": "bench.ptq.by_torchao",
    "quanto": "bench.ptq.by_quanto",
}

INT8, FP8, NVFP4 = "INT8 W8A8", "FP8 W8A8", "NVFP4 W4A4"
ROTATED = "methods={smooth: {strengths: [0.3, 0.4, 0.5]}, rotate: {}, timestep_scales: {minimum_gain_db: 1.0}}"
W4A16, W4A8, W6A8 = "INT4 W4A16", "INT4 W4A8", "INT6 W6A8"


def _qdiff(format: str, recipe: str, *variants: tuple[str, list[str]]) -> list[Row]:
    return [Row("qdiff", format, method, {"recipe": recipe, "overrides": overrides}) for method, overrides in variants]


def _peer(library: str, format: str, *variants: tuple[str, dict[str, Any]]) -> list[Row]:
    return [Row(library, format, method, options) for method, options in variants]


def _modelopt(format: str, *variants: tuple[str, dict[str, Any]]) -> list[Row]:
    return _peer("ModelOpt", format, *variants)


PLAIN = ["methods={}", "sequential=null"]
NVFP4_STATIC = {"weights": "nvfp4_static", "activations": "nvfp4"}
G64_TOKEN = {"weights": "int4_g64", "activations": "int8_token"}
G64_THEN_TOKEN = {"weights": "int4_g64", "activations_after": "int8_token"}
FP8_BY_CHANNEL = {"weights": "fp8_channel", "activations": "fp8_tensor"}
G64 = {"weights": "int4_g64"}
LOCAL_HESSIAN = {"method": "local_hessian", "fp8_scale_sweep": True}
HEADROOM = {"method": "nvfp4_act_headroom", "weight_scale_algorithm": {"method": "mse", "fp8_scale_sweep": True}}
LAYERWISE_GPTQ = {"method": "gptq", "layerwise": {"enable": True}}
SMOOTH_05, SMOOTH_08 = ({"method": "smoothquant", "alpha": alpha} for alpha in (0.5, 0.8))

ROWS: tuple[Row, ...] = (
    # NVFP4
    *_qdiff(
        NVFP4,
        "nvfp4",
        ("to nearest", PLAIN),
        ("smooth", [*PLAIN, "methods.smooth.strengths=[0.3,0.4,0.5,0.6]"]),
        ("scales mse", [*PLAIN, "methods.scales.rules=[mse]"]),
        ("scales four over six", [*PLAIN, "methods.scales.rules=[four_over_six]"]),
        ("gptq", ["methods={}", "methods.gptq={}"]),
        ("gptq, damping 0.1", ["methods={}", "methods.gptq.damping=0.1"]),
        ("awq", [*PLAIN, "methods.awq={}"]),
        ("rotate", [*PLAIN, "methods.rotate={}"]),
        ("shift", [*PLAIN, "methods.shift={}"]),
        ("center", ["methods={}", "methods.center={}"]),
        ("bias", [*PLAIN, "methods.bias={}"]),
        ("adaround", ["methods={}", "sequential.reconstruct={method: adaround}"]),
        ("flexround", ["methods={}", "sequential.reconstruct={method: flexround}"]),
        ("recipe nvfp4", []),
    ),
    *_qdiff(NVFP4, "nvfp4-distilled", ("recipe nvfp4-distilled", [])),
    *_qdiff(
        NVFP4,
        "nvfp4-svd",
        ("low rank 16", [*PLAIN, "methods.low_rank.rank=16"]),
        ("recipe nvfp4-svd", []),
        ("recipe nvfp4-svd, distilled", ["distil.passes=2"]),
    ),
    *_modelopt(
        NVFP4,
        ("max", {"preset": "NVFP4_DEFAULT_CFG"}),
        ("mse, four over six", {"preset": "NVFP4_FOUR_OVER_SIX_CFG"}),
        ("mse, all scales", {"preset": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"}),
        ("local Hessian", {"preset": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"}),
        ("act headroom, mse, all scales", {**NVFP4_STATIC, "algorithm": HEADROOM}),
        ("awq_lite", {"preset": "NVFP4_AWQ_LITE_CFG"}),
        ("awq_clip", {"preset": "NVFP4_AWQ_CLIP_CFG"}),
        ("awq_full", {"preset": "NVFP4_AWQ_FULL_CFG"}),
        ("gptq", {**NVFP4_STATIC, "algorithm": "gptq"}),
        ("gptq layerwise", {**NVFP4_STATIC, "algorithm": LAYERWISE_GPTQ}),
        ("gptq layerwise, dynamic scales", {"preset": "NVFP4_DEFAULT_CFG", "algorithm": LAYERWISE_GPTQ}),
        ("awq_lite, local Hessian", {**NVFP4_STATIC, "algorithm": ["awq_lite", LOCAL_HESSIAN]}),
        ("awq_lite, gptq", {"preset": "NVFP4_DEFAULT_CFG", "algorithm": ["awq_lite", "gptq"]}),
        ("svdquant 32", {"preset": "NVFP4_SVDQUANT_DEFAULT_CFG"}),
        ("svdquant 16", {"preset": "NVFP4_SVDQUANT_DEFAULT_CFG", "algorithm": {"method": "svdquant", "lowrank": 16}}),
        (
            "svdquant 16, gptq",
            {"preset": "NVFP4_DEFAULT_CFG", "algorithm": [{"method": "svdquant", "lowrank": 16}, "gptq"]},
        ),
    ),
    # INT8
    *_qdiff(
        INT8,
        "int8",
        ("to nearest", ["methods={}", "quantize_outputs={}"]),
        ("smooth", ["methods={}", "methods.smooth.strengths=[0.3,0.4,0.5]", "quantize_outputs={}"]),
        ("shift", ["methods={}", "methods.shift={}", "quantize_outputs={}"]),
        ("awq", ["methods={}", "methods.awq={}", "quantize_outputs={}"]),
        ("repq", ["methods={}", "methods.repq={}", "quantize_outputs={}"]),
        ("rotate", ["methods={}", "methods.rotate={}", "quantize_outputs={}"]),
        ("bias", ["methods={}", "methods.bias={}", "quantize_outputs={}"]),
        ("scales by timestep", ["methods={}", "methods.timestep_scales.minimum_gain_db=0.0", "quantize_outputs={}"]),
        ("gptq", ["methods={}", "methods.gptq={}", "sequential.tokens=4096", "quantize_outputs={}"]),
        ("recipe int8, q k float", ["quantize_outputs={}"]),
        ("recipe int8", []),
    ),
    *_qdiff(
        INT8,
        "int8-gptq",
        ("recipe int8-gptq, q k float", ["quantize_outputs={}"]),
        ("recipe int8-gptq", []),
        ("recipe int8-gptq, per token", ["quantize_outputs={}", "scheme.per_token=true"]),
    ),
    *_qdiff(
        INT8,
        "int8-rotate",
        ("recipe int8-rotate, q k float", ["quantize_outputs={}"]),
        ("recipe int8-rotate, no gptq, q k float", ["quantize_outputs={}", ROTATED]),
        ("recipe int8-rotate", []),
    ),
    *_qdiff(INT8, "int8-token", ("recipe int8-token", [])),
    *_modelopt(
        INT8,
        ("max", {"preset": "INT8_DEFAULT_CFG"}),
        ("smoothquant 1", {"preset": "INT8_SMOOTHQUANT_CFG"}),
        ("smoothquant 0.8", {"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": SMOOTH_08}),
        ("smoothquant 0.5", {"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": SMOOTH_05}),
        ("mse", {"preset": "INT8_DEFAULT_CFG", "algorithm": "mse"}),
        ("awq_lite", {"preset": "INT8_DEFAULT_CFG", "algorithm": "awq_lite"}),
        ("gptq layerwise", {"preset": "INT8_DEFAULT_CFG", "algorithm": LAYERWISE_GPTQ}),
        ("smoothquant 0.5, gptq", {"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": [SMOOTH_05, "gptq"]}),
    ),
    # INT6 weights, 8-bit activations
    *_qdiff(
        W6A8,
        "w6a8",
        ("to nearest", PLAIN),
        ("a scale a channel", ["scheme.weights=int6"]),
        ("recipe w6a8", []),
    ),
    # INT4 weights, 8-bit activations
    *_qdiff(
        W4A8,
        "w4a8",
        ("to nearest", PLAIN),
        ("smooth", [*PLAIN, "methods.smooth.strengths=[0.3,0.4,0.5]"]),
        ("scales mse", [*PLAIN, "methods.scales.rules=[mse]"]),
        ("gptq", ["methods={}", "methods.gptq={}"]),
        ("rotate", [*PLAIN, "methods.rotate={}"]),
        ("awq", [*PLAIN, "methods.awq={}"]),
        ("adaround", ["methods={}", "sequential.reconstruct={method: adaround}"]),
        ("flexround", ["methods={}", "sequential.reconstruct={method: flexround}"]),
        ("recipe w4a8", []),
    ),
    *_modelopt(
        W4A8,
        ("max", G64_TOKEN),
        ("mse", {**G64_TOKEN, "algorithm": "mse"}),
        ("awq_lite", {**G64_THEN_TOKEN, "algorithm": "awq_lite"}),
        ("awq_clip", {**G64_THEN_TOKEN, "algorithm": "awq_clip"}),
        ("awq_full", {**G64_THEN_TOKEN, "algorithm": "awq_full"}),
        ("gptq layerwise", {**G64_TOKEN, "algorithm": LAYERWISE_GPTQ}),
        ("awq_lite, gptq", {**G64_THEN_TOKEN, "algorithm": "awq_lite", "algorithm_after": "gptq"}),
        ("awq_lite, g128, FP8 (W4A8_AWQ_BETA)", {"preset": "W4A8_AWQ_BETA_CFG"}),
    ),
    # INT4 weights alone
    *_qdiff(
        W4A16,
        "w4a16",
        ("to nearest", PLAIN),
        ("scales mse", [*PLAIN, "methods.scales.rules=[mse]"]),
        ("gptq", ["methods={}", "methods.gptq={}"]),
        ("recipe w4a16", []),
    ),
    *_modelopt(
        W4A16,
        ("max", G64),
        ("awq_lite, g128 (INT4_AWQ)", {"preset": "INT4_AWQ_CFG"}),
        ("awq_lite", {**G64, "algorithm": "awq_lite"}),
        ("awq_full", {**G64, "algorithm": "awq_full"}),
        ("gptq layerwise", {**G64, "algorithm": LAYERWISE_GPTQ}),
    ),
    # FP8
    *_qdiff(FP8, "fp8", ("to nearest", ["methods={}"]), ("recipe fp8", [])),
    *_qdiff(
        FP8,
        "fp8-gptq",
        ("gptq", ["methods={}", "methods.gptq.damping=0.1"]),
        (
            "scales mse, gptq",
            ["methods={}", "methods.scales.rules=[mse]", "methods.gptq.damping=0.1", "methods.bias={}"],
        ),
        ("recipe fp8-gptq", []),
    ),
    *_modelopt(
        FP8,
        ("max", FP8_BY_CHANNEL),
        ("max, per tensor (FP8_DEFAULT)", {"preset": "FP8_DEFAULT_CFG"}),
        ("mse", {**FP8_BY_CHANNEL, "algorithm": "mse"}),
        ("gptq layerwise", {**FP8_BY_CHANNEL, "algorithm": LAYERWISE_GPTQ}),
    ),
)


ROWS += (
    *_peer("torchao", INT8, ("per token", {"configuration": "int8"})),
    *_peer("torchao", W4A8, ("per token", {"configuration": "int4_int8"})),
    *_peer("torchao", W4A16, ("groups of 64", {"configuration": "int4_weights"})),
    *_peer("torchao", FP8, ("per token", {"configuration": "fp8"})),
    *_peer("torchao", NVFP4, ("dynamic", {"configuration": "nvfp4"})),
    *_peer("torchao", "NVFP4 W4A16", ("dynamic", {"configuration": "nvfp4_weights"})),
    *_peer("torchao", "MXFP8 W8A8", ("emulated", {"configuration": "mxfp8"})),
    *_peer("torchao", "MXFP4 W4A4", ("emulated", {"configuration": "mxfp4"})),
    *_peer("torchao", "INT8 W8A16", ("per channel", {"configuration": "int8_weights"})),
    *_peer("quanto", INT8, ("static", {"weights": "qint8", "activations": "qint8"})),
    *_peer("quanto", FP8, ("static", {"weights": "qfloat8", "activations": "qfloat8"})),
    *_peer("quanto", W4A8, ("static", {"weights": "qint4", "activations": "qint8"})),
    *_peer("quanto", W4A16, ("groups, zero points", {"weights": "qint4"})),
    *_peer("quanto", "INT8 W8A16", ("per channel", {"weights": "qint8"})),
)


# A U-Net has convolutions, which none but ModelOpt of the peers quantizes.
UNET_INT8, UNET_W4A8, UNET_NVFP4 = "U-Net INT8 W8A8", "U-Net INT4 W4A8", "U-Net NVFP4, convolutions INT8"
UNSPLIT, TOGETHER = "split_shortcuts=false", "first_token=false"
BARE = ["methods={}", "quantize_outputs={}"]
G32 = "scheme.weights=int4_g32"  # the bundled model's 160 columns do not divide into groups of 64
BY_TIMESTEP = "methods.timestep_scales.minimum_gain_db=0.0"
ROWS += tuple(
    replace(row, model="stable-diffusion")
    for row in (
        *_qdiff(
            UNET_INT8,
            "int8",
            ("to nearest", [*BARE, UNSPLIT, TOGETHER]),
            ("split shortcuts", [*BARE, TOGETHER]),
            ("first token", [*BARE, UNSPLIT]),
            ("scales by timestep", [*BARE, UNSPLIT, TOGETHER, BY_TIMESTEP]),
            ("dgq, channel groups", [*BARE, UNSPLIT, TOGETHER, "methods.dgq={}"]),
            ("dgq, tokens too", [*BARE, UNSPLIT, TOGETHER, "methods.dgq.tokens=true"]),
            ("recipe int8, unsplit", [UNSPLIT]),
            ("recipe int8, first token quantized", [TOGETHER]),
            ("recipe int8, q k float", ["quantize_outputs={}"]),
            ("recipe int8", []),
        ),
        *_qdiff(UNET_INT8, "int8-gptq", ("recipe int8-gptq", [])),
        *_qdiff(UNET_INT8, "int8-token", ("recipe int8-token", [])),
        *_modelopt(
            UNET_INT8,
            ("max", {"preset": "INT8_DEFAULT_CFG"}),
            ("smoothquant 0.8 (its SDXL recipe)", {"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": SMOOTH_08}),
        ),
        *_qdiff(
            UNET_W4A8,
            "w4a8",
            ("recipe w4a8, groups of 32, unsplit", [G32, UNSPLIT]),
            ("recipe w4a8, groups of 32, first token quantized", [G32, TOGETHER]),
            ("recipe w4a8, groups of 32", [G32]),
            ("recipe w4a8, groups of 32, distilled", [G32, "distil.passes=2"]),
            ("adaround", [G32, "methods={}", "sequential.reconstruct={method: adaround}"]),
        ),
        *_qdiff(UNET_NVFP4, "nvfp4", ("recipe nvfp4", [])),
    )
)


def named(name: str) -> Row:
    """Return the row of that name.

    Raises:
        KeyError: none.
    """
    for row in ROWS:
        if row.name == name:
            return row
    raise KeyError(f"no row is called {name!r}; python -m bench.ptq --list shows all")
