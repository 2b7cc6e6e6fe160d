"""Calibrating and building from the page: one at a time, in a process of its own, known to the service and not to a page.

The state lives here, so a reload, a second window or another visitor sees the same build. It also lives in the run folder:
after a restart of the service the same choices go on from the stages that are done.

How long it takes is told from the seconds that each stage took in other runs of the same model, else in the bundled one,
corrected by how fast this machine was in the stages that this build has finished.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from qdiff.app.build_worker import BuildWork
from qdiff.app.jobs import BusyError
from qdiff.app.sources import BUDGETS, Sources, Weights
from qdiff.errors import InputError, QdiffError, unknown_name
from qdiff.files import Json
from qdiff.runs.run import Run

log = logging.getLogger("qdiff.app")
T = TypeVar("T")

# Seconds on the bundled model with 32 prompts, 2 cores: only their proportions matter.
_USUAL = {
    "start": 8.0,
    "calibrate": 26.0,
    "quantize": 18.0,
    "export": 34.0,
    "build": 3.0,
    "compare": 14.0,
    "report": 1.5,
}


@dataclass(frozen=True)
class BuildState:
    """A build as it is now. ``share`` of the whole in [0, 1]; ``seconds_left`` an estimate."""

    model: str
    recipe: str
    budget: str
    run: str
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    stage: str = "start"
    share: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None
    stages: tuple[tuple[str, str], ...] = ()  # name, and "done", "running" or "waiting"
    log: tuple[str, ...] = ()
    error: str = ""
    fix: str = ""


@dataclass
class _Build:
    first: BuildState
    folder: Path
    process: subprocess.Popen[bytes]
    expected: dict[str, float]  # what this build has still to do when it begins, in order
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    error: str = ""
    fix: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    task: str = ""
    begun: dict[str, float] = field(default_factory=dict)  # stage -> when it was first seen at work


class Builds:
    """Starts, watches and stops the one build that may run."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._build: _Build | None = None

    def start(self, model: str, recipe: str, budget: str, engines: list[str]) -> BuildState:
        """Begin a build, or go on with one that was cut off.

        Raises:
            InputError: a choice that is not on the list.
            BusyError: another build runs.
        """
        from qdiff.recipes import built_in

        weights = _choice("model", model, self._sources.buildable())
        _choice("recipe", recipe, {name: name for name in built_in()})
        samples = _choice("budget", budget, BUDGETS)
        known = {name: name for name in buildable_engines()}
        for engine in engines:
            _choice("engine", engine, known)
        if not engines:
            raise InputError("No engine is chosen.", "Choose at least one, for example the first.")
        name = re.sub(r"[^a-z0-9]+", "-", f"{weights.name} {recipe} {budget}".lower()).strip("-")
        with self._lock:
            if self._build is not None and self._build.state == "running":
                raise BusyError("A build is running already.", "One at a time: wait for it, or stop it.")
            folder = (self._sources.workspace / name).absolute()
            first = BuildState(model, recipe, budget, name)
            expected = _expected(folder, weights, samples, engines, self._sources)
            process = subprocess.Popen(
                [sys.executable, "-m", "qdiff.app.build_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            options: BuildWork = {
                "family": weights.family, "weights": weights.weights, "recipe": recipe, "samples": samples,
                "engines": engines, "folder": str(folder),
            }  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(json.dumps(options).encode() + b"\n")
            process.stdin.flush()
            self._build = build = _Build(first, folder, process, expected)
        threading.Thread(target=self._watch, args=(build,), name="qdiff-build", daemon=True).start()
        log.info("build of %s begun in %s", model, folder)
        return self._state(build)

    def state(self) -> BuildState | None:
        """Return the build that runs or ran last, ``None`` before the first."""
        build = self._build
        return None if build is None else self._state(build)

    @property
    def running(self) -> bool:
        """Return whether one is at work."""
        return self._build is not None and self._build.state == "running"

    def cancel(self) -> None:
        """Stop the build that runs; what it has finished is kept."""
        build = self._build
        if build is not None and build.state == "running":
            build.state = "cancelled"
            build.process.terminate()

    def close(self, grace: float = 5.0) -> None:
        """Stop the build and wait until its process is gone."""
        self.cancel()
        if self._build is not None:
            try:
                self._build.process.wait(grace)
            except subprocess.TimeoutExpired:
                self._build.process.kill()
                self._build.process.wait()

    def _watch(self, build: _Build) -> None:
        assert build.process.stdout is not None and build.process.stdin is not None
        for line in build.process.stdout:
            try:
                said: dict[str, Json] = json.loads(line)
            except ValueError:
                continue  # a library printed something
            if "log" in said:
                build.lines.append(str(said["log"]).replace(str(build.folder), build.folder.name))
                log.info("build: %s", said["log"])
            elif "task" in said:
                build.task = f"{said['task']} {said['done']}/{said['total']}"
            elif build.state == "running":
                build.error, build.fix = str(said.get("error", "")), str(said.get("fix") or "")
                build.error = build.error.replace(str(build.folder), build.folder.name)
                build.fix = build.fix.replace(str(build.folder), build.folder.name)
                self._end(build, "done" if said["ended"] == "done" else "failed")
        code = build.process.wait()
        build.process.stdin.close()
        if build.state == "running":
            log.error("the build's process ended with %s", code)
            build.error, build.fix = "The build ended without a word.", "Its log is on the terminal of qdiff demo."
            self._end(build, "failed")
        build.ended = build.ended or time.monotonic()

    def _end(self, build: _Build, state: Literal["done", "failed"]) -> None:
        build.ended = time.monotonic()
        self._sources.refresh()
        build.state = state

    def _state(self, build: _Build) -> BuildState:
        now = build.ended or time.monotonic()
        done, current = self._progress(build)
        stages = tuple(
            (name, "done" if name in done else "running" if name == current else "waiting") for name in build.expected
        )
        share, left = self._estimate(build, done, current, now)
        if build.state != "running":
            share, left = (1.0 if build.state == "done" else share), None
        lines = (*build.lines, build.task) if build.task and build.state == "running" else tuple(build.lines)
        return replace(
            build.first, state=build.state, stage=current or "", share=share, seconds=now - build.started,
            seconds_left=left, stages=stages, log=lines, error=build.error, fix=build.fix,
        )  # fmt: skip

    def _progress(self, build: _Build) -> tuple[set[str], str | None]:
        """Return the finished stages and the one at work, as the manifest says."""
        try:
            stages = Run(build.folder).manifest["stages"]
        except QdiffError:
            stages = {}
        done = {name for name in build.expected if stages.get(name, {}).get("status") == "done"}
        if done or stages:
            done.add("start")
        if build.state == "done":
            return set(build.expected), None
        current = next((name for name in build.expected if stages.get(name, {}).get("status") == "begun"), None)
        current = current or next((name for name in build.expected if name not in done), None)
        if current is not None and build.state == "running":
            build.begun.setdefault(current, time.monotonic())
        return done, current

    @staticmethod
    def _estimate(build: _Build, done: set[str], current: str | None, now: float) -> tuple[float, float | None]:
        total = sum(build.expected.values())
        if current is None:
            return 0.99, 1.0
        begun = build.begun.get(current, now)
        behind = sum(build.expected[name] for name in done)
        pace = (begun - build.started) / behind if behind > 10 else 1.0
        pace = min(max(pace, 0.25), 20.0)
        inside = min(0.95 * build.expected[current], (now - begun) / pace)
        return (behind + inside) / total, pace * (total - behind - inside)


def buildable_engines() -> dict[str, bool]:
    """Return engines that can be built here, best first, and whether they run here too."""
    from qdiff.engines import ranked

    return {
        engine.name: engine.missing() is None
        for engine in ranked()
        if not engine.runs_module and engine.missing_for_build() is None
    }


def _choice(kind: str, name: object, known: dict[str, T]) -> T:
    if not isinstance(name, str) or name not in known:  # the API gives whatever JSON holds
        raise unknown_name(kind, str(name)[:60], known, InputError)
    return known[name]


def _expected(folder: Path, weights: Weights, samples: int, engines: list[str], sources: Sources) -> dict[str, float]:
    """Return seconds of each stage that is still to be done, in order."""
    from qdiff.engines import ENGINES

    targets = dict.fromkeys(str(ENGINES[name]().target) for name in engines)
    names = ["start", "calibrate", "quantize", *(f"export:{target}" for target in targets)]
    names += [*(f"build:{name}" for name in engines), "compare", "report"]
    known: dict[str, float] = {}
    for source in sources.all():
        if source.run is not None and source.weights == weights:
            known |= {
                name: float(entry["seconds"])
                for name, entry in source.run.manifest["stages"].items()
                if entry.get("status") == "done" and name != "calibrate"
            }
    seconds = {name: max(0.5, known.get(name, _USUAL[name.partition(":")[0]])) for name in names}
    seconds["calibrate"] *= samples / 32
    try:
        before = Run(folder)
    except QdiffError:
        return seconds
    return {name: value for name, value in seconds.items() if not before.done(name)}
