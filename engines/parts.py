"""Build options for the parts of a cut graph: profiles for the inputs that the cut has made."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping

from qdiff.engines.base import BuildOptions, Engine, Profile
from qdiff.errors import UsageError, option
from qdiff.graphs.parts import PARTS, Axes, GraphFile


def options_for(engine: Engine, options: BuildOptions, whole: GraphFile, part: GraphFile) -> BuildOptions:
    """Build options whose profiles also have ranges for the inputs that only the part has. What is computed once is computed in
    float32 where the engine lets choose: it costs next to nothing there.
    """
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
    """Return the size of an axis that is a number, a name or a formula of names.

    Raises:
        UsageError: a name that has no size.
    """
    if isinstance(axis, int):
        return axis
    try:
        return _value(ast.parse(str(axis), mode="eval").body, sizes)
    except (KeyError, SyntaxError, TypeError) as error:
        raise UsageError(
            f"the profile says nothing about the axis {axis!r}", f"build with {option('whole', True)}"
        ) from error


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
