"""``run.json`` on disk: sealed, and twice.

The manifest says which files are trusted, so it carries the hash of its own content and is refused when that does not fit. It is
written whole or not at all, but a disk that fails, or a copy that was cut off, can still end it early, and a run of hours must
not hang on one small file. So the same text lies beside it as ``run.copy.json``, written after it. Where ``run.json`` is missing
or cut, the copy is taken, and said. A manifest that is whole and was edited is still refused: that is news, and its copy is
named as the way back.

Each manifest also carries the seal of the one that was there before. So the two files are of one folder when their seals are
equal, or when one of them is the one before the other (a process was killed between the two): anything else is the manifest of
another run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict

from qdiff.errors import IntegrityError, QdiffError, command
from qdiff.events import log
from qdiff.files import read_json, require_plain, sha256_json, write_json, write_text

NAME, COPY = "run.json", "run.copy.json"
VERSION = 1
_SEAL: Final = "sha256"
_BEFORE: Final = "before"


class Manifest(TypedDict):
    """What a manifest says: entries of the stages, and files in the run folder that forgotten stages left. On disk it has its
    seal (the hash of all the rest), and the seal of the manifest before it.
    """

    version: int
    stages: dict[str, dict[str, Any]]
    leftovers: NotRequired[list[str]]
    sha256: NotRequired[str]
    before: NotRequired[str | None]


def is_there(folder: Path) -> bool:
    """Return whether the folder holds a manifest, or its copy, or something in its place."""
    return (folder / NAME).exists() or (folder / COPY).is_file()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with its seal and the one before's, and its copy."""
    content = {**manifest, _BEFORE: _seal_of(folder / NAME)}
    sealed = {**content, _SEAL: sha256_json(content)}
    write_json(folder / NAME, sealed)
    write_json(folder / COPY, sealed)


def text(folder: Path) -> str | None:
    """Return the manifest as it is on disk; ``None``: there is none."""
    path = folder / NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def put_back(folder: Path, written: str) -> None:
    """Write an earlier :func:`text` of the manifest again, and its copy."""
    for name in (NAME, COPY):
        write_text(folder / name, written)


def refresh_copy(folder: Path) -> None:
    """Write the copy again where it is not the manifest's text: a process that was killed between the two had left it
    behind.
    """
    written = text(folder)
    if written is not None and not has_copy(folder):
        write_text(folder / COPY, written)


def has_copy(folder: Path) -> bool:
    """Return whether the manifest's copy is there and equals it."""
    path, copy = folder / NAME, folder / COPY
    return path.is_file() and copy.is_file() and copy.read_bytes() == path.read_bytes()


def read(folder: Path, stages: Container[str]) -> Manifest:
    """Return the manifest without its seal; from the copy where ``run.json`` is missing or cut.

    Args:
        folder: of the run.
        stages: names that its entries may have, up to a colon.

    Raises:
        IntegrityError: it is not ours, of another version, or was changed; or it is cut and so is its copy.
    """
    with contextlib.suppress(FileNotFoundError):
        require_plain(folder / NAME, "the manifest")  # reading a pipe would wait, and a folder cannot be replaced
    try:
        json.loads((folder / NAME).read_bytes())
        whole = True
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole and (folder / COPY).is_file():
        with contextlib.suppress(QdiffError):
            manifest = _read(folder / COPY, stages)
            log.warning("%s is missing or was cut off: its copy %s is taken", folder / NAME, COPY)
            with contextlib.suppress(OSError):  # a folder that cannot be written can still be read
                shutil.copyfile(folder / COPY, folder / f".{NAME}.restored.tmp")
                (folder / f".{NAME}.restored.tmp").replace(folder / NAME)
            return manifest
    manifest = _read(folder / NAME, stages)
    _require_same_run(folder)
    return manifest


def _require_same_run(folder: Path) -> None:
    """Refuse a manifest that does not follow its copy. One of an older qdiff does not say what it follows."""
    path, copy = folder / NAME, folder / COPY
    for pause in (0.0, 0.2):  # another process may write both while they are read
        time.sleep(pause)
        own, other = _content(path), _content(copy)
        if _SEAL not in other or _BEFORE not in own or other[_SEAL] in (own[_BEFORE], own.get(_SEAL)):
            return
        if other.get(_BEFORE) == own.get(_SEAL):  # a kill while the one before was put back
            return
    raise IntegrityError(
        f"{path} is of another run, or of another state of this one, than its copy {COPY}",
        f"put back the one that is right: cp {copy} {path}, or cp {path} {copy}",
    )


def _seal_of(path: Path) -> str | None:
    """Return the seal that a manifest carries; ``None``: there is none."""
    seal = _content(path).get(_SEAL)
    return seal if isinstance(seal, str) else None


def _content(path: Path) -> dict[str, object]:
    """Return the JSON object in a file, unchecked; an empty one where there is none."""
    if not path.is_file():  # reading a pipe would wait
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(path: Path, stages: Container[str]) -> Manifest:
    manifest: Manifest = read_json(path, "the manifest")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
        raise IntegrityError(
            f"{path} is not a manifest of qdiff", f"start a new run folder: {command('calibrate', output='NEW')}"
        )
    if manifest.get("version") != VERSION:
        raise IntegrityError(
            f"{path} has version {manifest.get('version')!r}, this qdiff reads {VERSION}",
            f"use the qdiff that made it, or start a new run folder: {command('calibrate', output='NEW')}",
        )
    seal = manifest.pop(_SEAL, None)
    if seal != sha256_json(manifest) or not all(
        stage.partition(":")[0] in stages and isinstance(entry, dict) for stage, entry in manifest["stages"].items()
    ):
        copy = path.with_name(COPY)
        back = f"cp {copy} {path}" if copy.is_file() and copy != path else "put the old file back"
        raise IntegrityError(
            f"{path} was changed by hand or by another program (its seal does not fit)",
            f"{back}, or start a new run folder: {command('calibrate', output='NEW')}",
        )
    manifest.pop(_BEFORE, None)
    return manifest
