"""The run folder: every stage reads and writes one folder, and its manifest says what is finished.

    run.json         manifest: per stage its inputs, the sha256 of its outputs, seconds, peak memory, versions; and its copy
    calibration/     trajectory shards and statistics
    plan.json  model.safetensors  correction.json  onnx/<target>/  engines/<key>/  images/  report.html  report.json

Rules that every stage gets from here, not from its own code:

- a file appears whole or not at all (:mod:`qdiff.files`: temporary name, fsync, rename);
- a finished stage with the same inputs is skipped, after its outputs' hashes were compared;
- a stage that was cut off may go on from what it left (its inputs were recorded before it began);
- other inputs than the recorded ones are refused, never mixed; ``force`` starts the stage anew;
- finishing a stage forgets the stages that were made from its former outputs, and removes their summaries.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qdiff.errors import (
    InputError,
    IntegrityError,
    MemoryExhaustedError,
    QdiffError,
    UsageError,
    command,
    option,
    out_of_memory,
)
from qdiff.events import log
from qdiff.files import break_links, require_writable, safe_child, sha256_file, sha256_json
from qdiff.resources import measure_usage, release_memory
from qdiff.runs import leftovers as leftovers_of
from qdiff.runs import manifest
from qdiff.runs.json_diff import differences
from qdiff.runs.lock import RunLock, RunLockedError
from qdiff.runs.stage_run import StageRun
from qdiff.runs.stages import EDITABLE, UPSTREAM, command_anew, command_line, command_of, command_to_go_on


class Run:
    """A run folder and its manifest.

    Args:
        path: the folder; made when the first stage begins.

    ``results`` are the facts that the stages of :mod:`qdiff.api` found in this process, by stage, as JSON values.

    Raises:
        IntegrityError: when ``run.json`` is there but is not one of ours.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.manifest: manifest.Manifest = {"version": manifest.VERSION, "stages": {}}
        self.results: dict[str, Any] = {}
        self._lock = RunLock(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a run folder", "name a folder")
        if manifest.is_there(self.path):
            self._read()

    def __repr__(self) -> str:
        model = self.manifest["stages"].get("calibrate", {}).get("inputs", {}).get("model")
        done = ", ".join(stage for stage in self.manifest["stages"] if self.done(stage)) or "nothing"
        return f"Run({str(self.path)!r}{f', model {model}' if model else ''}, done: {done})"

    def _read(self) -> None:
        self.manifest = manifest.read(self.path, UPSTREAM)

    @classmethod
    def existing(cls, path: Path | str) -> Run:
        """Open a run folder that has to be there.

        Raises:
            InputError: when the folder holds no manifest.
        """
        if not manifest.is_there(Path(path)):
            why = "it has no run.json" if Path(path).exists() else "there is no such folder"
            raise InputError(
                f"{path} is not a run folder ({why})",
                f"make one with: {command('calibrate', source='pixart', output='RUN')}",
            )
        return cls(path)

    def require_writable(self, *folders: str) -> None:
        """Try whether files can be written into the run folder, and into ``folders`` in it, before the work whose
        results go there.

        Raises:
            UsageError: they cannot be made or written to.
            MemoryExhaustedError: the disk is full.
        """
        require_writable(self.path, make=True)
        for name in folders:
            folder = safe_child(self.path, name)
            if folder.is_file() and name.partition("/")[0] not in leftovers_of.FOLDERS:
                continue
            inside = [one for one in folder.iterdir() if one.is_dir()] if folder.is_dir() else []
            for place in [folder, *inside] if folder.exists() or folder.is_symlink() else []:
                require_writable(place)

    def file(self, *parts: str) -> Path:
        """Return a path inside the run folder."""
        return self.path.joinpath(*parts)

    @property
    def id(self) -> str:
        """Return the twelve hexadecimal digits that name this run: the hash of its calibration's inputs. It goes into
        pictures.
        """
        entry = self.manifest["stages"].get("calibrate")
        return sha256_json(entry["inputs"])[:12] if entry else "0" * 12

    def entry(self, stage: str) -> dict[str, Any]:
        """Return the manifest entry of a finished stage.

        Raises:
            InputError: when it is not finished, with the command that makes it.
            RunLockedError: another process works here now, perhaps on it.
        """
        entry = self.manifest["stages"].get(stage)
        if not entry or entry.get("status") != "done":
            if self._lock.is_held_elsewhere():
                raise RunLockedError(self.path, f"stage {stage!r} is not finished")
            state = "was cut off" if entry else "has not been done"
            again = command_to_go_on(entry or {}, stage) or command_of(stage, self.path)
            raise InputError(f"stage {stage!r} {state} in {self.path}", f"run: {again}")
        return entry

    def done(self, stage: str) -> bool:
        """Return whether the manifest says that ``stage`` is finished."""
        return self.manifest["stages"].get(stage, {}).get("status") == "done"

    def outputs_hash(self, stage: str) -> str:
        """Return one hash over the outputs of a finished stage: an input of the next one."""
        return sha256_json(self.entry(stage)["outputs"])

    def verify(self, stage: str, only: Container[str] | None = None) -> None:
        """Compare the outputs of a finished stage, or ``only`` some of them, with the hashes in the manifest.

        Raises:
            InputError: an output is missing, or the stage is not finished.
            IntegrityError: an output was changed after it was made.
        """
        entry = self.entry(stage)
        for name, digest in entry["outputs"].items():
            if only is not None and name not in only:
                continue
            path = safe_child(self.path, name)
            if not path.is_file():
                raise InputError(
                    f"{name} of stage {stage!r} is missing in {self.path}",
                    f"run: {command_anew(entry, stage, self.path)}",
                )
            if sha256_file(path) != digest:
                plan = command_of(stage, self.path, plan=path, force=True)
                raise IntegrityError(
                    f"{name} is not the file that stage {stage!r} wrote (its sha256 differs)",
                    f"put the old file back, or run: {plan if name == EDITABLE else command_anew(entry, stage, self.path)}",
                )
            if name.startswith("onnx/"):
                break_links(path)  # readers of ONNX refuse files with several names

    def is_current(self, stage: str, inputs: Mapping[str, object]) -> bool:
        """Return whether ``stage`` is finished with exactly these inputs and unchanged outputs.

        Raises:
            InputError: finished or begun with other inputs (the message lists what differs).
        """
        entry = self.manifest["stages"].get(stage)
        if entry is None:
            return False
        changed = differences(entry["inputs"], json.loads(json.dumps(inputs)))
        if changed:
            raise InputError(
                f"{self.path} holds another {stage!r}: "
                + "; ".join(changed[:6])
                + (f"; and {len(changed) - 6} more changes" if len(changed) > 6 else ""),
                self._fix(stage),
            )
        if entry["status"] != "done":
            return False
        self.verify(stage)
        return True

    def _verify_all(self, stages: Iterable[str]) -> None:
        for stage in stages:
            self.verify(stage)

    def _fix(self, stage: str) -> str:
        """Return what to do about a stage that was made from other inputs, and what that costs."""
        later = self._made_from(stage)
        fix = f"add {option('force', True)} to make {stage} anew"
        fix += f", which forgets what was made from it: {', '.join(later)}" if later else ""
        if not UPSTREAM[stage.partition(":")[0]]:
            return f"choose another folder with {option('output')}, or {fix}"
        alone = command_of(stage, self.path, "…", force=True)
        return f"{fix}; `{alone}` keeps the stages before it, `{command('run_all', '…', force=True)}` none"

    def _made_from(self, name: str) -> list[str]:
        """Return the recorded stages that were made from ``name``, directly or not."""
        own = name.partition(":")[0]
        verbs = {own}
        for verb, sources in UPSTREAM.items():  # in order: a stage comes after all that it is made from
            if verbs & set(sources):
                verbs.add(verb)
        return [stage for stage in self.manifest["stages"] if stage.partition(":")[0] in verbs - {own}]

    @contextlib.contextmanager
    def stage(
        self,
        name: str,
        inputs: Mapping[str, object],
        *,
        force: bool = False,
        replace: bool = False,
        leftovers: Iterable[str] = (),
        needs: Iterable[str] = (),
    ) -> Iterator[StageRun | None]:
        """Do a stage unless it is done already.

        Yields ``None`` when the stage is finished with the same inputs: the caller's block then has nothing to do.
        Otherwise yields the :class:`StageRun`; its ``resumed`` says that an earlier try with the same inputs was cut off
        and may have left parts. When the block ends without an error the stage is recorded as done.

        Args:
            name: of the stage.
            inputs: JSON value that decides the outputs.
            force: forget what is there (``leftovers`` are deleted) and begin anew.
            replace: other inputs than the recorded ones are no error: the stage is done anew, its files are keyed by its inputs.
            leftovers: paths in the run folder that belong to this stage.
            needs: stages whose files this one reads: they are verified (:meth:`verify`) before anything is deleted or begun.
        """
        assert name.partition(":")[0] in UPSTREAM
        leftovers = list(leftovers)
        self.require_writable(*leftovers)
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock.hold():
            if manifest.is_there(self.path):
                self._read()
                manifest.refresh_copy(self.path)
            leftovers_of.sweep(self.path)
            before, deleted = dict(self.manifest["stages"]), False
            if force:
                self._verify_all(needs)
                self._forget(name)
                for leftover in leftovers:
                    ours = {*before.get(name, {}).get("outputs", {}), *self.manifest.get("leftovers", ())}
                    deleted |= leftovers_of.remove(self.path, leftover, ours, unfinished=name in before)
            recorded = self.manifest["stages"].get(name, {}).get("inputs")
            if replace and recorded != json.loads(json.dumps(inputs)):
                self._forget(name)
                lost = [stage for stage in before if stage not in self.manifest["stages"] and stage != name]
                if lost:
                    log.warning("%s: %s of what was there before no longer count", name, " and ".join(lost))
            if self.is_current(name, inputs):
                log.info("%s: done already in %s", name, self.path)
                yield None
                return
            if not force:
                self._verify_all(needs)
            work = StageRun(self.path, name, json.loads(json.dumps(inputs)))
            work.resumed = name in self.manifest["stages"]
            begun = {"status": "begun", "inputs": work.inputs, "outputs": {}, "command": command_line()}
            written = manifest.text(self.path)
            self.manifest["stages"][name] = begun
            self._write()
            release_memory()
            try:
                with measure_usage() as work.usage:
                    yield work
            except QdiffError:
                if not (work.outputs or work.resumed or deleted):  # nothing was touched: what was finished still is
                    self.manifest["stages"] = before
                    self._write() if written is None else manifest.put_back(self.path, written)
                raise
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise MemoryExhaustedError(
                    f"{name} ran out of memory", "use fewer samples or a smaller batch"
                ) from error
            self._forget(name)
            self.manifest["stages"][name] = work.entry("done")
            self._remove_summaries()  # before the manifest on disk forgets them: a kill between would leave them
            self._write()

    def _remove_summaries(self) -> None:
        """Remove what forgotten stages had written in the run folder itself (a report, a comparison, a correction): it
        speaks of what is no longer there. Pictures, graphs and engines stay.
        """
        current = {output for entry in self.manifest["stages"].values() for output in entry.get("outputs", {})}
        for output in self.manifest["leftovers"]:
            if output not in current and "/" not in output:
                safe_child(self.path, output).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        """Drop the entries of a stage and of what was made from it; their files that stay are remembered as ours."""
        names = set(self.manifest.get("leftovers", ()))
        for stage in [name, *self._made_from(name)]:
            names |= self.manifest["stages"].pop(stage, {}).get("outputs", {}).keys()
        self.manifest["leftovers"] = sorted(names)

    def _write(self) -> None:
        order = list(UPSTREAM)
        stages = self.manifest["stages"]
        ordered = {
            stage: stages[stage]
            for stage in sorted(stages, key=lambda stage: (order.index(stage.partition(":")[0]), stage))
        }
        current = {output for entry in ordered.values() for output in entry.get("outputs", {})}
        remaining = [
            output
            for output in self.manifest.get("leftovers", ())
            if output not in current and self.file(output).exists()
        ]
        self.manifest = {"version": manifest.VERSION, "stages": ordered}
        if remaining:
            self.manifest["leftovers"] = remaining
        manifest.write(self.path, self.manifest)
