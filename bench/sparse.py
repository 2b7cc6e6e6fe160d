"""What sparse attention does to pictures, and which part of it does it: rows at equal density beside the dense float model.

    python -m bench.sparse RUN [--density 0.5 0.3] [--clips 4] [--numerics float] [--json]

RUN is a calibrated run. Every row makes the same clips (or pictures) of prompts and seeds that nothing was calibrated on, in
torch, with float layers, and differs from ``qdiff`` in one thing:

- ``model's order``: every head keeps the order of the model's own tokens.
- ``one mask``: one mask for all sparse timesteps.
- ``windows``: no calibration at all: boxes of tokens, each reading the nearest boxes (FPSAttention, arXiv 2506.04648, without its
  training).
- ``dense, fp8`` and ``dense, int8_fp8``: everything is read, in those numerics.

All sparse rows read everything in the noisiest steps and in the first and last block, as qdiff does: ``overall`` counts that too.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 40_000  # of the pictures: neither calibration's nor comparison's


def nearest_blocks(order: Tensor, grid: tuple[int, int, int], block: int, width: int) -> Tensor:
    """For every block the ``width`` blocks whose middles lie nearest: bool ``[blocks, blocks]``."""
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij")], dim=1)
    middles = torch.stack([part.double().mean(dim=0) for part in places[order].split(block)])
    apart = torch.cdist(middles, middles)
    chosen = torch.zeros(apart.shape, dtype=torch.bool)
    return chosen.scatter_(1, apart.topk(width, dim=1, largest=False).indices, True)


def windows(plan: Any, density: float) -> tuple[Any, Tensor]:
    """``plan`` with fixed windows in place of what was calibrated."""
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


def rows(run: Any, model: Any, densities: list[float], numerics: str) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, plan and masks of every row."""
    from qdiff.attention.sparse import decide
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions
    from qdiff.trajectory import Trajectory

    trajectory = Trajectory(run.file("calibration"))
    timesteps = run.entry("calibrate")["timesteps"]
    ways = {
        "qdiff": AttentionOptions(),
        "model's order": AttentionOptions(orders=("fhw",)),
        "one mask": AttentionOptions(groups=1),
    }
    found = {name: AttentionCalibration(model, trajectory, options, None).run() for name, options in ways.items()}
    dense = len(model.family.self_attentions(model.backbone)) - len(found["qdiff"].layers)
    for coded in ("fp8", "int8_fp8"):
        yield f"dense, {coded}", *decide(found["qdiff"], 1.0, coded, timesteps, dense)
    for density in densities:
        for name, statistics in found.items():
            plan, masks = decide(statistics, density, numerics, timesteps, dense)
            yield name, plan, masks
            if name == "qdiff":
                yield "windows", *windows(plan, density)


def benchmark(run: Any, densities: list[float], clips: int, numerics: str) -> dict[str, Any]:
    """The whole benchmark as a JSON value."""
    from qdiff import metrics, motion, prompt_accuracy
    from qdiff.attention.sparse import install, schedule_of
    from qdiff.models.base import Request, default_prompts
    from qdiff.stages.attention import require_sparse
    from qdiff.stages.calibrate import options_of, reload_model
    from qdiff.stages.generate import simulate

    require_sparse(options_of(run).model)
    model = reload_model(run)
    video = model.family.media == "video"
    request = Request(default_prompts(clips, SEED, model.family.media), list(range(SEED, SEED + clips)))

    def pictures(backbone: Any) -> Tensor:
        made: list[Any] = simulate(model, backbone, request, batch=4)
        import numpy as np

        return torch.stack([torch.from_numpy(np.asarray(one.frames if video else one)) for one in made])

    def accuracy(made: Tensor) -> dict[str, float]:
        if video:
            return motion.motion_accuracy(made.numpy(), list(request.prompts))
        return prompt_accuracy.prompt_accuracy(made.numpy(), list(request.prompts))

    reference = pictures(model.backbone)
    result: list[dict[str, Any]] = [{"name": "dense float", "density": 1.0, "overall": 1.0, **accuracy(reference)}]
    for name, plan, masks in rows(run, model, densities, numerics):
        backbone = copy.deepcopy(model.backbone)
        install(model.family, backbone, plan, schedule_of(plan, masks))
        made = pictures(backbone)
        row = {
            "name": name,
            "density": float(masks.double().mean()),
            "overall": plan.overall,
            "psnr_db": float(metrics.psnr(reference, made).mean()),
            **accuracy(made),
        }
        if video:
            row["motion_ratio"] = metrics.motion(reference, made).magnitude_ratio
        print(f"{name} {row['density']:.3f} {row['psnr_db']:.2f} dB", file=sys.stderr, flush=True)
        result.append(row)
    return {"run": str(run.path), "clips": clips, "numerics": numerics, "rows": result}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--numerics", default="float")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from qdiff.artifacts import Run
    from qdiff.events import TerminalListener, listening
    from qdiff.present import table

    with listening(TerminalListener()):
        result = benchmark(Run.existing(options.run), options.density, options.clips, options.numerics)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    keys = ("density", "overall", "psnr_db", "emoji", "motion", "motion_ratio")
    cells = [(row["name"], *(f"{row[key]:.3f}" if key in row else "" for key in keys)) for row in result["rows"]]
    print(table(cells, ("ROW", "DENSITY", "OVERALL", "PSNR dB", "EMOJI", "MOTION", "CHANGE")))


if __name__ == "__main__":
    main()
