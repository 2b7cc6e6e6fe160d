"""MkDocs hook: writes the list of the log's entries, newest first, from the entries themselves.

The page with the line ``<!-- entries -->`` gets a table: date, title and answer. An entry has its title, its date in italics and
the paragraphs **Question.**, **Answer.** and **Decision.** before anything else; one that lacks any of them ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

FOLDER = Path(__file__).resolve().parents[1] / "log"
MARK = "<!-- entries -->"
HEAD = re.compile(
    r"# (?P<title>[^\n]+)\n\n\*(?P<date>\d{4}-\d\d-\d\d)\*\n\n\*\*Question\.\*\* (?P<question>[^\n]+)\n\n"
    r"\*\*Answer\.\*\* (?P<answer>[^\n]+)\n\n\*\*Decision\.\*\* (?P<decision>[^\n]+)\n"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table in the place of the mark."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


def table() -> str:
    """Return a row for each entry, newest first."""
    rows = ["| date | entry | answer |", "| --- | --- | --- |"]
    for path in sorted(FOLDER.glob("[0-9]*.md"), reverse=True):
        head = HEAD.match(path.read_text(encoding="utf-8"))
        if head is None:
            raise PluginError(f"{path.name} does not begin with title, date, question, answer and decision")
        rows.append(f"| {head['date']} | [{head['title']}]({path.name}) | {head['answer']} |")
    return "\n".join(rows)
