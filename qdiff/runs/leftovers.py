"""What a run folder holds beside the outputs in its manifest, and what of it may be deleted: what qdiff wrote, no other file.

A run folder can be any folder that a person names with ``-o``, so it may hold files of theirs, also in a folder whose name is
one of ours. A file is ours when the manifest recorded it, or when its name is one that only an unfinished stage leaves.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from qdiff.events import log
from qdiff.files import safe_child

FOLDERS = ("calibration", "attention", "quantization", "correction", "onnx", "engines", "images")
# Of write_atomically and temporary_beside; of safetensors, which writes beside the file that it is given.
_HALF_WRITTEN = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp(\.onnx)?|\.tmp[A-Za-z0-9]{6}")
_OF_STAGES = re.compile(r"prompts\.txt|.+\.safetensors|(model|step|prompt|timestep)\.onnx(\.data)?")
_UNFINISHED = re.compile(r"\.[a-z0-9_]+(-[0-9a-f]{16})?\.[a-z0-9_]{8}(\.old)?")  # folders of exports and builds


def sweep(run: Path) -> None:
    """Remove what a killed process left half written. Nobody else works in the run folder: its lock is held."""
    inside = [path for name in FOLDERS for path in (run / name).rglob(".*")]
    for path in [*run.glob(".*"), *inside]:
        if _HALF_WRITTEN.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    for name in ("onnx", "engines"):
        for folder in (run / name).glob(".*"):
            if _UNFINISHED.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
    for folder in run.glob(".parity-????????"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(run: Path, name: str, recorded: Collection[str], unfinished: bool) -> bool:
    """Remove what a stage left at ``name`` in the run folder, a file or a folder.

    Args:
        run: the run folder.
        name: of the file or folder, relative to the run folder.
        recorded: outputs that the manifest names, relative to the run folder.
        unfinished: whether the stage was begun in this run: then files with names of its parts are ours as well.

    Returns:
        Whether a recorded output was removed.
    """
    path, lost, strange = safe_child(run, name), False, 0
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if not one.is_dir() or one.is_symlink())
    for file in files:
        known = str(file.relative_to(path if path == run else run.resolve())) in recorded
        if known or (unfinished and _OF_STAGES.fullmatch(file.name)):
            file.unlink(missing_ok=True)
            lost |= known
        else:
            strange += 1
    if path.is_dir():
        for folder in [*sorted((one for one in path.rglob("*") if one.is_dir()), reverse=True), path]:
            if not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    if strange:
        log.warning("%s: %d files that qdiff did not write stay there", path, strange)
    return lost
