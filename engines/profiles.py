"""Optimisation profiles from words: ``512``, ``dyn-256-1024``, ``512x768,batch=1-2-8``.

A model family says once which axes its inputs have (``{"hidden_states": ("batch", 4, "height", "width"), ...}``) and which sizes
it has by default. A user then changes sizes by the axis's name and never writes a shape; the shapes of all inputs follow and
cannot contradict each other. Sizes in pixels are divided by the VAE's factor here, in one place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qdiff.engines.base import Profile, Shape
from qdiff.errors import UsageError, unknown_name

Range = tuple[int, int, int]
_HELP = "write 512, 512x768, dyn-256-1024, and axes as batch=1-2-8, joined by commas"


def parse_range(text: str) -> Range:
    """Return the least, usual and largest size that a text names: ``"2"`` gives (2, 2, 2); ``"1-4"`` gives (1, 4, 4),
    fastest at the largest; ``"1-2-8"`` gives (1, 2, 8).

    Raises:
        UsageError: not one to three rising whole numbers from 1.
    """
    if not re.fullmatch(r"\d{1,9}(-\d{1,9}){0,2}", text.strip()):
        raise UsageError(f"{text!r} is not a range", "write 2, 1-4 (min-max) or 1-2-8 (min-usual-max)")
    numbers = [int(part) for part in text.strip().split("-")]
    low, usual, high = numbers[0], numbers[len(numbers) // 2], numbers[-1]
    return _checked(text, (low, usual, high))


def _checked(what: str, sizes: Range) -> Range:
    low, usual, high = sizes
    if not 1 <= low <= usual <= high:
        raise UsageError(
            f"{what!r}: sizes are min {low}, usual {usual}, max {high}", "they have to be 1 <= min <= usual <= max"
        )
    return sizes


def _pixels(text: str, scale: int) -> Range:
    low, usual, high = parse_range(text)
    wrong = [size for size in (low, usual, high) if size % scale]
    if wrong:
        raise UsageError(f"{wrong[0]} pixels are no multiple of {scale}", f"use {max(wrong[0] // scale, 1) * scale}")
    return low // scale, usual // scale, high // scale


def parse_profile(text: str, scale: int = 8) -> dict[str, Range]:
    """Return sizes by axis name, in latent units for ``height`` and ``width``.

    Args:
        text: pieces joined by commas: ``512`` or ``512x768`` (height x width) pixels, ``dyn-256-1024`` pixels from-to for both,
            ``axis=range`` or ``axis range``.
        scale: pixels per latent (the VAE's factor).

    Raises:
        UsageError: a piece that is none of these, a size twice, pixels that the VAE cannot make.
    """
    sizes: dict[str, Range] = {}
    for piece in filter(None, (part.strip() for part in text.split(","))):
        found: dict[str, Range]
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", piece):
            found = {"height": _pixels(match[1], scale), "width": _pixels(match[2] or match[1], scale)}
        elif match := re.fullmatch(r"dyn-(\d+(?:-\d+){1,2})", piece):
            found = {"height": _pixels(match[1], scale), "width": _pixels(match[1], scale)}
        elif match := re.fullmatch(r"([a-z_]+)[= ]\s*([\d-]+)", piece):
            found = {match[1]: parse_range(match[2])}
        else:
            raise UsageError(f"profile {text!r}: {piece!r} is not understood", _HELP)
        for axis in found:
            if axis in sizes:
                raise UsageError(f"profile {text!r} gives {axis!r} twice", _HELP)
        sizes |= found
    if not sizes:
        raise UsageError(f"profile {text!r} is empty", _HELP)
    return sizes


def make_profile(name: str, axes: Mapping[str, Sequence[int | str]], sizes: Mapping[str, Range]) -> Profile:
    """Return the profile of all inputs.

    Args:
        name: shown in reports and errors.
        axes: input -> its axes, each a fixed size or an axis name such as ``"batch"``, ``"height"``, ``"tokens"``.
        sizes: axis name -> (min, usual, max).

    Raises:
        UsageError: a size for an axis that no input has, or an axis without a size.
    """
    known = sorted({axis for shape in axes.values() for axis in shape if isinstance(axis, str)})
    for axis, given in sizes.items():
        if axis not in known:
            raise unknown_name("profile axis", axis, known)
        _checked(f"{name}: {axis}", given)
    lacking = [axis for axis in known if axis not in sizes]
    if lacking:
        raise UsageError(f"profile {name!r} says nothing about {', '.join(lacking)}", f"add e.g. {lacking[0]}=1-2-8")

    def shape(of: Sequence[int | str], which: int) -> Shape:
        return tuple(sizes[axis][which] if isinstance(axis, str) else axis for axis in of)

    return Profile(name, {key: (shape(of, 0), shape(of, 1), shape(of, 2)) for key, of in axes.items()})
