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

LIST_TABLES = """
import importlib, json, sys
from qdiff.registry import Registry
for name in {modules!r}:
    importlib.import_module(name)
tables = {{}}
for module in list(sys.modules.values()):
    if (getattr(module, "__name__", None) or "").split(".")[0] == "qdiff":
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Registry):
                own = {{name: getattr(value[name], "name", name) for name in value}}
                tables[attribute] = {{name: given if isinstance(given, str) else name for name, given in own.items()}}
print(json.dumps({{"tables": tables, "loaded": sorted(name for name in sys.modules if name.startswith("qdiff"))}}))
"""


def registrations(source) -> list[tuple[str, str]]:
    """``(table, name)`` of every ``@TABLE.register("name")`` in a file."""
    return [
        (ast.unparse(decorator.func.value).split(".")[-1], decorator.args[0].value)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr == "register"
        and decorator.args
        and isinstance(decorator.args[0], ast.Constant)
    ]


def defined_names(source) -> set[str]:
    """Names that the file itself assigns at module level."""
    names: set[str] = set()
    for node in source.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.fixture(scope="module")
def registered(shipped) -> dict[str, list[tuple[str, str]]]:
    """Module -> what it registers in a table that another module defined."""
    found = {}
    for source in shipped:
        foreign = [(table, name) for table, name in registrations(source) if table not in defined_names(source)]
        if foreign:
            found[source.module] = foreign
    return found


@pytest.fixture(scope="module")
def after_packages(registered) -> dict:
    """All tables and loaded modules after importing the packages (not the modules) that hold entries."""
    packages = sorted({module.rpartition(".")[0] for module in registered})
    code = LIST_TABLES.format(modules=packages)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
            assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"{table}: {name!r} is not lower_snake_case"
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
