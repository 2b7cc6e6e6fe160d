"""MkDocs hook: writes lists of files in place of marks.

``<!-- decisions -->`` becomes the list of the decisions by their titles, ``<!-- recipes -->`` the built-in recipes as they are in
the source.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the lists in the places of their marks."""
    for mark, text in (("<!-- decisions -->", decisions), ("<!-- recipes -->", recipes)):
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown


def decisions() -> str:
    """Return a line for each decision, linked from a page in a folder beside theirs."""
    titles = {path: path.read_text(encoding="utf-8").split("\n")[0] for path in (ROOT / "docs/decisions").glob("*.md")}
    rows = [
        (int(path.name[:4]), re.sub(r"^# (?:\d+\. )?", "", title), path.name) for path, title in sorted(titles.items())
    ]
    return "\n".join(["| | decision |", "| --- | --- |", *(f"| {n} | [{t}](../decisions/{f}) |" for n, t, f in rows)])


def recipes() -> str:
    """Return every built-in recipe as a section with its YAML."""
    paths = sorted((ROOT / "qdiff" / "recipes").glob("*.yaml"))
    return "\n\n".join(f"## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```" for path in paths)
