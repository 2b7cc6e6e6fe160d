"""Which engine folders may be loaded.

A plan is a binary that one runs (NVIDIA says so; TensorRT's own validity check "is not a tamper-detection mechanism"). So
nothing is loaded before :func:`trusted` has seen that the folder and its files are the user's, that nobody else can write
them, that the manifest carries the user's signature, and that every byte is as built. What fails is refused and not
silently built anew: a changed engine is news. The folder's name is signed too, so one engine's folder cannot stand in for
another's. What this cannot stop is someone who already acts as the user.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NotRequired, TypedDict

from qdiff.engines import signing
from qdiff.engines.base import BuildFacts, Engine, OptionsJson
from qdiff.errors import IntegrityError, command
from qdiff.files import read_json, sha256_file, sha256_json

MANIFEST = "manifest.json"  # of an engine's folder
FORMAT = 1  # raised when an engine's files or the manifest change their meaning
_PURPOSE = "engine manifest"


class KeyParts(TypedDict):
    """Everything that decides an engine's files."""

    format: int
    onnx: str  # digest of the graph with its weights
    engine: str
    version: str
    device: str
    options: OptionsJson


class EngineManifest(TypedDict):
    """What ``manifest.json`` of an engine's folder holds: ``changing`` are files that change as the engine runs, ``files`` the
    sha256 of the others; ``hmac`` signs all the rest.
    """

    parts: KeyParts
    facts: BuildFacts
    changing: list[str]
    files: dict[str, str]
    hmac: NotRequired[str]


def folder_name(parts: KeyParts) -> str:
    """Return the name of the folder in which the engine with these parts lies."""
    return f"{parts['engine']}-{sha256_json(parts)[:16]}"


def _fix(folder: Path) -> str:
    name = folder.name.rpartition("-")[0]
    return f"rebuild: {command('build', folder.parent.parent, engine=name, force=True)}"


def _check_owner(path: Path, folder: Path, kind: str) -> None:
    status = path.lstat()
    right = stat.S_ISDIR(status.st_mode) if kind == "folder" else stat.S_ISREG(status.st_mode)
    if not right:
        raise IntegrityError(f"{path} is not a plain {kind} (a link?)", _fix(folder))
    if status.st_uid != os.getuid():
        raise IntegrityError(f"{path} belongs to another user (uid {status.st_uid})", _fix(folder))
    if status.st_mode & 0o022:
        raise IntegrityError(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})", _fix(folder)
        )


def trusted(folder: Path, engine: Engine | None = None) -> EngineManifest:
    """Verify an engine folder and return its manifest.

    Args:
        folder: what :func:`build_cached` made.
        engine: also asks that this engine, in the version installed here, built it.

    Raises:
        InputError: there is no engine.
        IntegrityError: any byte, name, owner, permission, signature or version is not as built.
    """
    folder = Path(os.path.abspath(folder))
    manifest: EngineManifest = read_json(folder / MANIFEST, "the engine's manifest")
    for path in (folder.parent, folder):
        _check_owner(path, folder, "folder")
    _check_owner(folder / MANIFEST, folder, "file")
    tag = manifest.pop("hmac", None) if isinstance(manifest, dict) else None
    if not isinstance(tag, str) or not signing.is_signed(_canonical(manifest), tag, _PURPOSE):
        raise IntegrityError(f"{folder / MANIFEST} lacks your signature: changed, or made elsewhere", _fix(folder))
    parts = manifest["parts"]
    if parts["format"] != FORMAT:
        raise IntegrityError(
            f"{folder} was built by another qdiff (format {parts['format']}, here {FORMAT})", _fix(folder)
        )
    if folder.name != folder_name(parts):
        raise IntegrityError(f"{folder} holds the engine {folder_name(parts)}", _fix(folder))
    _check_files(folder, manifest)
    if engine is not None and parts["engine"] != engine.name:
        raise IntegrityError(f"{folder} was built by engine {parts['engine']!r}, not {engine.name!r}", _fix(folder))
    if engine is not None and parts["version"] != engine.version():
        message = f"{folder} was built by {engine.name} {parts['version']}, installed is {engine.version()}"
        raise IntegrityError(message, _fix(folder))
    return manifest


def _check_files(folder: Path, manifest: EngineManifest) -> None:
    files = manifest["files"]
    for name in sorted({path.name for path in folder.iterdir()} - {*files, *manifest["changing"], MANIFEST}):
        raise IntegrityError(f"{folder / name} is no part of this engine", _fix(folder))
    for name, digest in files.items():
        if not (folder / name).exists():
            raise IntegrityError(f"{folder / name} is missing", _fix(folder))
        _check_owner(folder / name, folder, "file")
        if sha256_file(folder / name) != digest:
            raise IntegrityError(f"{folder / name} is not the file that was built (its sha256 differs)", _fix(folder))


def _canonical(manifest: EngineManifest) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def signed(manifest: EngineManifest) -> EngineManifest:
    """Return the manifest with the user's signature."""
    return {**manifest, "hmac": signing.sign(_canonical(manifest), _PURPOSE)}
