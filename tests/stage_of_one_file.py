"""A stage for tests of the run folder."""

from __future__ import annotations

from typing import Any

from qdiff.files import write_text
from qdiff.runs.run import Run


def make_stage(run: Run, name: str, inputs: dict[str, Any], text: str = "made", **options: Any) -> str:
    """Run a stage that writes one file, and return what happened to it: ``made``, ``resumed`` or ``skipped``."""
    with run.stage(name, inputs, **options) as stage:
        if stage is None:
            return "skipped"
        write_text(stage.output(run.file(f"{name.replace(':', '-')}.txt")), text)
        return "resumed" if stage.resumed else "made"
