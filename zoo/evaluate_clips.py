"""How good the bundled video model is: emoji, background and motion accuracy on seen and held-out pairs, and sample sheets.

python -m zoo.evaluate_clips qdiff/models/bundled/wan --clips 64 --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qdiff.evaluation.motion import motion_accuracy
from zoo.clips import all_clips, caption_of
from zoo.finite import in_bytes

SHOWN = range(0, 33, 4)


def generate(
    pipeline: Any, prompts: Sequence[str], guidance: float, steps: int, seed: int = 0, batch: int = 4
) -> np.ndarray:
    """Return clips of the stock pipeline, uint8 [N, T, 64, 64, 3]; every prompt has its own seed.

    Raises:
        InputError: the model makes NaN or infinity.
    """
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        made = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, num_frames=33,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            max_sequence_length=32, output_type="np",
        ).frames  # fmt: skip
        found.append(in_bytes(np.asarray(made), part))
    return np.concatenate(found)


def sheet(clips: np.ndarray, path: Path) -> None:
    """Write a PNG with a row of frames for each clip ``[N, T, H, W, 3]``."""
    Image.fromarray(np.concatenate([np.concatenate(list(clip[list(SHOWN)]), 1) for clip in clips], 0)).save(path)


def evaluate(pipeline: Any, n: int, guidance: float, steps: int = 20, seed: int = 0) -> dict[str, Any]:
    """Return accuracy over ``n`` prompts of seen pairs and ``n`` of held-out pairs; the clips come along."""
    result: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": steps, "n": n}
    for kind in ("seen", "held_out"):
        rng = random.Random(seed + 1)
        prompts = [caption_of(clip, rng) for clip in rng.sample(all_clips(kind == "held_out"), n)]
        clips = generate(pipeline, prompts, guidance, steps, seed + 1000)
        found = motion_accuracy(clips, prompts)
        result[kind] = {k: round(found[k], 4) for k in ("emoji", "background", "motion", "distance")}
        result[f"{kind}_clips"] = clips
    return result


def quick(pipeline: Any, path: Path, n: int = 6, guidance: float = 3.0) -> str:
    """Return a small evaluation during training: one line, and a sheet at ``path``."""
    found = evaluate(pipeline, n, guidance)
    sheet(np.concatenate([found["seen_clips"], found["held_out_clips"]]), path)
    return f"seen {found['seen']} held-out {found['held_out']}"


def main() -> None:
    """Parse the command line, then write one JSON line to stdout."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate_clips", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=64, help="of each kind, seen and held-out")
    parser.add_argument("--guidance", type=float, help="default: what generation.json says")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG with frames of every clip, seen then held-out")
    options = parser.parse_args()
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(options.folder)
    usual = json.loads((options.folder / "generation.json").read_text())["guidance_scale"]
    started = time.monotonic()
    found = evaluate(pipeline, options.clips, options.guidance or usual, options.steps, options.seed)
    kept = {k: v for k, v in found.items() if not k.endswith("_clips")}
    print(json.dumps({**kept, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    if options.sheet:
        sheet(np.concatenate([found["seen_clips"], found["held_out_clips"]]), options.sheet)


if __name__ == "__main__":
    main()
