"""Built engines, kept and trusted: ``RUN/engines/<engine>-<16 hex of the key>/`` with the engine's files and ``manifest.json``.

Everything that decides the file is in the key: the graph's bytes with its weights, profiles, engine, backend version, device,
flags. So a cache hit is never a guess, and a change of any part is another folder, not an overwritten one.

What may be loaded is decided in :mod:`.trust`: a folder that fails there is refused and not silently built anew, because a
changed engine is news.

``threads`` are no part of the key (they change nothing in the files).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qdiff.engines.base import ENGINES, BuildFacts, BuildOptions, Engine, Runner
from qdiff.engines.graph import graph_digest
from qdiff.engines.trust import FORMAT, MANIFEST, EngineManifest, KeyParts, folder_name, signed, trusted
from qdiff.errors import QdiffError
from qdiff.files import disk_errors, sha256_file, write_json


class Built(NamedTuple):
    """What :func:`build_cached` gives: the engine's folder, the facts of its build, whether it was there already."""

    folder: Path
    facts: BuildFacts
    was_cached: bool


@dataclass(frozen=True)
class Entry:
    """One folder of :func:`list_engines`. ``problem`` says why it would not be loaded, ``None`` that it would."""

    folder: Path
    engine: str
    device: str
    version: str
    bytes: int
    problem: str | None


def key_parts(engine: Engine, onnx: Path, options: BuildOptions) -> KeyParts:
    """Return everything that decides an engine's files, as JSON."""
    return {
        "format": FORMAT,
        "onnx": graph_digest(onnx),
        "engine": engine.name,
        "version": engine.version(),
        "device": engine.device(options),
        "options": options.to_json(),
    }


def build_cached(engine: Engine, onnx: Path, root: Path, options: BuildOptions, force: bool = False) -> Built:
    """Build an engine unless the same one is there.

    Args:
        engine: who builds.
        onnx: the exported graph.
        root: ``RUN/engines``; made private to the user.
        options: how; see :class:`BuildOptions`.
        force: build even when it is there (also the way out of an :class:`IntegrityError`).

    Raises:
        IntegrityError: it is there but not trusted.
    """
    parts = key_parts(engine, onnx, options)
    root.mkdir(parents=True, exist_ok=True)
    os.chmod(root, 0o700)
    folder = root / folder_name(parts)
    if folder.exists() and not force:
        return Built(folder, trusted(folder, engine)["facts"], True)
    with disk_errors(str(folder)):
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))  # mode 0700
    try:
        start = time.perf_counter()
        with disk_errors(str(folder)):
            facts = engine.build(onnx, work, options)
            facts["seconds"] = round(time.perf_counter() - start, 3)
            facts = json.loads(json.dumps(facts))
            changing = [name for name in [getattr(engine, "kernel_cache", None)] if name]
            manifest: EngineManifest = {"parts": parts, "facts": facts, "changing": changing, "files": _settle(work)}
            write_json(work / MANIFEST, signed(manifest))
        old = work.with_name(work.name + ".old")
        if folder.is_symlink() or folder.exists():
            os.rename(folder, old)
        os.rename(work, folder)
        _remove(old)
    finally:
        _remove(work)
    return Built(folder, facts, False)


def _settle(folder: Path) -> dict[str, str]:
    """Take group's and others' rights from the files, flush them to disk, and return their hashes."""
    files = {}
    for path in sorted(folder.iterdir()):
        os.chmod(path, 0o600)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = sha256_file(path)
    return files


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def load_trusted(engine: Engine, folder: Path, threads: int | None = None) -> Runner:
    """Verify and load an engine with the options that it was built with.

    Raises:
        IntegrityError: it is not trusted.
        MissingDependencyError: the package or the hardware that running it needs is not here.
    """
    manifest = trusted(folder, engine)
    return engine.load(folder, BuildOptions.from_json(manifest["parts"]["options"], threads))


def list_engines(root: Path) -> list[Entry]:
    """Return all engines under ``root`` by folder name, each with the reason if it would be refused."""
    entries = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        size = sum(path.lstat().st_size for path in folder.iterdir())
        try:
            parts = trusted(folder)["parts"]
            size += sum(path.stat().st_size for path in ENGINES[parts["engine"]]().reads(folder))
            entries.append(Entry(folder, parts["engine"], parts["device"], parts["version"], size, None))
        except QdiffError as error:  # a listing shows what is broken, whatever it is
            entries.append(Entry(folder, folder.name.rpartition("-")[0], "?", "?", size, error.message))
    return entries
