"""qdiff: from a diffusion model to a quantized, inspected engine that makes the same pictures.

Importing this package loads nothing heavy (no torch, onnx, tensorrt or gradio): the command line starts
fast and a broken optional dependency only breaks the command that needs it. A test holds this.

The sibling folders ``calib/``, ``export/``, ``engines/`` and ``app/`` of a source checkout are
``qdiff.calib`` … to Python (``package-dir`` in pyproject.toml; ``docs/decisions/0001-mapped-folders.md``).
An editable install finds them through its import hook. The lines at the end make ``python -m qdiff`` from
the checkout work as well when qdiff is not installed or is installed as a plain wheel elsewhere.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_package = _Path(__file__).resolve().parent
if not (_package / "calib").is_dir() and (_package.parent / "pyproject.toml").is_file():
    __path__.append(str(_package.parent))
