"""MkDocs hook: writes out the names with a star in the navigation of mkdocs.yml.

A folder in which pages are added often (log, decisions) is named once, as ``log/*.md``. Its pages then stand in the order of
their file names, and a new page needs no entry. A page that is named elsewhere in the navigation is left out.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any


def named(entries: list[Any]) -> set[str]:
    """Return the pages that a navigation names without a star."""
    pages: set[str] = set()
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages |= named(value) if isinstance(value, list) else {value}
    return {page for page in pages if "*" not in page}


def matching(pattern: str, pages: list[str], besides: set[str], newest_first: bool) -> list[str]:
    """Return the pages of one folder that match a pattern, in the order of their names."""
    folder = PurePosixPath(pattern).parent
    return sorted(
        (
            page
            for page in pages
            if fnmatch(page, pattern) and PurePosixPath(page).parent == folder and page not in besides
        ),
        reverse=newest_first,
    )


def written_out(entries: list[Any], pages: list[str], besides: set[str]) -> list[Any]:
    """Return a navigation in which every entry with a star is the list of its pages."""
    result: list[Any] = []
    for entry in entries:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            result.append({title: written_out(value, pages, besides)})
        elif "*" not in value:
            result.append(entry)
        else:
            found = matching(value, pages, besides, newest_first=value.startswith("log/"))
            result += [{title: found}] if title else found
    return result


def on_files(files: Any, config: Any) -> Any:
    """Write out the navigation when all pages are known, those of other hooks as well."""
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = written_out(config.nav, pages, named(config.nav))
    return files


on_files.mkdocs_priority = -100  # type: ignore[attr-defined]  # after the hooks that add pages
