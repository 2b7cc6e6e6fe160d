"""What sparse attention does to pictures, and which part of it does it: rows at equal density beside the dense float model.

    python -m bench.sparse RUN [--density 0.5 0.3] [--clips 4] [--numerics float] [--only ROW …] [--device cuda] [--json]

RUN is a calibrated run. Every row makes the same clips (or pictures) of prompts and seeds that nothing was calibrated on, in
torch, with float layers, and differs from ``qdiff`` in one thing:

- ``model's order``: every head keeps the order of the model's own tokens.
- ``one mask``: one mask for all sparse timesteps.
- ``windows``: no calibration at all: boxes of tokens, each reading the nearest boxes (FPSAttention, arXiv 2506.04648, without its
  training).
- ``dense, fp8`` and ``dense, int8_fp8``: everything is read, in those numerics.
- ``the run's plan``: where RUN is quantized, its checkpoint, with the attention that it was quantized with.

Accuracies in per cent, and beside them how many clips lost what the dense float model's clip showed and how many won it: of
few clips a point is less than one.

All sparse rows read everything in the noisiest steps and in the first and last block, as qdiff does: ``overall`` counts that too.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qdiff.runs.run import Run
    from qdiff.stages.calibrated_model import CalibratedModel

SEED = 40_000  # of the pictures: neither calibration's nor comparison's
WINDOWS, THE_RUN = "windows", "the run's plan"
ROWS = ("qdiff", "model's order", "one mask", WINDOWS, "dense, fp8", "dense, int8_fp8", THE_RUN)


def nearest_blocks(order: Tensor, grid: tuple[int, int, int], block: int, width: int) -> Tensor:
    """Return, for every block, the ``width`` blocks whose middles lie nearest: bool ``[blocks, blocks]``."""
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij")], dim=1)
    middles = torch.stack([part.double().mean(dim=0) for part in places[order].split(block)])
    apart = torch.cdist(middles, middles)
    chosen = torch.zeros(apart.shape, dtype=torch.bool)
    return chosen.scatter_(1, apart.topk(width, dim=1, largest=False).indices, True)


def windows(plan: Any, density: float) -> tuple[Any, Tensor]:
    """Return ``plan`` with fixed windows in place of what was calibrated."""
    from qdiff.attention.orders import candidates
    from qdiff.attention.sparse import tiling_of

    orders = candidates(plan.grid, plan.block_k)
    cubes = [name for name in orders if name.startswith("box")]
    name = min(cubes, key=lambda box: max(map(int, box[3:].split("x")))) if cubes else "fhw"
    mask = nearest_blocks(orders[name], plan.grid, plan.block_k, max(1, round(density * tiling_of(plan).columns)))
    made = plan.model_copy(deep=True)
    for layer in made.layers:
        for head in layer.heads:
            head.order = name
    return made, mask.expand(len(plan.edges), plan.heads, -1, -1)


def rows(
    calibrated: CalibratedModel, densities: list[float], numerics: str, only: list[str]
) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield name, plan and masks of every row; of those named ``only``, where there are any."""
    from qdiff.allocation.attention_masks import decide_masks
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions

    model, timesteps = calibrated.model, calibrated.statistics.timesteps
    ways = {
        "qdiff": AttentionOptions(),
        "model's order": AttentionOptions(orders=("fhw",)),
        "one mask": AttentionOptions(groups=1),
    }
    needed = {"qdiff", *(only or ways)}
    found = {
        name: AttentionCalibration(model, calibrated.trajectory, options, None).run()
        for name, options in ways.items()
        if name in needed
    }
    dense = len(model.family.self_attentions(model.backbone)) - len(found["qdiff"].layers)
    for coded in ("fp8", "int8_fp8"):
        yield f"dense, {coded}", *decide_masks(found["qdiff"], 1.0, coded, timesteps, dense)
    for density in densities:
        for name, statistics in found.items():
            plan, masks = decide_masks(statistics, density, numerics, timesteps, dense)
            yield name, plan, masks
            if name == "qdiff":
                yield WINDOWS, *windows(plan, density)


def backbones(
    run: Run, calibrated: CalibratedModel, densities: list[float], numerics: str, only: list[str]
) -> Iterator[tuple[str, dict[str, float], Any]]:
    """Yield name, densities and backbone of every row beside dense float; of those named ``only``, where there are
    any.
    """
    from qdiff.attention.sparse import SIDECAR, install, load_masks, schedule_of
    from qdiff.plan.plan import Plan
    from qdiff.quantization.checkpoint import load_quantized

    def densities_of(plan: Any, masks: Tensor) -> dict[str, float]:
        return {"density": float(masks.double().mean()), "overall": plan.overall}

    if not only or set(only) - {THE_RUN}:
        for name, plan, masks in rows(calibrated, densities, numerics, only):
            if not only or name in only:
                backbone = copy.deepcopy(calibrated.model.backbone)
                install(calibrated.model.family, backbone, plan, schedule_of(plan, masks))
                yield name, densities_of(plan, masks), backbone
    if run.done("quantize") and (not only or THE_RUN in only):
        plan = Plan.load(run.file("plan.json"))
        attention = plan.attention
        read = {"density": 1.0, "overall": 1.0}
        if attention is not None:
            read = densities_of(attention, load_masks(attention, run.file(SIDECAR)))
        yield THE_RUN, read, load_quantized(plan, run.file("model.safetensors")).to(calibrated.model.device)


def benchmark(
    run: Run, densities: list[float], clips: int, numerics: str, only: list[str] | None = None, batch: int = 4
) -> dict[str, Any]:
    """Return the whole benchmark as a JSON value."""
    import numpy as np

    from qdiff.evaluation import metrics, motion, prompt_accuracy
    from qdiff.models.model import Request, default_prompts
    from qdiff.stages.attention import require_sparse
    from qdiff.stages.calibrated_model import calibrated_model
    from qdiff.stages.generate import simulate

    calibrated = calibrated_model(run)
    model, options = calibrated.model, calibrated.options
    require_sparse(options.model)
    video = model.family.media == "video"
    prompts = default_prompts(clips, SEED, model.family.media)
    request = Request(prompts, list(range(SEED, SEED + clips)), steps=options.steps, guidance=options.guidance)
    recognise: Any = motion.motion_accuracy if video else prompt_accuracy.prompt_accuracy
    kinds = ("emoji", "motion") if video else ("emoji", "background")

    def pictures(backbone: Any) -> Tensor:
        made: list[Any] = simulate(model, backbone, request, batch=batch)
        return torch.stack([torch.from_numpy(np.asarray(one.frames if video else one)) for one in made])

    def right(seen: dict[str, Any]) -> dict[str, Any]:
        return {kind: np.array([bool(each[kind]) for each in seen["per_prompt"]]) for kind in kinds}

    reference = pictures(model.backbone)
    expected = recognise(reference.numpy(), prompts)
    shown = right(expected)
    result: list[dict[str, Any]] = [
        {"name": "dense float", "density": 1.0, "overall": 1.0, **{kind: expected[kind] for kind in kinds}}
    ]
    for name, read, backbone in backbones(run, calibrated, densities, numerics, only or []):
        made = pictures(backbone)
        seen = recognise(made.numpy(), prompts)
        ratios = metrics.psnr(reference, made)
        row = {"name": name, **read, "psnr_db": float(ratios.mean()), "psnr_db_min": float(ratios.min())}
        for kind, now in right(seen).items():
            lost, won = int((shown[kind] & ~now).sum()), int((now & ~shown[kind]).sum())
            row |= {kind: seen[kind], f"{kind}_lost": lost, f"{kind}_won": won}
        if video:
            row["motion_ratio"] = metrics.motion(reference, made).magnitude_ratio
        print(f"{name} {row['density']:.3f} {row['psnr_db']:.2f} dB", file=sys.stderr, flush=True)
        result.append(row)
    return {"run": str(run.path), "clips": clips, "numerics": numerics, "device": str(model.device), "rows": result}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(kind: str) -> str:
        if f"{kind}_lost" not in row:
            return f"{100 * row[kind]:.1f}"
        return f"{100 * row[kind]:.1f} (-{row[f'{kind}_lost']} +{row[f'{kind}_won']})"

    second = "motion" if "motion" in row else "background"
    numbers = (f"{row[key]:.3f}" if key in row else "" for key in ("density", "overall", "psnr_db", "psnr_db_min"))
    return (
        row["name"],
        *numbers,
        shown("emoji"),
        shown(second),
        f"{row['motion_ratio']:.3f}" if "motion_ratio" in row else "",
    )


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--numerics", default="float")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--batch", type=int, default=4, help="clips denoised together")
    parser.add_argument("--device", help="as of qdiff's commands")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from qdiff import device
    from qdiff.cli.text import table
    from qdiff.events import TerminalListener, listening
    from qdiff.runs.run import Run

    device.set_device(options.device)
    run = Run.existing(options.run)
    if options.only == [THE_RUN] and not run.done("quantize"):
        parser.error(f"{options.run} is not quantized")
    with listening(TerminalListener()):
        result = benchmark(run, options.density, options.clips, options.numerics, options.only, options.batch)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    header = ("ROW", "DENSITY", "OVERALL", "PSNR dB", "WORST", "EMOJI %", "MOTION %", "CHANGE")
    print(table([_cells(row) for row in result["rows"]], header))


if __name__ == "__main__":
    main()
