"""Compare a fresh run of each recorded benchmark with its record.

    make bench-check                                    every record of bench/results
    python -m bench.check --record bench/results/step-pixart-bundled.json      measure anew and write the record

A record holds the command that made it, the processor's features, the date and ratios: no times, which belong to one machine. A
ratio is of two contenders that ran side by side in one process, so that what else the machine does hits both. It still depends on
the instructions that the processor has: on a processor with other features than the record's, the ratios are printed and nothing
fails. A fresh ratio may be larger than the recorded one by any amount, and smaller by the record's ``tolerance``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
# Instructions that decide how fast, and how exactly, low-precision products are.
FEATURES = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)
TOLERANCE = 0.3


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the architecture, the features among :data:`FEATURES` and the cores that this process may use."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "architecture": platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "cores": cores,
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Return the speed of each contender of :mod:`bench.step` over the reference, which is left out."""
    return {row["name"]: round(row["speedup"], 2) for row in result["rows"] if row["sqnr_db"] is not None}


def run(command: list[str]) -> dict[str, float]:
    """Run a benchmark, ``["python", "-m", MODULE, …]``, in this Python and return its ratios.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, *command[1:]], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return ratios(json.loads(done.stdout))


def slower(recorded: dict[str, float], fresh: dict[str, float], tolerance: float) -> list[str]:
    """Return the names of the contenders that are missing, or whose ratio is below the recorded one by more than ``tolerance``,
    a share of it.
    """
    return [name for name, ratio in recorded.items() if fresh.get(name, 0.0) < ratio * (1 - tolerance)]


def check(path: Path) -> bool:
    """Measure what a record holds anew, print both, and return whether the record still holds."""
    record = json.loads(path.read_text())
    fresh, here = run(record["command"]), machine()
    comparable = here == record["machine"]
    below = slower(record["ratios"], fresh, record["tolerance"])
    print(f"{path.name}: {' '.join(record['command'])}")
    for name, ratio in record["ratios"].items():
        verdict = "" if name not in below else "  SLOWER" if comparable else "  slower"
        print(f"  {name:<34} recorded {ratio:5.2f}   now {fresh.get(name, 0.0):5.2f}{verdict}")
    if not comparable:
        print(f"  not compared: recorded on {record['machine']}, this is {here}")
    return not below or not comparable


def write(path: Path, command: list[str], note: str) -> None:
    """Measure anew and write the record."""
    record = {
        "command": command,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "note": note,
        "tolerance": TOLERANCE,
        "ratios": run(command),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Parse the command line and run; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="measure the command of this record anew and write it")
    parser.add_argument("--note", default="", help="with --record: what else the machine did")
    arguments = parser.parse_args()
    if arguments.record:
        write(arguments.record, json.loads(arguments.record.read_text())["command"], arguments.note)
        return
    paths = sorted(RESULTS.glob("*.json"))
    if not all([check(path) for path in paths]):
        sys.exit("slower than recorded; when other programs were running, try again")


if __name__ == "__main__":
    main()
