"""The Python API: one function for each stage, which the command line calls too, and everything a notebook needs.

:mod:`.calibration`, :mod:`.stages` and :mod:`.pictures` have the stages; :mod:`.source` says which model is meant (a pipeline
object, a folder, a Hub id, a bundled model); :mod:`.pipelines` puts an engine into a diffusers pipeline, :mod:`.modules`
quantizes a torch module, :mod:`.progress` shows bars.
"""

from __future__ import annotations

from qdiff.api.calibration import Calibration, calibrate
from qdiff.api.pictures import compare, correct, generate, write_report
from qdiff.api.run import open_run
from qdiff.api.stages import TARGETS, build, doctor, export, inspect, list_models, quantize, run_all

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
