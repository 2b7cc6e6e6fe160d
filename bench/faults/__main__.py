"""Command line; see :mod:`bench.faults`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not come along through a fork
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.faults.changes import CHANGES
from bench.faults.damage import Damage
from bench.faults.damage import table as damage_table
from bench.faults.kills import Laboratory, table
from bench.faults.stages import STAGES, USUAL

SIGNALS = {"kills": (signal.SIGKILL,), "interrupts": (signal.SIGINT, signal.SIGTERM)}


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    result = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    verbs = result.add_subparsers(dest="verb", required=True)
    for verb in SIGNALS:
        one = verbs.add_parser(verb)
        one.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(USUAL), metavar="NAME")
        one.add_argument("--count", type=int, default=50, help="trials of a stage in which the signal met it at work")
        _common(one)
    one = verbs.add_parser("damage")
    one.add_argument(
        "--only", nargs="+", default=[], metavar="FILE", help="parts of files' names [default: every file]"
    )
    one.add_argument("--change", nargs="+", choices=list(CHANGES), default=[], metavar="NAME")
    one.add_argument(
        "--thorough", action="store_true", help="every command that reads the file, also with --force, not one in turn"
    )
    _common(one)
    return result


def _common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--work", type=Path, help="folder that is kept, to go on with; default: a temporary one")
    one.add_argument("--json", type=Path, metavar="FILE", help="write every trial")


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="qdiff-faults-") as folder:
        yield Path(folder)


def _stop(work: Path, given: argparse.Namespace) -> tuple[str, Any, bool]:
    laboratory, rows = Laboratory(work, given.seed), {}
    for name in given.stage:
        reference, trials = laboratory.reference(name), []
        for trial in laboratory.trials(name, given.count, SIGNALS[given.verb]):
            trials.append(trial)
            hits = sum(each.hits > 0 for each in trials)
            print(f"{given.verb}: {name}: {hits}/{given.count} {'; '.join(trial.faults)}", file=sys.stderr, flush=True)
        rows[name] = reference, trials
    data = {
        name: {"seconds": ref.seconds, "trials": [asdict(t) for t in trials]} for name, (ref, trials) in rows.items()
    }
    return table(rows), data, any(trial.faults for _, trials in rows.values() for trial in trials)


def _damage(work: Path, given: argparse.Namespace) -> tuple[str, Any, bool]:
    outcomes = []
    for outcome in Damage(Laboratory(work, given.seed)).outcomes(given.only, given.change, given.thorough):
        outcomes.append(outcome)
        if not outcome.good:
            words = f"{outcome.file}, {outcome.change}: {outcome.command}: {outcome.outcome}"
            print(f"damage: {words}", file=sys.stderr, flush=True)
        elif len(outcomes) % 50 == 0:
            print(f"damage: {len(outcomes)} commands, now {outcome.file}", file=sys.stderr, flush=True)
    return damage_table(outcomes), [asdict(each) for each in outcomes], not all(each.good for each in outcomes)


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 1 where something is wrong."""
    given = parser().parse_args(arguments)
    with _work_folder(given.work) as work:
        text, data, broken = (_damage if given.verb == "damage" else _stop)(work, given)
    if given.json is not None:
        given.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
