"""Translations: for each target, how an op of the traced graph is written in ONNX.

A translation is a function that builds ONNX nodes (onnxscript's function style, traced by torch's exporter). Register it for
the ops and targets that it serves; a target takes every translation that names it. An op without a translation for a target
is an error at export, with the layer's name, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qdiff.registry import Registry

Translation = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """What a graph is written for.

    Args:
        name: ``tensorrt`` or ``onnxruntime``.
        title: for people.
        opset: ONNX opset of the file.
        compute: dtype of everything that is not quantized. GPUs get 16 bit: a strongly typed TensorRT engine computes what
            the graph says, and float32 attention would cost more than INT8 gains. CPUs get 32 bit, their engines choose.
        runs: formats of (weights, activations) that its graphs can hold.
        outputs: formats in which it runs what follows a quantized output (the product of q and k). Empty: those quantizers
            are left out, because its engines fuse attention in 16 bit and a Q/DQ pair in the middle would break the fusion.
    """

    name: str
    title: str
    opset: int
    compute: str
    runs: frozenset[tuple[str, str]]
    outputs: frozenset[str]


TARGETS: Registry[Target] = Registry("target")
_TABLE: dict[str, dict[str, Translation]] = {}

_INT8 = frozenset({("int8", "int8")})
TARGETS.register("onnxruntime")(
    Target("onnxruntime", "ONNX Runtime and OpenVINO", 23, "float32", _INT8, frozenset({"int8"}))
)
TARGETS.register("tensorrt")(Target("tensorrt", "TensorRT and TensorRT-RTX", 23, "float16", _INT8, frozenset()))


def translates(op: str, *targets: str) -> Callable[[Translation], Translation]:
    """Decorator: this function writes ``op`` (``namespace::name``) for these targets."""

    def add(function: Translation) -> Translation:
        for target in targets:
            table = _TABLE.setdefault(target, {})
            if op in table:
                raise RuntimeError(f"{op} has two translations for {target}")
            table[op] = function
        return function

    return add


def table_for(target: Target) -> dict[Any, Translation]:
    """The exporter's table: torch op overload -> translation."""
    import torch

    import qdiff.export.translations.attention as _attention  # noqa: F401
    import qdiff.export.translations.quantizers as _quantizers  # noqa: F401
    import qdiff.ops as _ops  # noqa: F401

    found = {}
    for op, function in _TABLE[target.name].items():
        namespace, name = op.split("::")
        found[getattr(getattr(torch.ops, namespace), name).default] = function
    return found
