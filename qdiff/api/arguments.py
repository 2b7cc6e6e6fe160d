"""Arguments of the API's functions are checked against their annotations, so that a wrong one is named before work begins."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, Union, Unpack, cast, get_args, get_origin, get_type_hints

from qdiff.errors import UsageError, nearest, option

P = ParamSpec("P")
R = TypeVar("R")
_WORDS: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "None",
}
_PLURALS: dict[object, str] = {float: "numbers", str: "texts"}
_NUMBERS: dict[object, type] = {int: numbers.Integral, float: numbers.Real}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function``, which refuses arguments that it does not take.

    Pipelines, modules and calls of modules are not looked at: the function itself says more about them.

    Raises:
        UsageError: when called with an unknown argument, or with a value of another type; says what is taken.
    """
    signature, called = inspect.signature(function), f"qdiff.{function.__name__}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise _misfit(called, signature, kwargs, error) from None
        hints = _hints(function)
        for name, value in {**given, **given.get("options", {})}.items():
            if name in hints:
                require(called, name, value, hints[name])
        return function(*args, **kwargs)

    return call


def require(called: str, name: str, value: object, hint: object) -> None:
    """Refuse a value of another type than ``hint`` for the argument ``name`` of ``called``.

    Raises:
        UsageError: names the argument, its value, and what is taken.
    """
    if not _fits(value, hint):
        plain = isinstance(value, str | numbers.Number | list | tuple | dict | None)
        shown = repr(value)[:60] if plain else f"a {type(value).__name__}"
        raise UsageError(f"{called} was given {name}={shown}", f"{option(name)} takes {_said(hint)}")


def _misfit(called: str, signature: inspect.Signature, kwargs: dict[str, object], error: TypeError) -> UsageError:
    unknown = [name for name in kwargs if name not in signature.parameters]
    return unknown_argument(called, unknown[0], signature.parameters) if unknown else UsageError(f"{called}: {error}")


def unknown_argument(
    called: str, name: str, known: collections.abc.Iterable[str], meant: str | None = None
) -> UsageError:
    """Return the error about an argument that a function does not have, with the one that is ``meant``, or the nearest ones."""
    close = nearest(name, known) if meant is None else [meant]
    fix = f"did you mean {' or '.join(close)}?" if close else f"it takes {', '.join(known)}"
    return UsageError(f"{called} has no argument {name!r}", fix)


@functools.cache
def _hints(function: Callable[..., object]) -> dict[str, object]:
    """Return the types of a function's arguments by name, of those in ``**options`` too."""
    hints = get_type_hints(function, localns={"DiffusionPipeline": object})
    for name in ("return", "module", "calls"):
        hints.pop(name, None)
    options = hints.pop("options", None)
    return hints | (get_type_hints(get_args(options)[0]) if get_origin(options) is Unpack else {})


def _fits(value: object, hint: object) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is collections.abc.Sequence:
        return (
            isinstance(value, collections.abc.Sequence)
            and not isinstance(value, str)
            and all(_fits(one, inner[0]) for one in value)
        )
    if origin is collections.abc.Mapping:
        return isinstance(value, collections.abc.Mapping) and all(
            _fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items()
        )
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):
        return callable(value)
    return isinstance(value, cast("type", hint))


def _said(hint: object) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(_said(one) for one in inner))
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is collections.abc.Sequence:
        return f"a list of {_PLURALS[inner[0]]}"
    if origin is collections.abc.Mapping:
        return f"a dict of {_PLURALS[inner[0]]}"
    if getattr(hint, "_is_protocol", False):
        return "a function"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
