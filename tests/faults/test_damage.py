"""A seeded sample of :mod:`bench.faults.damage` in this process: one file of a finished run is changed, then a command is run. It
refuses, makes the file anew, or gives what it gives on the whole folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults.changes import CHANGES, Place
from bench.faults.contents import contents, differing

COMMANDS = {
    "inspect": ["inspect"],
    "quantize": ["quantize"],
    "export": ["export"],
    "build openvino": ["build", "--engine", "openvino"],
    "build onnxruntime": ["build", "--engine", "onnxruntime"],
    "compare": ["compare", "--engine", "openvino", "--engine", "onnxruntime", "--pictures", "2"],
    "report": ["report"],
    "generate eager": ["generate", "--prompt", "x", "--engine", "eager"],
    "generate openvino": ["generate", "--prompt", "x", "--engine", "openvino"],
    "generate onnxruntime": ["generate", "--prompt", "x", "--engine", "onnxruntime"],
}
pytestmark = pytest.mark.timeout(120, func_only=True)  # ends a command that waits for somebody to write into a pipe
LEFT_OUT = ("of another run", "unreadable")  # one needs another run, the other a user who is not root


def pick(files: list[str], seed: int) -> tuple[str, str, str]:
    """A file, a change and a command."""
    chance = random.Random(seed)
    changes = [change for change in CHANGES if change not in LEFT_OUT and not change.startswith("bit ")] + ["bit 0"]
    return chance.choice(files), chance.choice(changes), chance.choice(list(COMMANDS))


@pytest.fixture(scope="module")
def pictures(cli: Callable, finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What generate makes of the whole folder, by command."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    for name, words in COMMANDS.items():
        if name.startswith("generate"):
            result = cli(words[0], finished.path, *words[1:], "-o", folder / "x.png")
            assert result.code == 0, result.err
            made[name] = (folder / "x.png").read_bytes()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_refused_made_anew_or_harmless(cli, finished, pictures, tmp_path, seed):
    run = finished.copy(tmp_path / "run")
    file, change, command = pick(sorted(contents(run)), seed)
    CHANGES[change](Place(run / file, None, tmp_path / "outside", random.Random(seed)))
    before = contents(run)
    verb, *rest = COMMANDS[command]
    output = ["-o", tmp_path / "x.png"] if verb == "generate" else []
    result = cli(verb, run, *rest, *output)
    case = f"{command} on {file}, {change}: exit {result.code}: {result.err}"
    assert result.code in (0, 2, 3, 5) and "Traceback" not in result.err, case
    if result.code:
        assert "error: " in result.err and "fix: " in result.err, case
        assert differing(before, contents(run)) == [], case
    elif verb == "generate":
        assert (tmp_path / "x.png").read_bytes() == pictures[command], case


@pytest.mark.parametrize("path", ["calibration/trajectory-00000.safetensors", "calibration/statistics.safetensors"])
def test_a_correction_is_not_fitted_to_a_damaged_calibration(fails, cli, spoilt: Path, path):
    """A flipped bit in a tensor is no error of safetensors: it would be fitted to without a word."""
    data = (spoilt / path).read_bytes()
    (spoilt / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails(5, ["is not the file", path], "correct", spoilt, "--engine", "eager", "--method", "q_drift", "--pictures", 1)
    assert not (spoilt / "correction.json").exists()
