"""The source tree as the tests of the house see it: the files that a commit would hold, parsed once."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("calib", "export", "engines", "app")  # folders that are sub-packages of qdiff (pyproject.toml, package-dir)
SKIPPED = {".git", ".venv", ".dev", "build", "dist", "runs", "__pycache__"}


@dataclass(frozen=True)
class Import:
    """One import: the full dotted name, the line, and whether it is only reached when a function runs or when types are
    checked."""

    name: str
    line: int
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class Source:
    """A Python file. ``path`` is relative to the root and has forward slashes: ``calib/collect.py``."""

    path: str

    @property
    def folder(self) -> str:
        """The first part of the path, which decides what the file may import."""
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        """The dotted name that Python knows the file by: ``qdiff.calib.collect``."""
        parts = list(Path(self.path).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join((["qdiff"] if parts[0] in MAPPED else []) + parts)

    @property
    def package(self) -> str:
        """What a relative import of this file starts from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    @property
    def shipped(self) -> bool:
        """Whether the file goes into the wheel."""
        return self.folder in ("qdiff", *MAPPED)

    @cached_property
    def text(self) -> str:
        """The file's text."""
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.text, self.path)

    def imports(self) -> Iterator[Import]:
        """Every import of the file; ``from a import b`` counts as ``a.b``, and a constant name given to import_module too."""
        yield from self._imports(self.tree, False, False)

    def _imports(self, node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            for name in self._names(child):
                yield Import(name, child.lineno, inside, types)  # type: ignore[attr-defined]
            yield from self._imports(child, inside, types)

    def _names(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            return [f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                return [node.args[0].value]
        return []


def _tree_files() -> list[str]:
    """Tracked files and new ones that git does not ignore; without git every file outside the usual leftovers."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not SKIPPED & set(path.parts)]
    return sorted({name for name in names if (ROOT / name).is_file()})


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def files() -> list[str]:
    """Paths of all files that belong to the project, relative to the root."""
    return _tree_files()


@pytest.fixture(scope="session")
def sources(files: list[str]) -> list[Source]:
    """All Python files of the project."""
    return [Source(name) for name in files if name.endswith(".py")]


@pytest.fixture(scope="session")
def shipped(sources: list[Source]) -> list[Source]:
    """The Python files that go into the wheel."""
    return [source for source in sources if source.shipped]
