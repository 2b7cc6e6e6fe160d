"""Translations: for each target, how an op of the traced graph is written in ONNX.

A translation is a function that builds ONNX nodes (onnxscript's function style, traced by torch's exporter). Register it for
the ops and targets that it serves; a target takes every translation that names it. An op without a translation for a target
is an error at export, with the layer's name, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from qdiff.formats.table import format_named
from qdiff.registry import Registry

if TYPE_CHECKING:
    from onnx_ir import Value
    from torch.library import CustomOpDef

else:

    class Value:
        """A value of the graph that is being written. The exporter evaluates the annotations of translations."""


Translation = Callable[..., Value]


@dataclass(frozen=True)
class Target:
    """What a graph is written for.

    Args:
        name: ``tensorrt`` or ``onnxruntime``.
        title: for people.
        opset: ONNX opset of the file.
        compute: dtype of everything that is not quantized. GPUs get 16 bit: a strongly typed TensorRT engine computes what
            the graph says, and float32 attention would cost more than INT8 gains. CPUs get 32 bit, their engines choose.
        runs: formats of (weights, activations) that its graphs can hold; ``None`` for activations that stay as they are.
        tokens: those of ``runs`` that it also takes with scales per token.
        outputs: formats in which it runs what follows a quantized output (the product of q and k). Empty: those quantizers
            are left out, because its engines fuse attention in 16 bit and a Q/DQ pair in the middle would break the fusion.
    """

    name: str
    title: str
    opset: int
    compute: str
    runs: frozenset[tuple[str, str | None]]
    tokens: frozenset[tuple[str, str | None]]
    outputs: frozenset[str]

    def takes(self, weights: str, activations: str, per_token: bool = False) -> bool:
        """Return whether a layer in these formats can be written for this target."""
        pair = (weights, activations if format_named(activations).quantized else None)
        return pair in (self.tokens if per_token else self.runs)


TARGETS: Registry[Target] = Registry("target")
_TABLE: dict[str, dict[str, Translation]] = {}

_INT4 = ("int4", "int4_g32", "int4_g64", "int4_g128")
# A CPU computes in float between the quantizers, so any weights go with any activations. E3M0's ties have no form in ONNX's
# operators.
_CPU_WEIGHTS = (
    "int8",
    "fp8",
    "fp8_e5m2",
    "int6",
    "int6_g64",
    *_INT4,
    "nvfp4",
    "nvint4",
    "mxfp8",
    "mxint8",
    "mxfp6_e3m2",
    "mxfp6_e2m3",
    "mxfp4",
    "fp4_e2m1_g128",
    "fp4_e1m2_g128",
)
_CPU_STATIC = ("int8", "fp8", "fp8_e5m2")
_CPU_BLOCKS = ("nvfp4", "nvint4", "mxfp8", "mxint8", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3")
TARGETS.register("onnxruntime")(
    Target(
        name="onnxruntime",
        title="ONNX Runtime and OpenVINO",
        opset=23,
        compute="float32",
        runs=frozenset(product(_CPU_WEIGHTS, (*_CPU_STATIC, *_CPU_BLOCKS, None))),
        tokens=frozenset(product(_CPU_WEIGHTS, ("int8", "fp8", "int4"))),
        outputs=frozenset({"int8"}),
    )
)
# What TensorRT-RTX 1.7.1 builds (tests/export builds every pair). It refuses INT4 weights under quantized activations
# ("is_constant").
TARGETS.register("tensorrt")(
    Target(
        name="tensorrt",
        title="TensorRT and TensorRT-RTX",
        opset=23,
        compute="float16",
        runs=frozenset(
            [("int8", "int8"), ("fp8", "fp8"), ("nvfp4", "nvfp4"), ("nvfp4", "fp8"), ("nvfp4", "int8")]
            + [(weights, None) for weights in ("int8", "fp8", *_INT4, "nvfp4")]
        ),
        tokens=frozenset(),
        outputs=frozenset(),
    )
)


def translates(op: str, *targets: str) -> Callable[[Translation], Translation]:
    """Return a decorator for the function that writes ``op`` (``namespace::name``) for these targets."""

    def add(function: Translation) -> Translation:
        for target in targets:
            table = _TABLE.setdefault(target, {})
            if op in table:
                raise RuntimeError(f"{op} has two translations for {target}")
            table[op] = function
        return function

    return add


def custom_ops() -> dict[str, CustomOpDef]:
    """Return the ops ``qdiff::*`` that quantized graphs consist of, by name; importing them registers them."""
    from qdiff.attention.operator import sparse_attention
    from qdiff.nn.ops import OPS
    from qdiff.routing.ops import OPS as BRANCH_OPS

    return {**OPS, **BRANCH_OPS, "sparse_attention": sparse_attention}


def table_for(target: Target) -> dict[Callable[..., object], Translation]:
    """Return the exporter's table of translations by torch op overload."""
    import torch

    import qdiff.export.translations.attention as _attention  # noqa: F401
    import qdiff.export.translations.choose as _choose  # noqa: F401
    import qdiff.export.translations.quantizers as _quantizers  # noqa: F401
    import qdiff.export.translations.sparse_attention as _sparse_attention  # noqa: F401

    custom_ops()  # importing registers them
    found = {}
    for op, function in _TABLE[target.name].items():
        namespace, name = op.split("::")
        found[getattr(getattr(torch.ops, namespace), name).default] = function
    return found
