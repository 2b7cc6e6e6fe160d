"""Signals at random moments: the same command, run again, has to end with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.faults.contents import contents, differing
from bench.faults.processes import Commands, Ended
from bench.faults.stages import STAGES, Stage
from qdiff.files import sha256_json

TWICE = 0.25  # share of trials whose second run is killed too
TIMED_RUNS = 3
ATTEMPTS = 4  # times the count: a command may end before its moment
CODES = {signal.SIGKILL: 137, signal.SIGINT: 130, signal.SIGTERM: 143}
BROKEN = ("Traceback", "this is a bug")


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of a stage gives.

    Args:
        seconds: usual duration.
        expected: :func:`bench.faults.contents.contents` of its folder.
        unsteady: files that differ between two undisturbed runs: they cannot be compared.
    """

    seconds: float
    expected: dict[str, str]
    unsteady: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """One trial: the signal and the moments (seconds) at which it was sent, how often it met the process at work, and what is
    wrong afterwards (nothing, where all is well).
    """

    number: int
    signal: int
    moments: list[float]
    hits: int
    faults: list[str]


class Laboratory:
    """Stages with their references, in one work folder."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed = work, seed
        self.commands = Commands(work)

    def folder(self, name: str) -> Path:
        """Return the folder that a stage left undisturbed; made when it is asked for."""
        stage, folder = STAGES[name], self.work / "references" / name
        if not (folder / "run.json").exists() or not self._done(name):
            self._begin(stage, folder)
            ended = self.commands.learn(stage.arguments(folder), stage.threads)
            if ended.code != 0:
                raise RuntimeError(f"{name} fails undisturbed:\n{ended.err}")
            (self.work / "references" / f"{name}.done").touch()
        return folder

    def _done(self, name: str) -> bool:
        return (self.work / "references" / f"{name}.done").exists()

    def _begin(self, stage: Stage, folder: Path) -> None:
        """Put what has to be there before a stage into ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if stage.after is not None:
            shutil.copytree(self.folder(stage.after), folder, symlinks=True)

    def reference(self, name: str) -> Reference:
        """Return the reference of a stage, measured once: later calls read it."""
        path, stage = self.work / "references" / f"{name}.json", STAGES[name]
        if path.exists():
            return Reference(**json.loads(path.read_text()))
        expected, seconds, unsteady = contents(self.folder(name)), [], set()
        for _ in range(TIMED_RUNS):
            trial = self.work / "trial"
            self._begin(stage, trial)
            ended = self.commands.run(stage.arguments(trial), threads=stage.threads)
            if ended.code != 0:
                raise RuntimeError(f"{name} fails undisturbed:\n{ended.err}")
            seconds.append(ended.seconds)
            unsteady |= {line.partition(": ")[2] for line in differing(expected, contents(trial))}
        made = Reference(statistics.median(seconds), expected, sorted(unsteady))
        path.write_text(json.dumps(asdict(made)))
        return made

    def trials(self, name: str, count: int, signals: Sequence[int] = (signal.SIGKILL,)) -> Iterator[Trial]:
        """Yield ``count`` trials in which the signal met the process at work; those of earlier calls are read."""
        kind = "-".join(signal.Signals(number).name for number in signals)
        log = self.work / f"{kind}-{name}-{self.seed}.jsonl"
        known = [Trial(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
        hits = 0
        for number in range(ATTEMPTS * count):
            if hits >= count:
                return
            trial = known[number] if number < len(known) else self.trial(name, number, signals[number % len(signals)])
            if number >= len(known):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(trial)) + "\n")
            hits += trial.hits > 0
            yield trial

    def trial(self, name: str, number: int, sent: int) -> Trial:
        """Kill a stage, run it again, and look at what is there."""
        stage, reference = STAGES[name], self.reference(name)
        chance = random.Random(f"{self.seed} {name} {number} {sent}")
        folder, faults, moments, hits = self.work / "trial", [], [], 0
        self._begin(stage, folder)
        shutil.rmtree(self.commands.temporary)
        self.commands.temporary.mkdir()
        for _ in range(1 + (chance.random() < TWICE)):
            moments.append(round(chance.uniform(0, reference.seconds), 4))
            ended = self.commands.interrupt(stage.arguments(folder), moments[-1], sent, threads=stage.threads)
            hits += ended.code == CODES[signal.Signals(sent)]
            faults += _faults_of_stop(ended, sent)
        ended = self.commands.run(stage.arguments(folder), threads=stage.threads)
        if ended.code != 0:
            faults.append(f"run again: exit {ended.code}: {last_line(ended.err)}")
        else:
            changed = differing(reference.expected, contents(folder))
            faults += [line for line in changed if line.partition(": ")[2] not in reference.unsteady]
        faults += [f"left in TMPDIR: {path.name}" for path in self.commands.temporary.iterdir()]
        return Trial(number, sent, moments, hits, faults)


def _faults_of_stop(ended: Ended, sent: int) -> list[str]:
    """Return what is wrong with how a process ended that was sent a signal."""
    faults = ["it did not end"] if ended.hung else []
    if ended.code not in (0, CODES[signal.Signals(sent)]):
        faults.append(f"stopped: exit {ended.code}: {last_line(ended.err)}")
    if any(word in ended.err for word in BROKEN):
        faults.append(f"stopped with a traceback: {last_line(ended.err)}")
    return faults


def last_line(text: str) -> str:
    """Return the error that a command wrote, else the last that it wrote."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was said"])[-1].strip()[:300]


def table(rows: dict[str, tuple[Reference, list[Trial]]]) -> str:
    """Return markdown: a line for each stage."""
    lines = [
        "| stage | seconds | trials | stopped at work | of these twice | byte-equal | differing or left over | not comparable |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (reference, trials) in rows.items():
        good = sum(not trial.faults for trial in trials)
        faults = sorted({line for trial in trials for line in trial.faults})
        lines.append(
            f"| {name} | {reference.seconds:.1f} | {len(trials)} | {sum(trial.hits > 0 for trial in trials)} | "
            f"{sum(trial.hits > 1 for trial in trials)} | {good} | {'; '.join(faults[:3]) or 'none'} | "
            f"{', '.join(reference.unsteady) or 'none'} |"
        )
    return "\n".join(lines)


def fingerprint(reference: Reference) -> str:
    """Return names the contents that a reference expects."""
    return sha256_json(reference.expected)[:12]
