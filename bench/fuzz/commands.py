"""Random command lines, in this process: all commands and options as typer declares them, right and wrong values, runs in every
state. Each has to end in time, without a traceback, and not with exit code 1, which is a bug of qdiff.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from bench.fuzz.material import FLOATS, INTEGERS, TEXTS, TINY, WORDS, Material

# Chosen more often than other commands.
STAGES = ("run", "calibrate", "compare", "correct", "generate", "quantize", "export", "build")
WORK = {
    "run": (*TINY, "--engine", "eager"),
    "calibrate": TINY[:-2],
    "compare": ("--pictures", "1"),
}
NEVER_SERVES = (("--port", "0"), ("--host", "0.0.0.0"), ("--auth", "/dev/null"), ("--auth", ""))
WRONG = ("--pictures", "0")


class Overdue(BaseException):
    """A command had no answer in time. No Exception: commands must not take it for an error of theirs."""


def check_commands(finished: Path, folder: Path, count: int, seed: int, limit: float) -> tuple[list[str], Counter[int]]:
    """Run ``count`` command lines.

    Args:
        finished: a run with every stage done.
        folder: an empty one.
        count: how many command lines.
        seed: of the random choices.
        limit: seconds that one may take.

    Returns:
        what is wrong, a line for each command line; how often each exit code came.
    """
    rng, material = random.Random(seed), Material(finished, folder)
    faults: list[str] = []
    codes: Counter[int] = Counter()
    before = os.getcwd()
    try:
        for number in range(1, count + 1):
            words = command_line(rng, material)
            material.clean()
            os.chdir(material.here)
            code, text, seconds = run_command(words, limit)
            codes[code] += 1
            fault = _fault(code, text, seconds, limit)
            if fault:
                shown = " ".join(shlex.quote(ascii(word)[1:-1][:200]) for word in ["qdiff", *words])
                faults.append(f"command {number}, {fault}: {shown}")
                print(faults[-1], flush=True)
            if number % 250 == 0:
                print(f"{number} of {count}, {len(faults)} faults", file=sys.stderr, flush=True)
            for name in material.runs:
                if any(str(material.runs[name]) in word for word in words):
                    material.restore(name)
    finally:
        os.chdir(before)
    return faults, codes


def command_line(rng: random.Random, material: Material) -> list[str]:
    """Return words after ``qdiff``."""
    group: Any = typer.main.get_command(_app())
    name = rng.choice([*group.commands, *STAGES]) if rng.random() < 0.98 else str(rng.choice(TEXTS))
    words = ["--quiet"] if rng.random() < 0.5 else []
    words.append(name)
    command = group.commands.get(name)
    if command is None:
        return [*words, str(rng.choice(TEXTS))]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts]
    for _ in arguments:
        if rng.random() < 0.95:
            words.append(material.path(rng))
    needed = [one for one in options if one.required]
    for one in [*needed, *rng.sample(options, min(len(options), rng.choice((0, 1, 1, 2, 2, 3, 5))))]:
        words.append(rng.choice(one.opts))
        if not one.is_flag:
            words.append(value(one, rng, material))
    if rng.random() < 0.02:
        words.insert(rng.randrange(len(words) + 1), str(rng.choice(TEXTS)))
    return [*words, *_harmless(name, options, rng)]


def value(option: Any, rng: random.Random, material: Material) -> str:
    """Return one for this option: mostly of its kind, now and then anything."""
    if rng.random() < 0.1:
        return str(rng.choice(TEXTS))
    kind = option.type_descriptor.annotation
    if option.name in WORDS:
        return str(rng.choice(WORDS[option.name]))
    if kind is Path:
        return material.path(rng)
    return str(rng.choice({int: INTEGERS, float: FLOATS}.get(kind, TEXTS)))


def _harmless(name: str, options: list[Any], rng: random.Random) -> list[str]:
    """Return words that keep a command line short where all its values happen to be right: the last of two options
    counts.
    """
    if name == "demo":
        return list(rng.choice(NEVER_SERVES))
    if any("--dry-run" in one.opts for one in options) and rng.random() < 0.97:
        return ["--dry-run"]
    if name == "correct" or (name in WORK and rng.random() < 0.98):  # a whole correction takes minutes
        return list(WRONG) if name != "calibrate" else ["--dry-run"]
    return list(WORK.get(name, ()))


def run_command(words: list[str], limit: float) -> tuple[int, str, float]:
    """Return the exit code, everything that was printed, and the seconds; -1 for an exception that came through, -2 for
    no answer in time.
    """
    from qdiff.cli import main

    out, err = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    with _plain_logging(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        signal.signal(signal.SIGALRM, _overdue)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            code = main.run(_app(), words)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        except Overdue:
            code = -2
        except BaseException as error:
            code = -1
            err.write(f"{type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return code, out.getvalue() + err.getvalue(), time.perf_counter() - start


def _overdue(number: int, frame: Any) -> None:
    raise Overdue


@contextlib.contextmanager
def _plain_logging() -> Iterator[None]:
    """Send the log to this command's stderr for the length of a block, and leave no handler behind."""
    from qdiff import device

    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("qdiff").level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        logging.getLogger("qdiff").setLevel(level)
        device.set_device(None)


def _fault(code: int, text: str, seconds: float, limit: float) -> str:
    if code == -2:
        return f"no answer after {limit:g} s"
    last = " ".join(text.strip().splitlines()[-2:])[:300]
    if code not in (0, 2, 3, 4, 5, 6, 7):
        return f"exit {code} ({last})"
    if "Traceback (most recent call last)" in text:
        return f"traceback ({last})"
    if code and "error: " not in text and "Usage: " not in text:
        return f"exit {code} without an error"
    return ""


def _app() -> typer.Typer:
    from qdiff.cli import commands

    return commands.app


__all__ = ["check_commands", "command_line", "run_command"]
