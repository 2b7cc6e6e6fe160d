"""The stages of a run: their order, what each is made from, and the commands that make them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from qdiff.errors import command, on_command_line, option

# The stages in order, and what each is made from: when one of those is made anew, the stage is out of date. Export is done
# once for each target and build once for each engine: their entries are ``export:tensorrt``, ``build:openvino`` and so on.
UPSTREAM: dict[str, tuple[str, ...]] = {
    "calibrate": (),
    "attention": ("calibrate",),
    "quantize": ("calibrate", "attention"),
    "export": ("quantize",),
    "build": ("export",),
    "correct": ("quantize",),  # with an engine, where one is there
    "compare": ("quantize", "correct", "build"),
    "report": ("quantize", "correct", "export", "build", "compare"),
}
OPTIONAL = ("attention", "correct")  # done only where it is asked for
EDITABLE = "plan.json"  # the one output that people edit; --plan applies what they wrote


def command_of(stage: str, path: Path, *arguments: str, **options: object) -> str:
    """Return the command, or the call, that does a stage in the run folder ``path``; see :func:`qdiff.errors.command`."""
    verb, _, choice = stage.partition(":")
    if verb == "attention":
        return command("calibrate", "…", attention=True, output=path, **options)
    if verb == "calibrate":
        return command(verb, *(() if on_command_line() else "…"), output=path, **options)
    if verb == "report":  # always anew
        return command("write_report", path)
    choices = {"target" if verb == "export" else "engine": choice} if choice else {}
    return command(verb, path, *arguments, **choices, **options)


def command_line() -> str:
    """Return the command line of this process."""
    return shlex.join(["qdiff", *sys.argv[1:]] if on_command_line() else ["python", *sys.argv])


def command_to_go_on(entry: Mapping[str, object], stage: str) -> str | None:
    """Return the command that goes on with a stage that was cut off, with its options; ``None`` where that was no
    command line, or the reader works in Python.
    """
    if not on_command_line():
        return None
    words = str(entry.get("command", "")).split(" ")
    made_by = (stage.partition(":")[0], "run")
    return " ".join(word for word in words if word != "--force") if words[1:2] and words[1] in made_by else None


def command_anew(entry: Mapping[str, object], stage: str, path: Path) -> str:
    """Return the command that makes a finished stage anew from the same options."""
    decided = stage in ("calibrate", "attention", "quantize", "correct")  # by options that its name does not tell
    again = command_to_go_on(entry, stage) if decided else None
    return command_of(stage, path, force=True) if again is None else f"{again} {option('force', True)}"
