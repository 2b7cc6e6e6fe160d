"""The core is divided into rooms, and they import one way (docs/decisions/0022-rooms.md)."""

from __future__ import annotations

import re

# A room imports rooms before it, and what is at the top of qdiff/.
ORDER = (
    "runs",
    "graphs",
    "evaluation",
    "correction",
    "recording",
    "formats",
    "plan",
    "nn",
    "routing",
    "models",
    "methods",
    "recipes",
    "attention",
    "quantization",
    "allocation",
    "report",
    "stages",
    "api",
    "cli",
)
MOST_AT_THE_TOP = 10


def room_of(name: str) -> str | None:
    """The room that holds a dotted name, or ``None``: the top of the core, or another folder."""
    first, *rest = name.split(".")
    return rest[0] if first == "qdiff" and rest and rest[0] in ORDER else None


def against(shipped) -> dict[tuple[str, str], str]:
    """(importing module, imported module) -> where, of every import against the order."""
    modules, found = {source.module for source in shipped}, {}
    for source in shipped:
        if source.folder != "qdiff" or source.module in ("qdiff", "qdiff.__main__"):  # what hands names on
            continue
        own = room_of(source.module)
        for each in source.imports():
            target = room_of(each.name)
            if target is None or target == own or (own and ORDER.index(target) < ORDER.index(own)):
                continue
            name = each.name if each.name in modules else each.name.rpartition(".")[0]
            found[source.module, name] = f"{source.path}:{each.line}"
    return found


def test_rooms_import_one_way(shipped):
    wrong = [f"{where} imports {name}" for (_, name), where in against(shipped).items()]
    assert not wrong, f"against the order {' ← '.join(ORDER)}:\n" + "\n".join(wrong)


def test_every_folder_is_a_room(files):
    rooms = {match[1] for name in files if (match := re.fullmatch(r"qdiff/(\w+)/(?:.+/)?\w+\.py", name))}
    assert rooms == set(ORDER)


def test_few_modules_are_at_the_top(files):
    top = [name for name in files if re.fullmatch(r"qdiff/\w+\.py", name)]
    assert len(top) <= MOST_AT_THE_TOP, f"{len(top)} modules: a new one goes into a room"
