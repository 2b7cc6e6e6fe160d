"""What a user installs: the package list, the wheel's content, and the pinned versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAPPED = ("calib", "export", "engines", "app")
BUNDLED = "qdiff/models/bundled/"
BUNDLED_LIMIT = 52_000_000  # bytes of all bundled models together: two of pictures, one of clips
NOT_PINNED = {"cuda", "tensorrt"}  # extras for machines that constraints.txt was not made on


@pytest.fixture(scope="module")
def project(root) -> dict:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def in_wheel(name: str) -> str | None:
    """Where a file of the tree goes in the wheel; ``None``: it stays out."""
    folder = name.split("/")[0]
    return f"qdiff/{name}" if folder in MAPPED else name if folder == "qdiff" else None


def test_the_package_list_is_the_tree(project, sources):
    listed = set(project["tool"]["setuptools"]["packages"])
    homes = {str(PurePosixPath(source.path).parent) for source in sources if source.shipped}
    packages = {str(PurePosixPath(in_wheel(f"{home}/x") or "").parent).replace("/", ".") for home in homes}
    inits = {source.module for source in sources if source.shipped and source.path.endswith("__init__.py")}
    assert packages - inits == set(), "folders with Python files but without __init__.py"
    assert listed == packages, "pyproject.toml, [tool.setuptools] packages"


def test_the_mapped_folders_are_the_mapped_folders(project):
    mapping = project["tool"]["setuptools"]["package-dir"]
    assert mapping == {"qdiff": "qdiff"} | {f"qdiff.{name}": name for name in MAPPED}


def test_tests_are_no_packages(files):
    """``tests/calib/__init__.py`` could claim the name ``calib``."""
    assert [name for name in files if name.startswith("tests/") and name.endswith("__init__.py")] == []


def test_bundled_models_stay_small(root, files):
    total = sum((root / name).stat().st_size for name in files if name.startswith(BUNDLED))
    assert total <= BUNDLED_LIMIT, f"{total / 1e6:.1f} MB in {BUNDLED}"


@pytest.fixture(scope="module")
def wheel(root, files, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the project's files as a clean clone has them."""
    source = tmp_path_factory.mktemp("source")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_is_one_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"qdiff", next(top for top in tops if re.fullmatch(r"qdiff_deploy-.*\.dist-info", top))}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel, files):
    expected = {target for name in files if (target := in_wheel(name))}
    found = {name for name in wheel.namelist() if name.startswith("qdiff/")}
    assert expected - found == set(), "not in the wheel: [tool.setuptools.package-data] does not name them"
    assert found - expected == set(), "in the wheel but not in the tree"


@pytest.mark.slow
def test_the_wheel_has_its_licence_and_its_command(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    assert any(name.startswith(f"{info}/licenses/LICENSE") for name in wheel.namelist())
    assert "qdiff = qdiff.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()


@pytest.mark.slow
def test_the_wheel_works_by_itself(wheel, tmp_path):
    """Outside the checkout and without the editable install, the sub-packages are real folders of the package."""
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import qdiff, qdiff.app, qdiff.calib, qdiff.engines.base, qdiff.export\n"
        "print(*{m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'qdiff'}, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.splitlines()), done.stdout


def pins(root: Path) -> dict[str, str]:
    """constraints.txt as name -> version."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in parts}


def test_constraints_are_exact_and_portable(root):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert not wrong, f"not `name==version` without a local label: {wrong}"
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_everything_asked_for_is_pinned(root, project):
    groups = [entry for group in project["dependency-groups"].values() for entry in group]
    asked = [*project["project"]["dependencies"], *(entry for entry in groups if isinstance(entry, str))]
    for extra, requirements in project["project"]["optional-dependencies"].items():
        asked += requirements if extra not in NOT_PINNED else []
    pinned = pins(root)
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == "qdiff-deploy":
            continue
        assert name in pinned, f"{requirement.name} is not in constraints.txt (make constraints)"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"
