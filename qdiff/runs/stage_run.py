"""A stage at work: what it reads, what it made so far, and its entry in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.files import sha256_file, sha256_json
from qdiff.resources import Usage
from qdiff.runs.stages import command_line
from qdiff.runs.versions import versions

if TYPE_CHECKING:
    from qdiff.runs.partial import Scratch


class StageRun:
    """One stage at work, between its beginning and its end. Made by :meth:`qdiff.runs.run.Run.stage`."""

    def __init__(self, folder: Path, name: str, inputs: Mapping[str, object]) -> None:
        self.folder, self.name, self.inputs = folder, name, inputs
        self.usage = Usage()
        self.resumed = False
        self._facts: dict[str, object] = {}
        self.outputs: list[Path] = []

    def output(self, path: Path) -> Path:
        """Declare a file that this stage made; its hash goes into the manifest when the stage ends."""
        self.outputs.append(path)
        return path

    def file(self, *parts: str) -> Path:
        """Return the path of an output in the run folder, declared as by :meth:`output`."""
        return self.output(self.folder.joinpath(*parts))

    def scratch(self, folder: str) -> Scratch:
        """Return where this stage keeps finished parts until it is done: only a try with the same inputs reads them."""
        from qdiff.runs.partial import Scratch

        return Scratch(self.folder / folder, sha256_json(self.inputs))

    def fact(self, **values: object) -> None:
        """Add JSON facts about this stage (counts, seconds of a part, warnings) to its manifest entry."""
        self._facts.update(values)

    def entry(self, status: str) -> dict[str, object]:
        """Return the manifest entry of this stage."""
        return {
            "status": status,
            "inputs": self.inputs,
            "outputs": {str(path.relative_to(self.folder)): sha256_file(path) for path in self.outputs},
            "seconds": round(self.usage.seconds, 3),
            "peak_memory_bytes": self.usage.peak_bytes,
            "command": command_line(),
            "versions": versions(),
            **self._facts,
        }
