"""What an allocation is worth: the solver's plan beside random and hand-made plans of the same cost, in pictures.

    python -m bench.mixed [--model pixart] [--bits 5.5 6.5] [--pictures 16] [--random 8] [--recipes nvfp4 int8] [--json]

Every plan is simulated in torch from the same layers (each quantized on its own, on the float model's statistics) and makes the
same pictures, of prompts and seeds that nothing was calibrated or chosen on. ``recovered`` is the share of the dB between the two
uniform plans. Random plans draw groups in random order and give them the dear format while it fits; hand-made ones give it to
what people protect first: attention, feed-forward layers, the first and last blocks, and fill up in the model's order.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 30_000  # of the pictures: neither calibration's, nor those that chose between plans


def fill(costs: Tensor, budget: float, order: Sequence[int]) -> Tensor:
    """Return the dear format (the last) for groups in ``order`` as long as it fits, the cheap one (the first) for the
    rest.
    """
    choice = torch.zeros(len(costs), dtype=torch.int64)
    spent = float(costs[:, 0].sum())
    for row in order:
        extra = float(costs[row, -1] - costs[row, 0])
        if spent + extra <= budget:
            choice[row], spent = costs.shape[1] - 1, spent + extra
    return choice


def by_hand(groups: Sequence[str]) -> dict[str, list[int]]:
    """Return orders that people would choose."""
    found = (re.search(r"\.(\d+)\.", name) for name in groups)
    blocks = [int(match[1]) if match else 0 for match in found]
    middle = max(blocks) / 2

    def first(wanted: Callable[[str], bool]) -> list[int]:
        return sorted(range(len(groups)), key=lambda row: not wanted(groups[row]))

    return {
        "attention first": first(lambda name: ".attn" in name),
        "feed-forward first": first(lambda name: ".ff." in name),
        "first and last blocks first": sorted(range(len(groups)), key=lambda row: -abs(blocks[row] - middle)),
    }


def plans(candidates: Any, table: Any, costs: Tensor, bits: float, count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield all rows for one budget."""
    from qdiff.allocation.knapsack import allocate

    groups = list(candidates.groups)
    yield "solver", allocate(table, costs, bits)
    for name, order in by_hand(groups).items():
        yield name, fill(costs, bits, order)
    for seed in range(count):
        order = list(range(len(groups)))
        random.Random(seed).shuffle(order)
        yield f"random {seed}", fill(costs, bits, order)


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the whole benchmark as a JSON value."""
    from qdiff.allocation.candidates import Candidates
    from qdiff.allocation.knapsack import total
    from qdiff.allocation.mixed import costs_of
    from qdiff.models.model import default_prompts
    from qdiff.quantization.layer_plans import prepare
    from qdiff.recipes import load_recipe
    from qdiff.runs.run import Run
    from qdiff.stages.calibrate import CalibrateOptions, calibrate
    from qdiff.stages.calibrated_model import calibrated_model
    from qdiff.stages.decisions import ByBudget, measured
    from qdiff.stages.picture_scores import picture_score_of

    run = Run(work / "run")
    calibrate(run, CalibrateOptions(model=options.model))
    recipe = load_recipe("mixed", [f"mixed.recipes=[{', '.join(options.recipes)}]"])
    calibrated = calibrated_model(run)
    _, statistics = prepare(calibrated.model, recipe, calibrated.statistics)
    candidates = Candidates(calibrated.model, recipe, statistics)
    found = measured(calibrated, candidates, ByBudget(recipe).measured_inputs())
    judge = picture_score_of(calibrated, candidates.backbone, default_prompts(options.pictures, SEED), SEED)
    costs, _ = costs_of("bits", candidates, found, None)

    def row(name: str, choice: Tensor) -> dict[str, Any]:
        candidates.put_all(choice)
        made = {"name": name, "bits": total(costs, choice), "error": total(found.table(), choice), "psnr_db": judge()}
        print(f"{made['bits']:.3f} bits {made['psnr_db']:.2f} dB {name}", file=sys.stderr, flush=True)
        return made

    uniform = [row(name, torch.full((len(costs),), index)) for index, name in enumerate(candidates.names)]
    low, high = uniform[0]["psnr_db"], uniform[-1]["psnr_db"]
    budgets = []
    for bits in options.bits:
        rows = [row(name, choice) for name, choice in plans(candidates, found.table(), costs, bits, options.random)]
        for each in rows:
            each["recovered"] = (each["psnr_db"] - low) / (high - low)
        budgets.append({"bits": bits, "rows": rows})
    return {
        "model": options.model,
        "pictures": options.pictures,
        "uniform": uniform,
        "budgets": budgets,
        "rank_correlations": found.rank_correlations(),
    }


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="pixart")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.5, 6.5])
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--random", type=int, default=8, help="random plans for each budget")
    parser.add_argument("--recipes", nargs="+", default=["nvfp4", "int8"], help="cheapest first")
    parser.add_argument("--work", type=Path, help="folder for the run, kept and reused [default: a temporary one]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from qdiff import device

    device.set_device(device.HOST)
    from qdiff.cli.text import table
    from qdiff.events import TerminalListener, listening

    with listening(TerminalListener()), tempfile.TemporaryDirectory() as temporary:
        result = benchmark(options, options.work or Path(temporary))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    rows = [(each["name"], f"{each['bits']:.3f}", f"{each['psnr_db']:.2f}", "") for each in result["uniform"]]
    for budget in result["budgets"]:
        rows += [
            (each["name"], f"{each['bits']:.3f}", f"{each['psnr_db']:.2f}", f"{100 * each['recovered']:.0f} %")
            for each in budget["rows"]
        ]
    print(table(rows, ("PLAN", "BITS", "PSNR dB", "RECOVERED")))


if __name__ == "__main__":
    main()
