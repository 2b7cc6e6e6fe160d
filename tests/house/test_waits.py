"""No test waits without an end: a loop that only waits stands in :func:`tests.waiting.wait_until`, which gives up."""

from __future__ import annotations

import ast

import pytest


def only_waits(loop: ast.While) -> bool:
    """Return whether the body of a loop does nothing but pass or sleep."""
    return all(
        isinstance(statement, ast.Pass)
        or (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func).rpartition(".")[2] in ("sleep", "wait")
        )
        for statement in loop.body
    )


def endless(tree: ast.AST) -> list[int]:
    """Return the lines of loops that only wait and whose condition reads no clock."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.While) and only_waits(node) and "time." not in ast.unparse(node.test)
    ]


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("while not slot.busy:\n    pass", True),
        ("while not job.step:\n    time.sleep(0.1)", True),
        ("while time.monotonic() < end:\n    pass", False),
        ("while not ready():\n    assert time.monotonic() < end\n    time.sleep(1)", False),
        ("while True:\n    value = following(value)", False),
    ],
)
def test_the_guard_sees(code, seen):
    assert bool(endless(ast.parse(code))) == seen


def test_no_test_waits_without_an_end(sources):
    found = [
        f"{source.path}:{line}"
        for source in sources
        if source.folder in ("tests", "bench")
        for line in endless(source.tree)
    ]
    assert not found, f"use wait_until: {found}"
