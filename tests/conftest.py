"""What all tests share: no test may reach for the network, and none may write into the user's own qdiff folder; one finished
run of the smallest model; and the command line without a new process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before any test imports transformers or diffusers: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The models here are so small that threads only wait for each other; child processes inherit it, so bytes can be compared.
os.environ["OMP_NUM_THREADS"] = "1"

PROMPTS = ["a red apple", "a rocket on a blue background", "cheese", "two cats, asleep", "a green tree"]
TINY = ("--weights", "random:pixart-tiny", "--steps", "4", "--batch", "3")
ENGINES = ("--engine", "openvino", "--engine", "onnxruntime", "--engine", "tensorrt_rtx")


@pytest.fixture(scope="session", autouse=True)
def qdiff_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that stands for the user's (engine key, caches) during the tests; child processes inherit it."""
    home = tmp_path_factory.mktemp("qdiff-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDIFF_HOME", str(home))
        yield home


@pytest.fixture(scope="session", autouse=True)
def on_the_host() -> Iterator[None]:
    """Tests are of the host's numbers, also where there is a GPU; those of a GPU say so themselves."""
    from qdiff import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "found", lambda: device.HOST)
        yield


@pytest.fixture(params=["products as they are here", "products that overflow"])
def integer_arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: as this processor's libraries multiply INT8, and as if their products overflowed, which changes how
    engines load graphs and which of them is the default. The second way has to be exact on every processor."""
    from qdiff.engines import integer_products

    if request.param != "products as they are here":
        monkeypatch.setattr(integer_products, "exact", lambda library: False)
    return str(request.param)


@dataclass(frozen=True)
class Result:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def run_cli(*arguments: object) -> Result:
    """Runs the command line in this process. What it raises is raised here: the command line lets nothing through."""
    from qdiff.cli import commands as cli
    from qdiff.cli import main

    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("qdiff").level
    root.handlers[:] = []  # else the log would go to the stderr of an earlier call
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run(cli.app, [str(argument) for argument in arguments])
    finally:
        root.handlers[:] = handlers
        logging.getLogger("qdiff").setLevel(level)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """The command line: ``cli("models", "--json")``."""
    return run_cli


@pytest.fixture(scope="session")
def fails() -> Callable[..., str]:
    """Runs a command that has to fail: ``fails(code, parts of the message, *arguments)``; returns stderr.

    Every failure of a user's making is one error, without a traceback, and prints no result.
    """

    def check(code: int, parts: str | list[str], *arguments: object) -> str:
        result = run_cli(*arguments)
        assert result.code == code, f"{result.code}: {result.err}"
        assert "Traceback" not in result.err and not result.out.strip(), result.out
        errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.err
        for part in [parts] if isinstance(parts, str) else parts:
            assert part in result.err, result.err
        return result.err

    return check


@dataclass(frozen=True)
class Finished:
    """A run folder with every stage done, and what the command that made it printed."""

    path: Path
    result: Result
    prompts: Path

    def copy(self, to: Path) -> Path:
        """A copy that a test may spoil."""
        shutil.copytree(self.path, to, symlinks=True)
        return to


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """``qdiff run`` on random weights: five prompts in two shards, four steps, both targets, three engines, two pictures.

    Read it, do not write it: ``finished.copy(tmp_path / "run")`` is for that.
    """
    folder = tmp_path_factory.mktemp("finished")
    prompts = folder / "prompts.txt"
    prompts.write_text("# five\n\n" + "\n".join(PROMPTS) + "\n")
    path = folder / "run"
    result = run_cli(
        "run",
        *TINY,
        "--prompts",
        prompts,
        *ENGINES,
        "--compute-capability",
        "8.9",
        "--pictures",
        2,
        "-o",
        path,
        "--json",
    )
    assert result.code == 0, result.err
    return Finished(path, result, prompts)


@pytest.fixture(scope="session")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest video model, quantized and compared in torch. Read it, do not write it."""
    path = tmp_path_factory.mktemp("filmed") / "run"
    settings = ("--model", "wan", "--weights", "random:wan-tiny", "--samples", 2, "--steps", 2, "--batch", 1)
    for command in (
        ("calibrate", *settings, "-o", path),
        ("quantize", path, "--recipe", "nvfp4", "--set", "sequential.tokens=64"),
        ("compare", path, "--engine", "eager", "--pictures", 2),
        ("report", path),
    ):
        result = run_cli(*command)
        assert result.code == 0, result.err
    return path


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized run of a small U-Net whose residual stream grows to 10^9. Read it, do not write it."""
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    from qdiff.models import FAMILIES

    folder = tmp_path_factory.mktemp("grown")
    model = FAMILIES["stable-diffusion"].load("random:sd-tiny")
    resnets = [module for module in model.backbone.modules() if isinstance(module, ResnetBlock2D)]
    with torch.no_grad():
        for number, resnet in enumerate(resnets, 1):
            for parameter in resnet.conv2.parameters():
                parameter *= 1e9 ** (number / len(resnets))
    model.pipeline.save_pretrained(folder / "model")
    settings = (
        "--model",
        "stable-diffusion",
        "--weights",
        folder / "model",
        "--samples",
        2,
        "--steps",
        2,
        "--batch",
        2,
    )
    for command in (("calibrate", *settings, "-o", folder / "run"), ("quantize", folder / "run")):
        result = run_cli(*command)
        assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of the shape that somebody publishes: ``published("pndm")`` (tests/published_folders.py). Read it, do not
    write it."""
    from tests.published_folders import CASES

    home = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        path = home / name
        if not path.exists():
            CASES[name](path)
        return path

    return folder


@pytest.fixture
def spoilt(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run that the test may spoil."""
    return finished.copy(tmp_path / "run")


@pytest.fixture(scope="session")
def tiny() -> Callable[[], Any]:
    """Loads the smallest model, anew at each call: ``tiny()``."""
    from qdiff.models import FAMILIES

    return lambda: FAMILIES["pixart"].load("random:pixart-tiny")


@pytest.fixture(scope="session")
def recorded(cli: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A recorded trajectory and its statistics: five prompts in two shards, four steps."""
    from qdiff.recording.activation_statistics import Statistics
    from qdiff.recording.trajectory import Trajectory

    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = ("--model", "pixart", *TINY, "--prompts", folder / "prompts.txt", "-o", folder / "run")
    result = cli("calibrate", *settings, "--json")
    assert result.code == 0, result.err
    folder = folder / "run" / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")
