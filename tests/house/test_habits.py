"""Files around the code agree with it: hosted CI, pre-commit, the citation."""

from __future__ import annotations

import re

import pytest
import yaml

import qdiff


@pytest.fixture(scope="module")
def workflow(root) -> dict:
    return yaml.safe_load((root / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def constraint(root, package: str) -> str:
    """Return the version of a package in constraints.txt."""
    return re.search(rf"^{package}==(\S+)$", (root / "constraints.txt").read_text(), re.M)[1]


def test_the_workflow_calls_targets_that_exist(root, workflow):
    makefile = (root / "Makefile").read_text()
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = {target for run in steps for target in re.findall(r"\bmake (\w+)", run)}
    assert {"types", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    assert (root / ".ci/run").is_file() and ".ci/run" in steps


def test_the_workflow_tests_every_python_that_is_named(root, workflow):
    classifiers = re.findall(r"Python :: (3\.\d+)", (root / "pyproject.toml").read_text())
    assert set(classifiers) <= set(workflow["jobs"]["tests"]["strategy"]["matrix"]["python"])


def test_pre_commit_runs_the_ruff_of_make_check(root):
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"][0]
    assert hooks["rev"] == f"v{constraint(root, 'ruff')}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_citation_is_of_this_version(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == qdiff.__version__ and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The qdiff authors"}]
