"""The command line: parses, calls a function of :mod:`qdiff.api`, prints its result. What a stage does is in :mod:`qdiff.stages`,
what becomes of errors in :mod:`qdiff.cli.main`.

stdout is the result (``--json``: one JSON object), stderr is progress and log. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from qdiff.cli import stage_commands, view_commands
from qdiff.cli.app import app

_REGISTERED = (stage_commands, view_commands)  # imported for their @app.command

__all__ = ["app"]
