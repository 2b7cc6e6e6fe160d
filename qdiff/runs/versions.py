"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

import qdiff

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt-rtx-cu13", "tensorrt")


def versions() -> dict[str, str]:
    """Return versions of what the numbers depend on; packages that are not installed are left out."""
    found = {"qdiff": qdiff.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
