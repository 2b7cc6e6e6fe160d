"""qdiff: from a diffusion model to a quantized, inspected engine that makes the same pictures.

    run = qdiff.quantize(pipe, recipe="int8", prompts=prompts, output="runs/mine")
    qdiff.export(run, target="tensorrt")
    qdiff.build(run, engine="openvino")
    pipe = qdiff.load_pipeline("runs/mine", engine="openvino")

Importing this package loads nothing heavy (no torch, onnx, tensorrt or gradio): a name of the API is imported when it is used
first. So the command line starts fast, and a broken optional dependency only breaks the command that needs it. A test holds this.

The sibling folders ``calib/``, ``export/``, ``engines/`` and ``app/`` of a source checkout are
``qdiff.calib`` … to Python (``package-dir`` in pyproject.toml; ``docs/decisions/0001-mapped-folders.md``).
An editable install finds them through its import hook. The lines at the end make ``python -m qdiff`` from
the checkout work as well when qdiff is not installed or is installed as a plain wheel elsewhere.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdiff.api.calibration import calibrate
    from qdiff.api.modules import quantize_module
    from qdiff.api.pictures import compare, correct, generate, write_report
    from qdiff.api.pipelines import load_pipeline
    from qdiff.api.run import open_run
    from qdiff.api.stages import build, doctor, export, inspect, list_models, quantize, run_all
    from qdiff.formats.table import Format
    from qdiff.plan.plan import Plan
    from qdiff.plan.recipe import Recipe
    from qdiff.recipes import load_recipe
    from qdiff.runs.run import Run

__version__ = "0.2.0"
__all__ = [
    "Format",
    "Plan",
    "Recipe",
    "Run",
    "build",
    "calibrate",
    "compare",
    "correct",
    "doctor",
    "export",
    "generate",
    "inspect",
    "list_models",
    "load_pipeline",
    "load_recipe",
    "open_run",
    "quantize",
    "quantize_module",
    "run_all",
    "write_report",
]

_HOMES = {
    "Format": "qdiff.formats.table",
    "Plan": "qdiff.plan.plan",
    "Recipe": "qdiff.plan.recipe",
    "Run": "qdiff.runs.run",
    "load_pipeline": "qdiff.api.pipelines",
    "load_recipe": "qdiff.recipes",
    "quantize_module": "qdiff.api.modules",
}  # of the names of the API that are not in qdiff.api


def __getattr__(name: str) -> object:
    """Import a name of the API when it is asked for first."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "export":  # the name of a package too, which can be called (see there)
        return importlib.import_module(f"{__name__}.{name}")
    found = getattr(importlib.import_module(_HOMES.get(name, "qdiff.api")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_package = _Path(__file__).resolve().parent
if not (_package / "calib").is_dir() and (_package.parent / "pyproject.toml").is_file():
    __path__.append(str(_package.parent))
