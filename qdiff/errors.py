"""Every error that qdiff raises on purpose, with the exit code that the command line gives it.

An error says what is wrong, which value, and the fix. What is not a :class:`QdiffError` is a bug of ours (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[QdiffError] = UsageError) -> QdiffError:
    """Return an error for a name that is not in a table: names the nearest entries and all of them when they are
    few.
    """
    known = sorted(known)
    close = nearest(name, known)
    hint = f"did you mean {', '.join(close)}?" if close else ""
    everything = f"known: {', '.join(known)}" if len(known) <= 20 else f"{len(known)} are known"
    return error(f"unknown {kind} {name!r}", "; ".join(part for part in (hint, everything) if part))
