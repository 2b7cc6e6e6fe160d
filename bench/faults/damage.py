"""One file of a finished run is changed, then a command is run: it refuses, makes the file anew, or gives what it gives on the
whole folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.changes import CHANGES, Place, counterpart
from bench.faults.contents import LOCK, contents, differing
from bench.faults.kills import BROKEN, Laboratory, last_line
from bench.faults.processes import Ended
from bench.faults.stages import RUN, STAGES
from qdiff.files import sha256_file

PICTURE = "picture.png"  # where generate writes, beside the run folder
REFUSED = (2, 3, 5)
LIMIT = 300.0  # seconds until a command counts as hung, also on a busy machine
# Changes after which a thorough trial runs every command that reads the file; else it is one of them, in turn.
ON_ALL = ("half", "of another run", "deleted", "a folder", "a link outside", "a pipe", "bit 0")
WHOLE = "report"  # the stage whose folder is damaged

_GENERATE = ("generate", RUN, "--prompt", "a red apple", "--seed", "7", "-o", PICTURE, "--engine")
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", RUN, "--json"),
    "generate float": (*_GENERATE, "float"),
    "generate eager": (*_GENERATE, "eager"),
    "generate openvino": (*_GENERATE, "openvino"),
    "generate onnxruntime": (*_GENERATE, "onnxruntime"),
    "calibrate": tuple(STAGES["calibrate"].words),
    "quantize": ("quantize", RUN),
    "export": ("export", RUN),
    "build openvino": ("build", RUN, "--engine", "openvino"),
    "build onnxruntime": ("build", RUN, "--engine", "onnxruntime"),
    "build tensorrt_rtx": tuple(STAGES["build-tensorrt_rtx"].words),
    "compare": tuple(STAGES["compare"].words),
    "correct": tuple(STAGES["correct"].words),
    "report": ("report", RUN),
    "quantize --force": ("quantize", RUN, "--force"),
    "build openvino --force": ("build", RUN, "--engine", "openvino", "--force"),
    "build onnxruntime --force": ("build", RUN, "--engine", "onnxruntime", "--force"),
    "compare --force": (*STAGES["compare"].words, "--force"),
    "export --force": ("export", RUN, "--target", "onnxruntime", "--force"),
}
SLOW = ("export --force",)  # on the changes of SLOW_CHANGES alone
SLOW_CHANGES = ("half", "of another run", "deleted", "bit 0")


@dataclass(frozen=True)
class Outcome:
    """What a command did on a damaged folder: ``refused``, ``made anew``, ``harmless``, or what is wrong."""

    file: str
    change: str
    command: str
    code: int
    outcome: str
    said: str

    @property
    def good(self) -> bool:
        """Return whether nothing is wrong."""
        return self.outcome in ("refused", "made anew", "harmless")


@dataclass(frozen=True)
class Undamaged:
    """What a command does on the whole folder: its exit code, the folder afterwards, the hash of its picture, and the files that
    it reads.
    """

    code: int
    after: dict[str, str]
    picture: str | None
    reads: list[str]


class Damage:
    """A finished run, another one, and every command's result on the first."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.commands = laboratory, laboratory.commands
        self.work = laboratory.work / "damage"
        self.work.mkdir(exist_ok=True)
        self.run = self._finished("run", laboratory.folder(WHOLE))
        self.other = self._finished("other", laboratory.folder("other-run"))
        self.whole = contents(self.run)
        self.files = sorted([*self.whole, LOCK])
        self._record = self.work / "undamaged.json"
        known = json.loads(self._record.read_text()) if self._record.exists() else {}
        self._undamaged = {command: Undamaged(**value) for command, value in known.items()}

    def _finished(self, name: str, folder: Path) -> Path:
        """Return a copy of a finished run with its correction done too, and compared with it."""
        run = self.work / name
        if not (self.work / f"{name}.done").exists():
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(folder, run, symlinks=True)
            for stage in ("correct", "compare", "report"):
                ended = self.commands.learn(STAGES[stage].arguments(run))
                if ended.code != 0:
                    raise RuntimeError(f"{stage} fails undamaged:\n{ended.err}")
            (self.work / f"{name}.done").touch()
        return run

    def undamaged(self, command: str) -> Undamaged:
        """Return what a command does on the whole folder. Files that it reads are told by their access times, where the
        file system keeps them; else it reads all.
        """
        if command not in self._undamaged:
            trial = self._trial()
            files = [trial / name for name in self.files]
            for path in files:
                os.utime(path, ns=(0, path.stat().st_mtime_ns))
            before = {name: (trial / name).stat().st_atime_ns for name in self.files}
            ended = self._execute(command)
            there = {name: trial / name for name in self.files if (trial / name).exists()}
            reads = [name for name in self.files if name not in there or there[name].stat().st_atime_ns != before[name]]
            self._undamaged[command] = Undamaged(ended.code, contents(trial), self._picture(), reads or self.files)
            self._record.write_text(json.dumps({name: asdict(value) for name, value in self._undamaged.items()}))
        return self._undamaged[command]

    def _picture(self) -> str | None:
        """Return the hash of the picture that a command made."""
        path = self.work / PICTURE
        return sha256_file(path) if path.exists() else None

    def _trial(self) -> Path:
        trial = self.work / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(self.run, trial, symlinks=True)
        return trial

    def _execute(self, command: str, may_read_all: bool = True) -> Ended:
        words = {RUN: str(self.work / "trial"), PICTURE: str(self.work / PICTURE)}
        (self.work / PICTURE).unlink(missing_ok=True)
        return self.commands.run(
            [words.get(word, word) for word in COMMANDS[command]], LIMIT, may_read_all=may_read_all
        )

    def outcomes(
        self, only: Sequence[str] = (), changes: Sequence[str] = (), thorough: bool = False
    ) -> Iterator[Outcome]:
        """Yield every file, change and command; those of earlier calls are read.

        Args:
            only: parts of the names of files; empty: all.
            changes: names of changes; empty: all.
            thorough: also with ``--force``, and after those of :data:`ON_ALL` every command that reads the file, not one in turn.
        """
        log = self.work / f"outcomes-{self.laboratory.seed}.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        known = {
            (each.file, each.change, each.command): each for each in (Outcome(**json.loads(line)) for line in lines)
        }
        for change in changes or CHANGES:
            for file in self.files:
                if only and not any(part in file for part in only):
                    continue
                for command in self._commands(file, change, thorough):
                    outcome = known.get((file, change, command))
                    if outcome is None:
                        outcome = self.outcome(file, change, command)
                        if outcome is None:
                            break
                        with open(log, "a", encoding="utf-8") as out:
                            out.write(json.dumps(asdict(outcome)) + "\n")
                    yield outcome

    def _commands(self, file: str, change: str, thorough: bool) -> list[str]:
        possible = [name for name in COMMANDS if thorough or "--force" not in name]
        reading = [name for name in possible if file in self.undamaged(name).reads]
        reading = [name for name in reading if name not in SLOW or change in SLOW_CHANGES]
        if (thorough and change in ON_ALL) or not reading:
            return reading
        turn = list(CHANGES).index(change) + self.files.index(file)
        return [reading[turn % len(reading)]]

    def outcome(self, file: str, change: str, command: str) -> Outcome | None:
        """Return one command on a folder with one damaged file; ``None`` where the change cannot be made."""
        trial, path = self._trial(), self.work / "trial" / file
        other = counterpart(self.run, self.other, file)
        if (change == "of another run" and other is None) or (path.stat().st_size == 0 and change.startswith("bit")):
            return None
        outside = self.work / "outside"
        outside.unlink(missing_ok=True)
        CHANGES[change](Place(path, other, outside, random.Random(f"{self.laboratory.seed} {file} {change}")))
        unreadable = change == "unreadable"
        before = {} if unreadable else contents(trial)
        ended = self._execute(command, may_read_all=not unreadable)
        if unreadable and path.exists():
            path.chmod(0o644)
        word = self._judge(file, command, ended, before)
        return Outcome(file, change, command, ended.code, word, last_line(ended.err) if ended.code else "")

    def _judge(self, file: str, command: str, ended: Ended, before: dict[str, str]) -> str:
        expected, after = self.undamaged(command), contents(self.work / "trial")
        if ended.hung:
            return "does not end"
        if ended.signal or ended.code == 1 or any(word in ended.err for word in BROKEN):
            return f"breaks: {last_line(ended.err)}"
        if ended.code in REFUSED:
            if "error: " not in ended.err:
                return "refuses without a word"
            changed = differing(before, after) if before and "--force" not in command else []
            return f"refused, but {'; '.join(changed[:3])}" if changed else "refused"
        if ended.code != expected.code:
            return f"exit {ended.code}"
        if command == "inspect" and not self._told(file, ended):
            return "harmless" if self._same_value(file) else "not told"
        if self._picture() != expected.picture:
            return "another picture"
        changed = [
            line
            for line in differing(expected.after, after)
            if line.partition(": ")[2].rstrip("/") not in (file, f"{file}/")
            and not line.startswith(f"left over: {file}/")
        ]
        if changed:
            return f"another result: {'; '.join(changed[:3])}"
        return "made anew" if expected.after.get(file) == after.get(file) else "harmless"

    def _told(self, file: str, ended: Ended) -> bool:
        """Return whether ``inspect --json`` says that something is wrong with a file, or a warning beside it does."""
        shown, (folder, _, name) = json.loads(ended.out), file.rpartition("/")
        stages = [str(row.get("files", "")) for row in shown["stages"].values()]
        engine = any(row["problem"] and folder == f"engines/{row['folder']}" for row in shown.get("engines", []))
        return engine or any(name in text for text in [*stages, ended.err])

    def _same_value(self, file: str) -> bool:
        """Return whether a damaged JSON file still says what it said: a newline at its end is missing."""
        try:
            return file.endswith(".json") and bool(
                json.loads((self.run / file).read_bytes()) == json.loads((self.work / "trial" / file).read_bytes())
            )
        except (OSError, ValueError):
            return False


def table(outcomes: Sequence[Outcome]) -> str:
    """Return markdown: a line for each kind of file."""
    kinds: dict[str, list[Outcome]] = {}
    for each in outcomes:
        kinds.setdefault(kind_of(each.file), []).append(each)
    lines = [
        "| file | files | changes | commands | refused | made anew | harmless | wrong |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in kinds.items():
        wrong = sorted({f"{each.command} on {each.change}: {each.outcome}" for each in found if not each.good})
        count = {word: sum(each.outcome == word for each in found) for word in ("refused", "made anew", "harmless")}
        lines.append(
            f"| {kind} | {len({each.file for each in found})} | {len({(each.file, each.change) for each in found})} | "
            f"{len(found)} | {count['refused']} | {count['made anew']} | {count['harmless']} | "
            f"{len(wrong) or 'none'}{': ' if wrong else ''}{'; '.join(wrong[:3])} |"
        )
    return "\n".join(lines)


def kind_of(file: str) -> str:
    """Return the name under which a file stands in the table: engines without their keys, pictures and shards without
    numbers.
    """
    parts = file.split("/")
    if parts[0] == "engines":
        parts[1] = parts[1].rpartition("-")[0]
    if parts[0] == "images":
        parts[2] = "*.png"
    if parts[-1].startswith("trajectory-"):
        parts[-1] = "trajectory-*.safetensors"
    return "/".join(parts)
