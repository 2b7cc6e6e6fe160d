"""``python -m bench.fuzz commands --count 5000 --seed 0``, ``python -m bench.fuzz requests --count 1000``: see :mod:`bench.fuzz`.

Both work on a finished run of the smallest model, which is made first (``--run`` names one that is there). Exit code 1 when
something is wrong; each fault is one line with what to type to see it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

RUN = ("run", "--weights", "random:pixart-tiny", "--samples", "4", "--steps", "4", "--batch", "3", "--pictures", "2",
       "--engine", "openvino", "--engine", "onnxruntime")  # fmt: skip


def main() -> int:
    """Parse the command line, try the random commands or requests, and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description="Random command lines and requests.")
    parser.add_argument("what", choices=("commands", "requests"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    # Long: the alarm raises in the middle of a library's native code, which two cores that are shared made end with signal 11.
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one")
    parser.add_argument("--run", type=Path, help="a finished run of random:pixart-tiny, which is not changed")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="qdiff-fuzz-") as name:
        folder = Path(name)
        os.environ.setdefault("QDIFF_HOME", str(folder / "home"))
        run = asked.run or folder / "finished"
        if asked.run is None:
            from qdiff.cli import commands
            from qdiff.cli import main as process

            if process.run(commands.app, ["--quiet", *RUN, "-o", str(run)]):
                return 1
        (folder / "work").mkdir()
        start = time.perf_counter()
        if asked.what == "commands":
            from bench.fuzz.commands import check_commands

            faults, outcomes = check_commands(run, folder / "work", asked.count, asked.seed, asked.limit)
        else:
            from bench.fuzz.page import check_requests

            faults, outcomes = check_requests(run, folder / "work", asked.count, asked.seed, asked.limit)
        by_outcome = ", ".join(f"{outcome}: {number}" for outcome, number in sorted(outcomes.items()))
        print(f"{asked.count} {asked.what}, seed {asked.seed}, {time.perf_counter() - start:.0f} s; {by_outcome}")
        print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
