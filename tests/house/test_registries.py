"""Every entry of a table is there because a file registered it, once, and is found without anybody importing that file."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from qdiff.errors import QdiffError
from qdiff.registry import Registry

# Imports the packages alone first: whether they load every entry must not depend on the modules that define the tables.
LIST_TABLES = """
import importlib, json, sys
from qdiff.registry import Registry
for name in {packages!r}:
    importlib.import_module(name)
loaded = sorted(name for name in sys.modules if name.startswith("qdiff"))
tables = {{}}
for module, attribute in {tables!r}:
    table = getattr(importlib.import_module(module), attribute)
    assert isinstance(table, Registry), attribute
    own = {{name: getattr(table[name], "name", name) for name in table}}
    tables[attribute] = {{name: value if isinstance(value, str) else name for name, value in own.items()}}
print(json.dumps({{"tables": tables, "loaded": loaded}}))
"""
# A model family has the name that its publishers write, as in a Hub id.
NAMES = {"FAMILIES": r"[a-z][a-z0-9-]*"}
SNAKE_CASE = r"[a-z][a-z0-9_]*"


def registrations(source) -> list[tuple[str, str]]:
    """Return ``(table, name)`` of every ``TABLE.register("name")`` in a file, as a decorator or as a call."""
    return [
        (ast.unparse(node.func.value).split(".")[-1], node.args[0].value)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "register"
        and ast.unparse(node.func.value).split(".")[-1].isupper()
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]


def defined_tables(source) -> set[str]:
    """Return the names of the registries that a file defines at module level."""
    return {
        ast.unparse(target)
        for node in source.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).split("[")[0] == "Registry"
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


@pytest.fixture(scope="module")
def tables(shipped) -> list[tuple[str, str]]:
    """Module and name of every registry."""
    return [(source.module, name) for source in shipped for name in sorted(defined_tables(source))]


@pytest.fixture(scope="module")
def registered(shipped) -> dict[str, list[tuple[str, str]]]:
    """Module -> what it registers in a table that another module defined."""
    found = {}
    for source in shipped:
        foreign = [(table, name) for table, name in registrations(source) if table not in defined_tables(source)]
        if foreign:
            found[source.module] = foreign
    return found


@pytest.fixture(scope="module")
def after_packages(registered, tables) -> dict:
    """All tables, and the modules that are loaded after importing the packages (not the modules) that hold entries."""
    packages = sorted({module.rpartition(".")[0] for module in registered})
    code = LIST_TABLES.format(packages=packages, tables=tables)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_table_is_loaded_with_every_entry(shipped, after_packages):
    written: dict[str, list[str]] = {}
    for source in shipped:
        for table, name in registrations(source):
            written.setdefault(table, []).append(name)
    assert {"ENGINES", "FAMILIES", "METHODS", "OBSERVERS", "STRATEGIES", "TARGETS"} <= written.keys()
    assert {table: sorted(names) for table, names in written.items()} == {
        table: sorted(entries) for table, entries in after_packages["tables"].items()
    }


def test_no_name_is_registered_twice(shipped):
    counts = Counter(
        (table, name.replace("-", "_").lower()) for source in shipped for table, name in registrations(source)
    )
    twice = [f"{table}: {name}" for (table, name), count in counts.items() if count > 1]
    assert not twice, twice


def test_importing_the_package_finds_every_entry(registered, after_packages):
    lost = [module for module in registered if module not in after_packages["loaded"]]
    assert not lost, f"their package's __init__.py does not import {', '.join(lost)}"


def test_names_are_plain_and_the_entry_says_the_same(after_packages):
    for table, entries in after_packages["tables"].items():
        for name, own in entries.items():
            rule = NAMES.get(table, SNAKE_CASE)
            assert re.fullmatch(rule, name), f"{table}: {name!r} does not match {rule}"
            assert own == name, f"{table}: {name!r} calls itself {own!r}"


def test_a_second_registration_is_an_error():
    table: Registry[object] = Registry("thing")
    table.register("one")(object())
    with pytest.raises(RuntimeError, match="registered twice"):
        table.register("one")(object())


def test_an_unknown_name_gets_the_nearest_ones():
    table: Registry[object] = Registry("engine")
    table.register("openvino")(object())
    with pytest.raises(QdiffError, match="did you mean openvino"):
        table["openvno"]
