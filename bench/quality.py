"""What each method of a recipe is worth, in pictures: PSNR against the float model with the same seeds.

    python -m bench.quality [--model pixart] [--pictures 64] [--json]

One calibration; then the same recipe with its methods switched on one after the other, each quantized, exported, built for
OpenVINO with float32 outside of INT8 (so that nothing but the plan differs) and compared on pictures that no variant was
calibrated on. The last rows are the recipe as it is, in both precisions of what is not quantized.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Rows of the table: name, --set overrides, OpenVINO's precision for unquantized layers.
SMOOTH = "methods.smooth.strengths=[0.3,0.4,0.5]"
SCALES = "methods.timestep_scales.minimum_gain_db=0.0"
VARIANTS: tuple[tuple[str, list[str], str], ...] = (
    ("round to nearest, linears only", ["methods={}", "quantize_outputs={}"], "f32"),
    ("+ smoothing search", ["methods={}", SMOOTH, "quantize_outputs={}"], "f32"),
    ("+ scales by timestep wherever they gain", ["methods={}", SMOOTH, SCALES, "quantize_outputs={}"], "f32"),
    ("+ range search", ["methods={}", SMOOTH, SCALES, "methods.clip={}", "quantize_outputs={}"], "f32"),
    ("scales by timestep alone", ["methods={}", SCALES, "quantize_outputs={}"], "f32"),
    (
        "smoothing searched up to 0.8",
        ["methods={}", "methods.smooth.strengths=[0.3,0.5,0.6,0.7,0.8]", "quantize_outputs={}"],
        "f32",
    ),
    ("the recipe, q k in float", ["quantize_outputs={}"], "f32"),
    ("the recipe", [], "f32"),
    ("the recipe, rest in bf16", [], "bf16"),
)


def variant(
    base: Path, name: str, overrides: list[str], precision: str, request: Any, floats: Any, work: Path
) -> dict[str, Any]:
    """Return one row: quantizes a copy of the calibrated run and makes the pictures."""
    from qdiff.evaluation.images import to_pixels
    from qdiff.evaluation.metrics import paired
    from qdiff.plan.plan import Plan
    from qdiff.runs.run import Run
    from qdiff.stages.build import build
    from qdiff.stages.compare import accuracy
    from qdiff.stages.export import export
    from qdiff.stages.generate import Session
    from qdiff.stages.quantize import quantize

    folder = work / name.replace(" ", "-")
    shutil.copytree(base, folder)
    run = Run(folder)
    quantize(run, "int8", overrides)
    export(run, "onnxruntime")
    build(run, "openvino", flags={"precision": precision})
    session = Session(run, "openvino")
    try:
        made = session.pictures(request, batch=8)
    finally:
        session.close()
    plan = Plan.load(run.file("plan.json"))
    quality = paired(to_pixels(floats.images), to_pixels(made.images))
    right = accuracy(session.model, made.images, list(request.prompts))
    shutil.rmtree(folder)
    return {
        "name": name,
        "psnr_db_mean": quality.psnr_db_mean,
        "psnr_db_min": quality.psnr_db_min,
        "ssim_mean": quality.ssim_mean,
        "emoji": right["emoji"] if right else None,
        "smoothed": sum(layer.smoothing is not None for layer in plan.quantized),
        "timestep_scales": sum(layer.timestep_scales for layer in plan.quantized),
        "clipped": sum(layer.clip < 1 for layer in plan.quantized),
        "layers": len(plan.quantized),
    }


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pixart")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from qdiff import device

    device.set_device(device.HOST)

    from qdiff.cli.text import table
    from qdiff.events import TerminalListener, listening
    from qdiff.models.model import default_prompts
    from qdiff.runs.run import Run
    from qdiff.stages.calibrate import CalibrateOptions, calibrate
    from qdiff.stages.compare import SEED_OFFSET, accuracy
    from qdiff.stages.generate import Session, make_request

    with listening(TerminalListener()), tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        run = Run(work / "base")
        calibrate(run, CalibrateOptions(model=arguments.model))
        request = make_request(run, default_prompts(arguments.pictures, SEED_OFFSET), seed=SEED_OFFSET)
        session = Session(run, "float")
        floats = session.pictures(request, batch=8)
        right = accuracy(session.model, floats.images, list(request.prompts))
        rows = [variant(run.path, *row, request, floats, work) for row in VARIANTS]
    if arguments.json:
        print(json.dumps({"pictures": arguments.pictures, "float": right, "rows": rows}, indent=2))
        return
    cells = [
        (
            row["name"],
            f"{row['psnr_db_mean']:.2f}",
            f"{row['psnr_db_min']:.2f}",
            f"{row['ssim_mean']:.4f}",
            "-" if row["emoji"] is None else f"{100 * row['emoji']:.1f} %",
            f"{row['smoothed']} / {row['timestep_scales']} / {row['clipped']} of {row['layers']}",
        )
        for row in rows
    ]
    print(table(cells, ("VARIANT", "PSNR dB", "WORST", "SSIM", "RIGHT EMOJI", "SMOOTHED / BY TIMESTEP / CUT")))
    if right is not None:
        print(f"float model: {100 * right['emoji']:.1f} % right emoji, {arguments.pictures} pictures")


if __name__ == "__main__":
    main()
