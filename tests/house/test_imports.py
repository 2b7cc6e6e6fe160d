"""Imports point one way, stay lean, and know one name for every module (docs/decisions/0001, 0004)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CORE = "qdiff"
# Folder -> the folders whose code it may import. Siblings meet through files and value types of the core.
ALLOWED = {
    "qdiff": {"qdiff"},
    "calib": {"qdiff", "calib"},
    "export": {"qdiff", "export"},
    "engines": {"qdiff", "engines"},
    "app": {"qdiff", "engines", "app"},
}
# The composition root joins the folders, inside functions only: stages holds the stages, api their functions, cli prints.
ROOTS = {
    "qdiff.stages": {"calib", "export", "engines"},
    "qdiff.api": {"calib", "export", "engines"},
    "qdiff.cli": {"app"},
}
# Who may import the composition root, apart from itself; anything else would be a circle.
ROOT_USERS = {
    "qdiff.stages": ("qdiff.api", "qdiff.cli", "qdiff.app"),
    "qdiff.cli": ("qdiff.__main__", "qdiff.app.__main__"),
}
NOT_SHIPPED = {"zoo", "bench", "tests"}
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx", "gradio", "diffusers")
BACKENDS = {"onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx", "gradio"}
# Kernels are decorated by their compiler when the module is imported; nothing imports them where it is missing.
OPTIONAL_AT_IMPORT = {"triton"}


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of ``packages`` or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def folder_of(name: str) -> str | None:
    """The folder that holds a dotted name of ours, or ``None`` for other packages."""
    first, *rest = name.split(".")
    if first != CORE:
        return None
    return rest[0] if rest and rest[0] in ALLOWED else CORE


def python(code: str) -> dict:
    """Runs ``code`` in a fresh interpreter and returns the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_folders_import_one_way(shipped):
    wrong = []
    for source in shipped:
        for found in source.imports():
            target = folder_of(found.name)
            if target is None or target in ALLOWED[source.folder]:
                continue
            may_join = any(within(source.module, root) and target in siblings for root, siblings in ROOTS.items())
            if may_join and (found.in_function or found.for_types):
                continue
            where = "at module level" if may_join else ""
            wrong.append(f"{source.path}:{found.line} imports {found.name} {where}".rstrip())
    assert not wrong, (
        "imports against the direction app → engines → qdiff, export → qdiff, calib → qdiff:\n" + "\n".join(wrong)
    )


def test_only_entry_points_import_the_composition_root(shipped):
    wrong = [
        f"{source.path}:{found.line} imports {found.name}"
        for source in shipped
        for found in source.imports()
        for name, users in ROOT_USERS.items()
        if within(found.name, name) and not within(source.module, name, *users)
    ]
    assert not wrong, "\n".join(wrong)


def test_what_ships_does_not_import_what_does_not(shipped):
    wrong = [
        f"{source.path}:{found.line} imports {found.name}"
        for source in shipped
        for found in source.imports()
        if found.name.split(".")[0] in NOT_SHIPPED
    ]
    assert not wrong, "\n".join(wrong)


def test_no_bare_folder_names(sources):
    """``import calib`` works in the root of a checkout and loads a second copy of the package: every decorator runs twice."""
    wrong = [
        f"{source.path}:{found.line} imports {found.name}: it is qdiff.{found.name}"
        for source in sources
        for found in source.imports()
        if found.name.split(".")[0] in ALLOWED and found.name.split(".")[0] != CORE
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_has_no_backend_at_module_level(shipped):
    wrong = [
        f"{source.path}:{found.line} imports {found.name}"
        for source in shipped
        if source.folder == CORE
        for found in source.imports()
        if found.name.split(".")[0] in BACKENDS and not found.in_function and not found.for_types
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module", ["qdiff", "qdiff.registry", "qdiff.runs.run", "qdiff.cli.commands", "qdiff.cli.main"]
)
def test_import_is_lean(module, shipped):
    assert module in {source.module for source in shipped}
    loaded = python(f"import json, sys, {module}\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))")
    assert loaded == [], f"import {module} loads {', '.join(loaded)}"


def test_every_module_imports_and_has_one_name(shipped):
    modules = sorted({source.module for source in shipped if not source.path.endswith("__main__.py")})
    result = python(
        "import importlib, json, sys\n"
        "failed = {}\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        f"        if (error.name or '').split('.')[0] not in {OPTIONAL_AT_IMPORT!r}:\n"
        "            failed[name] = repr(error)\n"
        "    except Exception as error:\n"
        "        failed[name] = repr(error)\n"
        f"twice = [name for name in {sorted(set(ALLOWED) - {CORE})!r} if name in sys.modules]\n"
        "print(json.dumps({'failed': failed, 'twice': twice}))"
    )
    assert result["failed"] == {}
    assert result["twice"] == [], "loaded under a bare name"
