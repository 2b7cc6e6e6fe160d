"""Every error that qdiff raises on purpose, with the exit code that the command line gives it.

An error says what is wrong, which value, and the fix. What is not a :class:`QdiffError` is a bug of ours (exit code 1).

The fix names what the caller can write: :func:`option` and :func:`command` give a flag to who wrote a command, and an argument to
who called Python. So the text of an error exists once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath

_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "cannot allocate",
    "can't allocate memory",
)


class QdiffError(Exception):
    """Base of all errors with a known cause.

    Args:
        message: what is wrong, with the value that is wrong.
        fix: what the user can do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(QdiffError):
    """The command line or the call is wrong."""

    exit_code = 2


class InputError(QdiffError):
    """A file, a recipe, a prompt or a model is not what it has to be."""

    exit_code = 3


class MissingDependencyError(QdiffError):
    """An optional package or a piece of hardware that this step needs is not there."""

    exit_code = 4


class IntegrityError(QdiffError):
    """A file was changed, cut off, or made by someone else."""

    exit_code = 5


class MemoryExhaustedError(QdiffError):
    """Host or device memory, or the disk, ran out."""

    exit_code = 6


class QualityGateError(QdiffError):
    """The result works but is worse than the gate allows."""

    exit_code = 7


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of whichever library, means that memory ran out."""
    if isinstance(error, (MemoryError, MemoryExhaustedError)):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in _MEMORY_WORDS)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the ``count`` entries of ``known`` that look most like ``name``, best first (may be empty)."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def unknown_name(
    kind: str, name: str, known: Iterable[str], error: type[QdiffError] = UsageError, meant: str | None = None
) -> QdiffError:
    """Return an error for a name that is not in a table: names the entry that is ``meant``, or the nearest entries, and all of
    them when they are few.
    """
    known = sorted(known)
    close = nearest(name, known) if meant is None else [meant]
    hint = f"did you mean {', '.join(close)}?" if close else ""
    everything = f"known: {', '.join(known)}" if len(known) <= 20 else f"{len(known)} are known"
    return error(f"unknown {kind} {name!r}", "; ".join(part for part in (hint, everything) if part))


_on_command_line = False
_FLAGS = {
    "engines": "--engine",
    "flags": "--flag",
    "methods": "--method",
    "minimum_psnr": "--min-psnr",
    "output": "-o",
    "profiles": "--profile",
    "settings": "--set",
    "source": "--model",
}  # of the API's arguments that the command line calls something else
_COMMANDS = {"list_models": "models", "run_all": "run", "write_report": "report"}


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Let the errors inside the block advise flags and commands; elsewhere they advise arguments and functions of Python."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def on_command_line() -> bool:
    """Return whether who reads the errors wrote a command."""
    return _on_command_line


def option(name: str, value: object = None) -> str:
    """Return an argument of the API as the caller would write it.

    >>> option("force", True), option("profiles", ["512"]), option("output")
    ('force=True', 'profiles=["512"]', 'output=')
    >>> with command_line():
    ...     option("force", True), option("profiles", ["512"]), option("output")
    ('--force', '--profile 512', '-o')

    Args:
        name: of the argument in Python.
        value: ``None``: the argument alone is named.
    """
    if not _on_command_line:
        return f"{name}={'' if value is None else _literal(value)}"
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if value is None or value is True:
        return flag
    if isinstance(value, Mapping):
        return " ".join(f"{flag} {key}={setting}" for key, setting in value.items())
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return " ".join(f"{flag} {part}" for part in value)
    return f"{flag} {','.join(map(_number, value)) if isinstance(value, list | tuple) else _number(value)}"


def command(name: str, *arguments: object, **options: object) -> str:
    """Return a call of the API as the caller would write it.

    >>> command("quantize", "runs/mine", force=True)
    'qdiff.quantize("runs/mine", force=True)'
    >>> with command_line():
    ...     command("quantize", "runs/mine", force=True)
    'qdiff quantize runs/mine --force'

    Args:
        name: of the function in Python.
        arguments: its run, or ``RUN`` for one that the reader has to name; ``…`` stands for what the reader gave before.
        options: see :func:`option`.
    """
    if _on_command_line:
        words = [*map(str, arguments), *(option(key, value) for key, value in options.items())]
        return " ".join(["qdiff", _COMMANDS.get(name, name), *words])
    given = [str(one).lower() if one in ("RUN", "…") else _literal(one) for one in arguments]
    named = [_literal(value) if key == "source" else option(key, value) for key, value in options.items()]
    return f"qdiff.{name}({', '.join([*given, *named])})"


def _literal(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(str(value), ensure_ascii=False) if isinstance(value, str | PurePath) else _number(value)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
