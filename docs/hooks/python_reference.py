"""MkDocs hook: writes the reference of the Python code from its docstrings, without importing it.

The folders calib, export, engines and app are sub-packages of qdiff (docs/decisions/0001-mapped-folders.md), which a reader of
source files does not see. So the sources are copied into one tree, ``.dev/reference/qdiff``, in which every module lies where
Python has it, and mkdocstrings reads that. Roles in docstrings (``:func:`` and the like) become plain code in the copies.

- A page with the line ``<!-- public names -->`` gets what ``import qdiff`` offers: the names of ``qdiff.__all__``.
- ``reference/modules/`` gets a page for each folder; a page with the line ``<!-- modules -->`` gets the list of them.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / ".dev" / "reference"
MAPPED = ("calib", "export", "engines", "app")
NAMES, MODULES = "<!-- public names -->", "<!-- modules -->"
ROLE = re.compile(r":(?:mod|class|func|meth|data|attr|exc|ref):`[~!]?\.?([^`<]+?)(?:\s*<[^`>]*>)?`")
PAGES = "reference/modules"


def on_startup(**_: Any) -> None:
    """Make the folder of the tree: mkdocstrings leaves out a path that is not there when it reads its settings."""
    TREE.mkdir(parents=True, exist_ok=True)


def on_config(config: Any) -> Any:
    """Copy the sources into one tree before the pages are read."""
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("qdiff", *MAPPED):
        place = TREE / "qdiff" if folder == "qdiff" else TREE / "qdiff" / folder
        for path in sorted((ROOT / folder).rglob("*.py")):
            copy = place / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(ROLE.sub(r"``\1``", path.read_text(encoding="utf-8")), encoding="utf-8")
    return config


def packages() -> list[str]:
    """Return the dotted names of the packages that get a page, those of the top folders last."""
    inside = [path for path in sorted((TREE / "qdiff").iterdir()) if (path / "__init__.py").is_file()]
    names = [path.name for path in inside if path.name not in MAPPED]
    return ["qdiff", *(f"qdiff.{name}" for name in [*names, *MAPPED])]


def modules(package: str) -> list[str]:
    """Return the modules of a package and of the packages inside it; of ``qdiff`` itself those at its top alone."""
    folder = TREE.joinpath(*package.split("."))
    paths = folder.glob("*.py") if package == "qdiff" else folder.rglob("*.py")
    names = [".".join(path.relative_to(TREE).with_suffix("").parts) for path in sorted(paths)]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def summary(package: str) -> str:
    """Return the first sentence of a package's docstring."""
    text = (TREE.joinpath(*package.split(".")) / "__init__.py").read_text(encoding="utf-8")
    first = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) ", first)[0].rstrip(":")


def public_names() -> list[str]:
    """Return the names in ``qdiff.__all__``, read without importing; none where there is no such list."""
    tree = ast.parse((TREE / "qdiff" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return [item.value for item in node.value.elts]  # type: ignore[attr-defined,union-attr]
    return []


def origin(name: str) -> str | None:
    """Return the full name of what ``qdiff.NAME`` is, from the imports in ``qdiff/__init__.py``, also those for type checkers."""
    tree = ast.parse((TREE / "qdiff" / "__init__.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return None


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each package."""
    for package in packages():
        files.append(File.generated(config, f"{PAGES}/{package}.md", content=module_page(package)))
    return files


def module_page(package: str) -> str:
    """Return the page of a package: what lives there, then each of its modules."""
    own, *others = modules(package)
    parts = [f"# {package}", block(own, 2)]
    parts += [f"## {name.removeprefix(package + '.')}\n\n{block(name, 3)}" for name in others]
    return "\n\n".join(parts) + "\n"


def block(name: str, level: int) -> str:
    """Return the directive by which mkdocstrings writes a module, a class or a function."""
    return f"::: {name}\n    options:\n      heading_level: {level}\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put lists in the place of their marks."""
    if MODULES in markdown:
        rows = [f"| [`{package}`](modules/{package}.md) | {summary(package)} |" for package in packages()]
        markdown = markdown.replace(MODULES, "\n".join(["| package | |", "| --- | --- |", *rows]))
    if NAMES in markdown:
        functions_first = sorted(public_names(), key=lambda name: (name[0].isupper(), name))
        known = [(name, origin(name)) for name in functions_first]
        parts = [f"## qdiff.{name}\n\n{block(full, 3)}" for name, full in known if full]
        markdown = markdown.replace(NAMES, "\n\n".join(parts))
    return markdown
