"""Every "how to add" of CONTRIBUTING.md is followed: its examples go into a copy of the code, in the files that it names, and the
contract tests run on them there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("qdiff", "calib", "export", "engines", "app")
FENCE = re.compile(
    r"^```(?:python|yaml|text)\n# (?P<path>[\w/.-]+)(?P<place>,[^\n]*)?\n(?P<body>.*?)^```$", re.S | re.M
)


@dataclass(frozen=True)
class Example:
    """An example of the page: the file that it belongs in, where in that file, and its text."""

    path: str
    place: str
    body: str

    @property
    def name(self) -> str:
        return f"{Path(self.path).stem}{self.place}"


def examples() -> list[Example]:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [Example(m["path"], m["place"] or "", m["body"]) for m in FENCE.finditer(page)]


def add(example: Example, tree: Path) -> None:
    """Do with an example what the page says."""
    path = tree / example.path
    if not example.place:
        assert not path.exists()
        path.write_text(example.body if path.suffix == ".yaml" else f"# {example.path}\n{example.body}")
        if path.suffix == ".py":
            name = ".".join(("" if example.path.startswith("qdiff/") else "qdiff.", *path.relative_to(tree).parts[:-1]))
            import_file(path, name.replace("..", ".").strip("."))
        return
    # What stands after the new lines, once in the file; an empty text: nothing.
    after = {
        ", in FORMATS": '        Format("float32"',
        ", in TABLES": '"rows_timestep")',
        ", at the end of the fields of InputStatistics": "\n    @property\n    def ",
        ", at the end": "",
    }[example.place]
    text = path.read_text()
    head, found, tail = text.partition(after) if after else (text + "\n\n", "", "")
    assert found == after, f"{example.path} has no {after!r}"
    path.write_text(head + (example.body.strip() + " " if after.startswith('"') else example.body) + found + tail)


def import_file(path: Path, package: str) -> None:
    """Import a new file in its package: of translations in ``table_for``, else at the end of ``__init__.py``."""
    init = path.with_name("__init__.py")
    line = f"from {package} import {path.stem} as {path.stem}\n"
    if package.endswith("translations"):
        text, indented = init.read_text(), "    custom_ops()  # importing registers them\n"
        assert text.count(indented) == 1
        init.write_text(text.replace(indented, f"    {line}{indented}"))
    else:
        init.write_text(init.read_text() + line)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's code with all examples in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in CODE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "bundled"))
        if name != "qdiff":  # as the installed package has them
            (tree / "qdiff" / name).symlink_to(tree / name)
    bundled = tree / "qdiff/models/bundled"
    bundled.mkdir()
    for folder in (ROOT / "qdiff/models/bundled").iterdir():
        (bundled / folder.name).symlink_to(folder)
    (bundled / "pixart-fast").symlink_to(bundled / "pixart")  # the example's small trained weights
    for name in ("tests", "pyproject.toml", "bench"):
        (tree / name).symlink_to(ROOT / name)
    for example in examples():
        add(example, tree)
    return tree


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy: the working directory stands first on its path."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)


# What the page promises for each kind: the tests that run on the example, and what their names are picked by.
CONTRACTS = {
    "number format": ("tests/formats", "int8_g64"),
    "quantization method": ("tests/methods", "unknown_option and halve or never_worse and halve and plain"),
    "learned rounding": ("tests/quantization/test_reconstruction.py", "straight_through"),
    "model family": ("tests/models/test_families.py", "pixart-fast and (captures or picture or settings)"),
    "engine": ("tests/engines/test_contract.py", "reference"),
    "recipe": ("tests/plan/test_recipe_plan.py", "fp8-weights"),
    "observer": ("tests/calib/test_calibration.py", "restart and mean"),
}
KINDS = [
    "number format", "quantization method", "learned rounding", "model family", "engine", "translation to ONNX", "recipe",
    "observer",
]  # fmt: skip


def test_the_page_has_an_example_of_each_kind():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-zA-Z ]+) \| .*`", page, re.M)
    assert rows == [*KINDS[:6], "export target", *KINDS[6:]]
    assert len(examples()) == len(KINDS) + 2, "an observer is added in three places"


CONTRACT_TESTS = """
import contextlib, io, json, sys
from pathlib import Path
import pytest

outcomes = {}
for kind, (path, picked) in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main([path, "-k", picked, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"])
    outcomes[kind] = int(code), said.getvalue()
Path(sys.argv[2]).write_text(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tree: Path) -> dict[str, tuple[int, str]]:
    """pytest's exit status and output for each kind; one process for all, because each imports torch and diffusers anew."""
    written = tree / "outcomes.json"
    done = run(tree, "-c", CONTRACT_TESTS, json.dumps(CONTRACTS), str(written))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, tuple[int, str]] = json.loads(written.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTRACTS)
def test_an_example_passes_the_contract_of_its_kind(outcomes, kind):
    code, said = outcomes[kind]
    assert code == 0, said[-5000:]
    assert re.search(r"^\d+ passed", said, re.M), said[-500:]


TRANSLATE = """
from pathlib import Path
import onnxruntime, qdiff, torch
from qdiff.export.translations import TARGETS, table_for

class Sinc(torch.nn.Module):
    def forward(self, x):
        return torch.sinc(x)

assert Path(qdiff.__file__).parents[1] == Path.cwd(), qdiff.__file__
tables = {name: table_for(TARGETS[name]) for name in TARGETS}
assert all(torch.ops.aten.sinc.default in table for table in tables.values())
x = torch.linspace(-2, 2, 9)
options = {"custom_translation_table": tables["onnxruntime"], "opset_version": TARGETS["onnxruntime"].opset}
program = torch.onnx.export(Sinc(), (x,), dynamo=True, verbose=False, **options)
program.save("sinc.onnx")
session = onnxruntime.InferenceSession("sinc.onnx")
(found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
torch.testing.assert_close(torch.from_numpy(found), torch.sinc(x), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_the_example_of_a_translation_computes_what_torch_computes(tree):
    done = run(tree, "-c", TRANSLATE)
    assert done.returncode == 0, done.stderr[-3000:]
