"""Types are named: ``Any`` switches the type checker off for whatever it touches, so its lines are counted."""

from __future__ import annotations

import re

MOST = 187  # lines that say Any; lower it with them


def lines_with_any(text: str) -> int:
    """Return how many lines of a source say ``Any``, imports of it included."""
    return sum(bool(re.search(r"\bAny\b", line)) for line in text.splitlines())


def test_the_lines_are_counted():
    assert lines_with_any("from typing import Any\n\nx: dict[str, Any] = {}\nAnything = 1\n") == 2


def test_any_is_rare(shipped):
    counts = {source.path: lines_with_any(source.text) for source in shipped}
    worst = ", ".join(sorted(counts, key=lambda path: -counts[path])[:5])
    total = sum(counts.values())
    assert total <= MOST, f"{total} lines say Any, at most {MOST} may: name the type (most are in {worst})"
