"""What a run folder holds, as it can be compared: every file by its hash, JSON that holds measurements without them.

Left out are seconds, memory, the command's words (they hold the folder's path) and what follows from those: the speedups in
``compare.json`` and a report, the signature of an engine's manifest, hashes of files that hold measurements.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from qdiff.files import sha256_file, sha256_json

# Fields that hold what was measured, or what is made of it.
MEASURED = frozenset(
    {
        "added_bytes",
        "cached",
        "command",
        "commands",
        "estimate",
        "hmac",
        "load_seconds",
        "peak_memory_bytes",
        "seconds",
        "seconds_per_call",
        "seconds_per_step",
        "sha256",
        "before",
        "speed_pairs",
        "speed_reason",
        "speed_reliable",
        "speedup",
        "speedup_high",
        "speedup_low",
        "speedup_range",
        "warnings",
    }
)
# Files that hold measurements beside results: their recorded hashes differ from run to run.
WITH_MEASUREMENTS = re.compile(r"(run|run\.copy|compare|report|layer_times)\.json(\.\w+)?|manifest\.json|report\.html")
LOCK = ".lock"


def contents(run: Path) -> dict[str, str]:
    """Return the name of every file under ``run``, also of hidden ones, with a hash of what is to be equal. Links,
    folders without files and what is no plain file have a word in the hash's place.
    """
    result: dict[str, str] = {}
    for folder, folders, files in os.walk(run):
        for name in [*files, *(each for each in folders if Path(folder, each).is_symlink())]:
            path = Path(folder, name)
            if path != run / LOCK:
                result[path.relative_to(run).as_posix()] = content(path)
        if not files and not folders and Path(folder) != run:
            result[Path(folder).relative_to(run).as_posix() + "/"] = "empty folder"
    return result


def content(path: Path) -> str:
    """Return a hash of what is to be equal in one file."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        return "link" if stat.S_ISLNK(mode) else "not a file"
    if path.name == "report.html":
        return "a page"  # what it shows is in report.json
    if WITH_MEASUREMENTS.fullmatch(path.name):
        try:
            return sha256_json(_without_measurements(json.loads(path.read_bytes())))
        except ValueError:
            return sha256_file(path)
    return sha256_file(path)


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "measured" if WITH_MEASUREMENTS.fullmatch(name.rpartition("/")[2]) else _without_measurements(entry)
            for name, entry in value.items()
            if name not in MEASURED
        }
    if isinstance(value, list):
        return [_without_measurements(entry) for entry in value]
    return value


def differing(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """Return what is missing, too much or another content, one line each."""
    lines = [f"missing: {name}" for name in sorted(expected.keys() - got.keys())]
    lines += [f"left over: {name}" for name in sorted(got.keys() - expected.keys())]
    return lines + [f"differs: {name}" for name in sorted(expected.keys() & got.keys()) if expected[name] != got[name]]
