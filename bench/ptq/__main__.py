"""Command line of the benchmark; see :mod:`bench.ptq`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ptq.bits import effective_bits
from bench.ptq.guard import FLOAT, check_different
from bench.ptq.report import markdown
from bench.ptq.rows import ROWS, Row, named
from bench.ptq.score import answers, score
from bench.ptq.shared import Settings, Shared
from qdiff.events import TerminalListener, listening, log
from qdiff.files import open_tensors, read_json, save_tensors, sha256_json, write_json
from qdiff.recipes import load_recipe
from qdiff.resources import measure_usage, release_memory

TIMES = ("seconds", "cpu_seconds")


def key_of(shared: Shared, row: Row) -> str:
    """Return the fingerprint of everything that decides a row's result."""
    recipe = (
        load_recipe(row.options["recipe"], list(row.options["overrides"])).model_dump()
        if row.library == "qdiff"
        else None
    )
    return sha256_json([shared.key, row.library, dict(row.options), recipe])


def run_row(shared: Shared, row: Row) -> dict[str, Any]:
    """Make and score one row in this process, and write its two files."""
    with tempfile.TemporaryDirectory() as scratch:
        material = shared.material(Path(scratch))
        release_memory()
        with measure_usage() as usage:
            started = time.process_time()
            made = row.make(material)
            cpu_seconds = time.process_time() - started
    reference = shared.float_answers()
    predictions, pictures, accuracy = answers(material.model, shared.held_out, shared.request(material.model))
    check_different({FLOAT: reference[0], row.name: predictions})
    timesteps = [step.timestep for step in shared.held_out]
    before = {name: shared.facts[f"statistics_{name}"] if row.library == "qdiff" else 0.0 for name in TIMES}
    result = {
        "key": key_of(shared, row),
        **identity(row),
        "bits": effective_bits(made.storage, material.layers),
        **score(timesteps, reference, predictions, pictures),
        "accuracy": accuracy,
        "seconds": usage.seconds + before["seconds"],
        "cpu_seconds": cpu_seconds + before["cpu_seconds"],
        "peak_memory_bytes": usage.peak_bytes,
        "scaled_inputs": made.scaled_inputs,
        "layers": len(material.layers),
        "note": made.note,
    }
    tensors, record = files_of(shared, row)
    save_tensors(tensors, {"predictions": predictions})
    write_json(record, result)
    return result


def identity(row: Row) -> dict[str, str]:
    """Return what names a row in results."""
    return {"name": row.name, "library": row.library, "format": row.format, "method": row.method}


def files_of(shared: Shared, row: Row) -> tuple[Path, Path]:
    """Return predictions and result of a row; the result is written last, so where it is, the row is finished."""
    folder = shared.folder / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{row.name}.safetensors", folder / f"{row.name}.json"


def finished(shared: Shared, row: Row) -> dict[str, Any] | None:
    """Return the result of a row that was run before with the same settings."""
    record = files_of(shared, row)[1]
    if not record.exists():
        return None
    result = read_json(record, "a row's result")
    return result if result["key"] == key_of(shared, row) else None


def predictions_of(shared: Shared, rows: list[Row]) -> dict[str, Tensor]:
    """Return the predictions of the float model and of finished rows, by name."""
    found = {FLOAT: shared.float_answers()[0]}
    for row in rows:
        if finished(shared, row) is not None:
            with open_tensors(files_of(shared, row)[0], "a row's predictions") as file:
                found[row.name] = file.get_tensor("predictions")
    return found


def run_all(shared: Shared, rows: list[Row]) -> list[dict[str, Any]]:
    """Return every row in a process of its own; what is finished is not run again, what fails is reported with its
    reason.

    Raises:
        EqualRowsError: two rows that should differ do not.
    """
    results = []
    for row in rows:
        result = finished(shared, row)
        if result is None:
            log.info("ptq: %s", row.name)
            result = in_own_process(shared, row)
        results.append(result)
    check_different(predictions_of(shared, rows), {row.name: row.twin for row in rows})
    return results


def in_own_process(shared: Shared, row: Row) -> dict[str, Any]:
    """Run ``python -m bench.ptq --row NAME``."""
    command = [sys.executable, "-m", "bench.ptq", "--work", str(shared.folder), "--row", row.name]
    for option, value in asdict(shared.settings).items():
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    result = finished(shared, row)
    if result is not None:
        return result
    (shared.folder / "rows" / f"{row.name}.log").write_text(done.stderr, encoding="utf-8")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {**identity(row), "error": lines[-1].strip() if lines else f"ended with code {done.returncode}"}


def parser() -> argparse.ArgumentParser:
    """Return the arguments; those of the settings have their names and defaults."""
    result = argparse.ArgumentParser(prog="python -m bench.ptq", description=__doc__)
    defaults = Settings()
    result.add_argument("--model", default=defaults.model)
    result.add_argument("--weights", default=defaults.weights)
    result.add_argument("--pictures", type=int, default=defaults.pictures)
    result.add_argument("--samples", type=int, default=defaults.samples, help="prompts of the calibration")
    result.add_argument("--held-out", type=int, default=defaults.held_out, help="prompts of the held-out calls")
    result.add_argument("--steps", type=int, default=defaults.steps)
    result.add_argument("--only", nargs="+", metavar="NAME", help="rows; a part of a name stands for all that hold it")
    result.add_argument("--work", type=Path, help="folder that is kept, to go on with; default: a temporary one")
    result.add_argument("--json", action="store_true")
    result.add_argument("--list", action="store_true", help="print the rows' names")
    result.add_argument("--row", help=argparse.SUPPRESS)
    return result


def chosen(only: list[str] | None, model: str) -> list[Row]:
    """Return the rows for a family of models, of these the ones that ``--only`` names, in the table's order: a whole
    name stands for its row, a part for all that hold it.

    Raises:
        SystemExit: a name that no row has.
    """
    mine = [row for row in ROWS if row.model == model]
    if not only:
        return mine
    names = {row.name for row in mine}
    wanted: set[str] = set()
    for part in only:
        found = {part} if part in names else {name for name in names if part in name}
        if not found:
            raise SystemExit(f"no row's name holds {part!r}; --list shows all")
        wanted |= found
    return [row for row in mine if row.name in wanted]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the benchmark; see :mod:`bench.ptq`."""
    given = parser().parse_args(arguments)
    from qdiff import device

    device.set_device(device.HOST)
    if given.list:
        print("\n".join(row.name for row in chosen(None, given.model)))
        return
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    rows = chosen(given.only, given.model)
    torch.set_grad_enabled(False)
    with listening(TerminalListener()), tempfile.TemporaryDirectory() as temporary:
        shared = Shared(given.work or Path(temporary), settings)
        if given.row is not None:
            run_row(shared, named(given.row))
            return
        shared.prepare()
        results = run_all(shared, rows)
        facts = shared.facts
    if given.json:
        print(json.dumps({"shared": facts, "rows": results}, indent=2))
    else:
        print(markdown(results, facts))


if __name__ == "__main__":
    main()
