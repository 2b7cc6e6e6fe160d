"""How good a bundled text-to-image model is: prompt accuracy on seen and on held-out pairs, and sample sheets.

    python -m zoo.evaluate qdiff/models/bundled/pixart --prompts 200 --guidance 1.5 2 3 4.5 --sheet sheet.png

Every prompt has its own seed, so a picture does not depend on the batch it was made in. Held-out pairs are the
(emoji, background) combinations that training never showed (`zoo.data.held_out`).
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qdiff.evaluation.prompt_accuracy import load_vocabulary, parse_prompt, prompt_accuracy, render
from zoo.captions import caption
from zoo.data import held_out
from zoo.emoji import PALETTE, load_table
from zoo.finite import in_bytes

SHEET_COLUMNS = 16


def pair_prompts(n: int, unseen: bool, seed: int) -> list[str]:
    """Return ``n`` prompts for seen or for held-out pairs, of any form and with synonyms, all stating the
    background.
    """
    rng, table, colours, mask = random.Random(seed), load_table(), list(PALETTE), held_out()
    pairs = [(e, c) for e in range(len(table)) for c in range(len(colours)) if mask[e, c] == unseen]
    prompts = []
    for emoji, colour in rng.sample(pairs, n):
        row = table[emoji]
        prompts.append(caption([str(row["name"]), *row["synonyms"]], colours[colour], rng))  # type: ignore[misc]
    return prompts


def generate(
    pipeline: Any, prompts: Sequence[str], guidance: float, steps: int = 20, seed: int = 0, batch: int = 50
) -> np.ndarray:
    """Return pictures of the stock pipeline, uint8 [N, 64, 64, 3].

    Raises:
        InputError: the model makes NaN or infinity.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        own = {"max_sequence_length": 32, "use_resolution_binning": False, "clean_caption": False}  # PixArt's
        known = inspect.signature(pipeline.__call__).parameters
        made = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, generator=generators,
            output_type="np", **{name: value for name, value in own.items() if name in known},
        ).images  # fmt: skip
        images.append(in_bytes(made, part))
    return np.concatenate(images)


def sheet(images: np.ndarray, prompts: Sequence[str], path: Path) -> None:
    """Write a PNG with each picture above what was asked for (black where the prompt states no known pair)."""
    v, cells = load_vocabulary(), []
    for image, prompt in zip(images, prompts, strict=True):
        emoji, background = parse_prompt(prompt)
        wanted = render(emoji, background or v.unstated) if emoji else np.zeros_like(image)
        cells.append(np.concatenate([image, wanted], 0))  # [128, 64, 3]
    rows = -(-len(cells) // SHEET_COLUMNS)
    cells += [np.zeros_like(cells[0])] * (rows * SHEET_COLUMNS - len(cells))
    strips = [np.concatenate(cells[r * SHEET_COLUMNS : (r + 1) * SHEET_COLUMNS], 1) for r in range(rows)]
    picture = Image.fromarray(np.concatenate(strips, 0))
    picture.save(path)


def evaluate(pipeline: Any, n: int, guidance: float, steps: int = 20, seed: int = 0) -> dict[str, Any]:
    """Return accuracy over ``n`` prompts of seen pairs and ``n`` of held-out pairs; pictures and prompts come along."""
    result: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": steps, "n": n}
    for kind in ("seen", "held_out"):
        prompts = pair_prompts(n, kind == "held_out", seed + 1)
        images = generate(pipeline, prompts, guidance, steps, seed + 1000)
        found = prompt_accuracy(images, prompts)
        result[kind] = {k: round(found[k], 4) for k in ("emoji", "background", "distance")}
        result[f"{kind}_images"], result[f"{kind}_prompts"] = images, prompts
        result[f"{kind}_wrong"] = [
            (r["prompt"], *r["found"]) for r in found["per_prompt"] if not (r["emoji"] and r["background"])
        ]
    return result


def quick(pipeline: Any, path: Path, n: int = 32, guidance: float = 2.0) -> str:
    """Return a small evaluation during training: one line, and a sheet at ``path``."""
    found = evaluate(pipeline, n, guidance)
    images = np.concatenate([found["seen_images"], found["held_out_images"]])
    sheet(images, found["seen_prompts"] + found["held_out_prompts"], path)
    return f"seen {found['seen']} held-out {found['held_out']}"


def main() -> None:
    """Parse the command line, then write one JSON line for each guidance scale to stdout."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200, help="of each kind, seen and held-out")
    parser.add_argument("--guidance", type=float, nargs="+", help="default: what generation.json says")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG of the last guidance's pictures, seen then held-out")
    parser.add_argument("--wrong", action="store_true", help="list the prompts that came out wrong")
    options = parser.parse_args()
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(options.folder)
    scales = options.guidance or [json.loads((options.folder / "generation.json").read_text())["guidance_scale"]]
    for scale in scales:
        started = time.monotonic()
        found = evaluate(pipeline, options.prompts, scale, options.steps, options.seed)
        kept = {k: v for k, v in found.items() if not k.endswith(("_images", "_prompts", "_wrong"))}
        print(json.dumps({**kept, "seconds": round(time.monotonic() - started, 1)}), flush=True)
        if options.wrong:
            for row in found["seen_wrong"] + found["held_out_wrong"]:
                print(*row, sep=" | ", file=sys.stderr)
        if options.sheet:
            images = np.concatenate([found["seen_images"], found["held_out_images"]])
            sheet(images, found["seen_prompts"] + found["held_out_prompts"], options.sheet)


if __name__ == "__main__":
    main()
