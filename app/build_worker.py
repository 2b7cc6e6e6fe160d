"""The process in which the page's builds run: ``python -m qdiff.app.build_worker``. Options come as JSON on stdin, progress goes
as lines of JSON to stdout.

A process of its own, because a build takes minutes and gigabytes: its memory is given back whole when it ends, it can be
killed at any moment (stages resume), it runs at a lower priority than the pictures, and whatever it dies of, the page lives.
It ends when stdin closes, so it never outlives the page.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TypedDict

from qdiff.errors import QdiffError, command_line
from qdiff.events import Event, listening
from qdiff.files import Json
from qdiff.runs.run import Run


class BuildWork(TypedDict):
    """Holds what to build; read as JSON from stdin."""

    family: str
    weights: str
    recipe: str
    samples: int
    engines: list[str]
    folder: str


def _say(**line: Json) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(log=record.getMessage())


def build(options: BuildWork) -> None:
    """Run all stages for one model. An engine that cannot take the recipe's formats is an error that names the layer."""
    from qdiff.stages.calibrate import CalibrateOptions
    from qdiff.stages.run import run_all

    folder, recipe = options["folder"], options["recipe"]
    calibration = CalibrateOptions(options["family"], options["weights"], samples=options["samples"])
    arguments = ["--model", calibration.model, "--weights", calibration.weights, "--samples", str(calibration.samples)]
    engines = [word for name in options["engines"] for word in ("--engine", name)]
    # The manifest records the command that made a stage: the one that does the same from a shell.
    sys.argv = ["qdiff", "run", *arguments, "--recipe", recipe, *engines, "--pictures", "4", "-o", folder]
    run_all(Run(folder), calibration, recipe, engines=options["engines"], pictures=4)


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os._exit(130)


def main() -> None:
    """Read one line of options, build, and say how it ended."""
    options: BuildWork = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(10)
    logger = logging.getLogger("qdiff")
    logger.addHandler(_Lines())
    logger.setLevel(logging.INFO)

    def tell(event: Event) -> None:
        _say(task=event.task, done=event.done, total=event.total)

    Path(options["folder"]).parent.mkdir(parents=True, exist_ok=True)
    try:
        with command_line(), listening(tell):
            build(options)
        _say(ended="done")
    except QdiffError as error:
        _say(ended="failed", error=error.message, fix=error.fix)
    except MemoryError:
        _say(ended="failed", error="memory ran out", fix="choose a smaller budget, or a machine with more memory")


if __name__ == "__main__":
    main()
