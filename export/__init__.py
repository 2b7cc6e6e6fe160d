"""Quantized torch module -> ONNX for a target, and the checks that the file holds what was asked.

``qdiff.export`` is also the function of the Python API (:func:`qdiff.api.stages.export`): this package can be called, because a
function and a package of one name cannot both be attributes of ``qdiff`` (docs/decisions/0023-python-api.md).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdiff.api.progress import Progress
    from qdiff.api.run import RunOrPath
    from qdiff.runs.run import Run


class _CallablePackage(ModuleType):
    """A package that is the function of its name."""

    def __call__(
        self,
        run: RunOrPath,
        target: str | Sequence[str] = ("onnxruntime", "tensorrt"),
        *,
        force: bool = False,
        dry_run: bool = False,
        progress: Progress = None,
    ) -> Run:
        """Export a run; see :func:`qdiff.api.stages.export`."""
        from qdiff.api.stages import export

        return export(run, target, force=force, dry_run=dry_run, progress=progress)


sys.modules[__name__].__class__ = _CallablePackage
