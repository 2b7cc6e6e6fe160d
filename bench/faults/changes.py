"""What happens to one file of a run folder."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POSITIONS = 20  # bits that are flipped in a file, one a trial


@dataclass(frozen=True)
class Place:
    """A file, and what its change may take.

    Args:
        other: the file of another run that has the same part.
        outside: a path outside the run folder that is free.
    """

    path: Path
    other: Path | None
    outside: Path
    chance: random.Random


Change = Callable[[Place], None]


def _cut(path: Path, size: int) -> None:
    with open(path, "rb+") as file:
        file.truncate(size)


def _empty(place: Place) -> None:
    _cut(place.path, 0)


def _half(place: Place) -> None:
    _cut(place.path, place.path.stat().st_size // 2)


def _last_byte(place: Place) -> None:
    _cut(place.path, max(0, place.path.stat().st_size - 1))


def _longer(place: Place) -> None:
    with open(place.path, "ab") as file:
        file.write(b"\0")


def _bit(place: Place) -> None:
    data = bytearray(place.path.read_bytes())
    data[place.chance.randrange(len(data))] ^= 1 << place.chance.randrange(8)
    place.path.write_bytes(data)


def _swap(place: Place) -> None:
    assert place.other is not None
    shutil.copyfile(place.other, place.path)


def _delete(place: Place) -> None:
    place.path.unlink()


def _folder(place: Place) -> None:
    place.path.unlink()
    place.path.mkdir()


def _link(place: Place) -> None:
    shutil.move(place.path, place.outside)
    place.path.symlink_to(place.outside)


def _pipe(place: Place) -> None:
    place.path.unlink()
    os.mkfifo(place.path)


def _unreadable(place: Place) -> None:
    place.path.chmod(0)


CHANGES: dict[str, Change] = {
    "empty": _empty,
    "half": _half,
    "without its last byte": _last_byte,
    "one byte longer": _longer,
    "of another run": _swap,
    "deleted": _delete,
    "a folder": _folder,
    "a link outside": _link,
    "a pipe": _pipe,
    "unreadable": _unreadable,
    **{f"bit {number}": _bit for number in range(POSITIONS)},
}


def counterpart(run: Path, other: Path, name: str) -> Path | None:
    """Return the file of another run in the place of ``name`` in ``run``; ``None`` where there is none, or it has the
    same bytes.
    """
    path = other / name
    if name.startswith("engines/"):
        ours, theirs = _roles(run), _roles(other)
        folder, _, file = name.rpartition("/")
        path = other / theirs.get(ours.get(folder, ""), "none") / file
    return path if path.is_file() and path.read_bytes() != (run / name).read_bytes() else None


def _roles(run: Path) -> dict[str, str]:
    """Return the engine folders by what they compute, and the other way round."""
    roles: dict[str, str] = {}
    for stage, entry in json.loads((run / "run.json").read_bytes())["stages"].items():
        if stage.startswith("build:"):
            for part in [{"name": "step", "folder": entry["folder"]}, *entry["parts"]]:
                roles |= {f"{stage} {part['name']}": part["folder"], part["folder"]: f"{stage} {part['name']}"}
    return roles
