"""The files that a graph was cut into (:mod:`qdiff.export.hoist`), and profiles for the inputs that the cut has made."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.engines.base import BuildOptions, Engine, Profile
from qdiff.errors import UsageError

STEP = "step"
PARTS = ("prompt", "timestep")

Axes = Sequence[int | str | None]


@dataclass(frozen=True)
class GraphFile:
    """One file.

    Args:
        name: :data:`STEP` or one of :data:`PARTS`.
        inputs: axes of each, by name.
        outputs: names, in order.
    """

    name: str
    path: Path
    inputs: Mapping[str, Axes]
    outputs: Sequence[str]


def parts_of(onnx: Path) -> list[GraphFile]:
    """The files that lie beside a whole graph, the step's first; empty where it was not cut."""
    names = [name for name in (STEP, *PARTS) if onnx.with_name(f"{name}.onnx").is_file()]
    return [read(onnx.with_name(f"{name}.onnx")) for name in names] if STEP in names else []


def read(onnx: Path) -> GraphFile:
    """What goes into a graph and comes out of it."""
    import onnx as library

    graph = library.load(onnx, load_external_data=False).graph
    made_of = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: axes_of(value) for value in graph.input if value.name not in made_of}
    return GraphFile(onnx.stem, onnx, inputs, [value.name for value in graph.output])


def axes_of(value: Any) -> list[int | str | None]:
    """Sizes and names of the axes of a value in a graph; ``None`` where one has neither."""
    return [
        dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else None)
        for dim in value.type.tensor_type.shape.dim
    ]


def options_for(engine: Engine, options: BuildOptions, whole: GraphFile, part: GraphFile) -> BuildOptions:
    """Build options whose profiles also have ranges for the inputs that only the part has. What is computed once is computed in
    float32 where the engine lets choose: it costs next to nothing there."""
    profiles = tuple(_completed(profile, whole.inputs, part.inputs) for profile in options.profiles)
    once = part.name in PARTS and "f32" in engine.known_flags.get("precision", ())
    flags = {"precision": "f32", **options.flags} if once else options.flags
    return dataclasses.replace(options, profiles=profiles, flags=flags)


def _completed(profile: Profile, known: Mapping[str, Axes], inputs: Mapping[str, Axes]) -> Profile:
    sizes: dict[str, tuple[int, ...]] = {}
    for name, axes in known.items():
        if name in profile.ranges:
            for axis, *three in zip(axes, *profile.ranges[name], strict=True):
                if isinstance(axis, str):
                    sizes[axis] = tuple(three)
    ranges = dict(profile.ranges)
    for name, axes in inputs.items():
        if name not in known:
            low, usual, high = (
                tuple(_size(axis, {symbol: three[place] for symbol, three in sizes.items()}) for axis in axes)
                for place in range(3)
            )
            ranges[name] = low, usual, high
    return dataclasses.replace(profile, ranges=ranges)


def _size(axis: int | str | None, sizes: Mapping[str, int]) -> int:
    """The size of an axis that is a number, a name or a formula of names.

    Raises:
        UsageError: a name that has no size.
    """
    if isinstance(axis, int):
        return axis
    try:
        return _value(ast.parse(str(axis), mode="eval").body, sizes)
    except (KeyError, SyntaxError, TypeError) as error:
        raise UsageError(f"the profile says nothing about the axis {axis!r}", "build with --whole") from error


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise TypeError(ast.dump(node))
