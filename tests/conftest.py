"""What all tests share: no test may reach for the network, and none may write into the user's own qdiff folder; one finished
run of the smallest model; and the command line without a new process."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
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
# Files that take more than a minute, the longest first. Those in front need no finished run, for which a worker would wait.
LONGEST = (
    "api/test_examples.py",
    "emulation/test_processors.py",
    "export/test_unet.py",
    "cli/test_sparse.py",
    "cli/test_routed.py",
    "cli/test_batch_mates.py",
)
HERE = "<folder>"  # stands in what a command printed for the folder, of which each worker has a copy
ENGINES = ("--engine", "openvino", "--engine", "onnxruntime", "--engine", "tensorrt_rtx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hand the longest files to the workers first, so that all of them end at about the same time."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        ranks = {name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get("/".join(item.path.parts[-2:]), len(LONGEST)))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Take what a module leaves behind (imported libraries, their caches) out of the garbage collector's sight.

    A stage collects garbage a few times. With torch, diffusers, transformers, onnxscript and gradio loaded, most of a
    collection's time goes to a million objects that live as long as the process.
    """
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the workers of the session share."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the folders of all workers
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def qdiff_home(shared_folder: Path) -> Iterator[Path]:
    """The folder that stands for the user's (engine key, caches) during the tests; child processes inherit it.

    All workers are one user: an engine that one of them has signed is loaded by the others.
    """
    home = shared_folder / "qdiff-home"
    home.mkdir(exist_ok=True)
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
def made_once(
    shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a folder that one worker makes for all: ``made_once("finished", make)``.

    The worker that asks first makes it, with ``make(folder)``; the others wait for it. Each gets a copy: commands take a run
    folder's lock and write its report anew, so two workers cannot use one folder at a time.
    """

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, whole = shared_folder / name, shared_folder / f"{name}.whole"
        with open(shared_folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it where the worker dies
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                whole.touch()
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp(name) / name, symlinks=True))

    return once


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
def finished(made_once: Callable[..., Path]) -> Finished:
    """``qdiff run`` on random weights: five prompts in two shards, four steps, both targets, three engines, two pictures.

    Read it, do not write it: ``finished.copy(tmp_path / "run")`` is for that.
    """

    def make(folder: Path) -> None:
        prompts = folder / "prompts.txt"
        prompts.write_text("# five\n\n" + "\n".join(PROMPTS) + "\n")
        settings = ("--compute-capability", "8.9", "--pictures", 2, "-o", folder / "run", "--json")
        result = run_cli("run", *TINY, "--prompts", prompts, *ENGINES, *settings)
        assert result.code == 0, result.err
        shown = {name: value.replace(str(folder), HERE) for name, value in asdict(result).items() if name != "code"}
        (folder / "result.json").write_text(json.dumps(shown))

    folder = made_once("finished", make)
    shown = json.loads((folder / "result.json").read_text())
    result = Result(0, **{name: value.replace(HERE, str(folder)) for name, value in shown.items()})
    return Finished(folder / "run", result, folder / "prompts.txt")


@pytest.fixture(scope="session")
def filmed(made_once: Callable[..., Path]) -> Path:
    """A run of the smallest video model, quantized and compared in torch. Read it, do not write it."""
    settings = ("--model", "wan", "--weights", "random:wan-tiny", "--samples", 2, "--steps", 2, "--batch", 1)

    def make(folder: Path) -> None:
        path = folder / "run"
        for command in (
            ("calibrate", *settings, "-o", path),
            ("quantize", path, "--recipe", "nvfp4", "--set", "sequential.tokens=64"),
            ("compare", path, "--engine", "eager", "--pictures", 2),
            ("report", path),
        ):
            result = run_cli(*command)
            assert result.code == 0, result.err

    return made_once("filmed", make) / "run"


@pytest.fixture(scope="session")
def grown(made_once: Callable[..., Path]) -> Path:
    """A quantized run of a small U-Net whose residual stream grows to 10^9. Read it, do not write it."""
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    from qdiff.models import FAMILIES

    def make(folder: Path) -> None:
        model = FAMILIES["stable-diffusion"].load("random:sd-tiny")
        resnets = [module for module in model.backbone.modules() if isinstance(module, ResnetBlock2D)]
        with torch.no_grad():
            for number, resnet in enumerate(resnets, 1):
                for parameter in resnet.conv2.parameters():
                    parameter *= 1e9 ** (number / len(resnets))
        model.pipeline.save_pretrained(folder / "model")
        settings = ("--weights", folder / "model", "--samples", 2, "--steps", 2, "--batch", 2)
        calibrate = ("calibrate", "--model", "stable-diffusion", *settings, "-o", folder / "run")
        for command in (calibrate, ("quantize", folder / "run")):
            result = run_cli(*command)
            assert result.code == 0, result.err

    return made_once("grown", make) / "run"


@pytest.fixture(scope="session")
def published(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """A folder of the shape that somebody publishes: ``published("pndm")`` (tests/published_folders.py). Read it, do not
    write it."""
    from tests.published_folders import CASES

    def make(name: str, folder: Path) -> None:
        CASES[name](folder / name)

    return cache(lambda name: made_once(f"published-{name}", partial(make, name)) / name)


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
def recorded(made_once: Callable[..., Path]) -> tuple[Any, Any]:
    """A recorded trajectory and its statistics: five prompts in two shards, four steps."""
    from qdiff.recording.activation_statistics import Statistics
    from qdiff.recording.trajectory import Trajectory

    def make(folder: Path) -> None:
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        settings = ("--model", "pixart", *TINY, "--prompts", folder / "prompts.txt", "-o", folder / "run")
        result = run_cli("calibrate", *settings, "--json")
        assert result.code == 0, result.err

    folder = made_once("recorded", make) / "run" / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without its sandbox: it has to start as root in CI, and opens no page but ours. One for all tests of
    a process: Playwright refuses a second one beside it.
    """
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()
