"""The Python API: one function for each stage, which the command line calls too, and everything a notebook needs.

:mod:`.stages` has the stages, :mod:`.source` says which model is meant (a pipeline object, a folder, a Hub id, a bundled model),
:mod:`.pipelines` puts an engine into a diffusers pipeline, :mod:`.modules` quantizes a torch module, :mod:`.progress` shows bars.
"""

from __future__ import annotations

from qdiff.api.stages import (
    TARGETS,
    Calibration,
    build,
    calibrate,
    compare,
    correct,
    doctor,
    export,
    generate,
    inspect,
    list_models,
    open_run,
    quantize,
    run_all,
    write_report,
)

__all__ = [
    "TARGETS",
    "Calibration",
    "build",
    "calibrate",
    "compare",
    "correct",
    "doctor",
    "export",
    "generate",
    "inspect",
    "list_models",
    "open_run",
    "quantize",
    "run_all",
    "write_report",
]
