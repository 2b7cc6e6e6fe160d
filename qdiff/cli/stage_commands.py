"""The commands that do a stage of a run, and ``run``, which does all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qdiff.api.calibration import Calibration
from qdiff.cli import text as present
from qdiff.cli.app import app, show
from qdiff.cli.options import (
    AcceptOption,
    BatchOption,
    BudgetOption,
    CapabilityOption,
    DensityOption,
    DeviceOption,
    DryRunOption,
    EngineOption,
    ForceOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    ModelOption,
    PicturesOption,
    PlanOption,
    ProfileOption,
    PromptsOption,
    PsnrOption,
    RecipeOption,
    RunArgument,
    RunOption,
    SchedulerOption,
    SeedOption,
    SetOption,
    StepsOption,
    WeightsOption,
    WidthOption,
    pairs_of,
    with_calibration,
)
from qdiff.files import path_of


@app.command()
@with_calibration
def calibrate(
    model: ModelOption = "pixart",
    weights: WeightsOption = "bundled",
    prompts: PromptsOption = None,
    *,
    calibration: Calibration,
    attention: Annotated[
        bool, typer.Option("--attention", help="also look at self-attentions, for quantize --density")
    ] = False,
    output: RunOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Run the float model on prompts; record its trajectory and the statistics of its layers.

    Example: qdiff calibrate --model pixart --samples 32 -o runs/pixart
    """
    from qdiff import api

    run = api.calibrate(
        model,
        output=output,
        prompts=prompts,
        weights=weights,
        attention=attention,
        force=force,
        dry_run=dry_run,
        **calibration,
    )
    show(run.results["calibrate"], json, present.calibrate)


@app.command()
def quantize(
    run: RunArgument,
    recipe: RecipeOption = "int8",
    budget: BudgetOption = None,
    density: DensityOption = None,
    set: SetOption = None,
    plan: PlanOption = None,
    accept_quality: AcceptOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Decide formats, smoothing and scales for every layer; write plan.json and the packed checkpoint.

    Example: qdiff quantize runs/pixart --recipe int8
    """
    from qdiff import api

    opened = api.quantize(
        api.open_run(run),
        recipe,
        settings=set or (),
        budget=budget,
        density=density,
        plan=plan,
        accept_quality=accept_quality,
        force=force,
        dry_run=dry_run,
    )
    show(opened.results["quantize"], json, present.quantize)


@app.command()
def export(
    run: RunArgument,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="onnxruntime or tensorrt [default: both]")
    ] = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Write the ONNX graph for a target, and check what the file really holds.

    Example: qdiff export runs/pixart --target tensorrt
    """
    from qdiff import api

    opened = api.export(run, target or api.TARGETS, force=force, dry_run=dry_run)
    show(opened.results["export"], json, present.export)


@app.command()
def build(
    run: RunArgument,
    engine: EngineOption = None,
    profile: ProfileOption = None,
    compute_capability: CapabilityOption = None,
    flag: Annotated[
        list[str] | None, typer.Option("--flag", metavar="NAME=VALUE", help="setting of the backend")
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="also compute what follows from the prompt or the timestep alone at every step"),
    ] = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Build an engine from the exported graph. TensorRT-RTX engines are built without a GPU.

    Example: qdiff build runs/pixart --engine tensorrt_rtx --compute-capability 12.0
    """
    from qdiff import api

    opened = api.build(
        run,
        engine,
        profiles=profile,
        compute_capability=compute_capability,
        flags=pairs_of(flag, "--flag"),
        whole=whole,
        export_first=False,
        force=force,
        dry_run=dry_run,
    )
    show(opened.results["build"], json, present.build)


@app.command()
def correct(
    run: RunArgument,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="q_drift, ptqd, q_sched; several may be given [default: all]")
    ] = None,
    engine: EngineOption = None,
    goal: Annotated[
        Literal["float", "prompt"],
        typer.Option(help="judge pictures by the float model's, or by the nearest known ones"),
    ] = "float",
    pictures: PicturesOption = 16,
    force: ForceOption = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Correct the sampler's steps for what quantization does to predictions, where pictures gain by it.

    Example: qdiff correct runs/pixart --method q_drift --method ptqd
    """
    from qdiff import api

    opened = api.correct(run, method, engine=engine, goal=goal, pictures=pictures, force=force)
    show(opened.results["correct"], json, present.correct)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="what to show; may be given several times")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="PATH", parser=path_of, help="PNG or MP4 to write [default: out.png, out.mp4]"
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="what not to show")] = "",
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    scheduler: SchedulerOption = None,
    batch: BatchOption = 4,
    engine: EngineOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Make pictures with an engine of the run.

    Example: qdiff generate runs/pixart --prompt "a rocket on a blue background" --seed 7 -o rocket.png
    """
    from qdiff import api

    opened = api.open_run(run)
    api.generate(
        opened,
        prompt,
        output=output,
        engine=engine,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        seed=seed,
        height=height,
        width=width,
        frames=frames,
        scheduler=scheduler,
        batch=batch,
    )
    show(opened.results["generate"], json, present.generate)


@app.command()
def compare(
    run: RunArgument,
    engine: Annotated[list[str] | None, typer.Option("--engine", help="engines to compare with float")] = None,
    prompts: PromptsOption = None,
    pictures: PicturesOption = 16,
    seed: Annotated[int | None, typer.Option(help="first seed [default: far from calibration's]")] = None,
    min_psnr: PsnrOption = None,
    accept_quality: AcceptOption = False,
    force: ForceOption = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Make the same pictures with the float model and with engines, and measure how far they are apart.

    Example: qdiff compare runs/pixart --engine openvino --pictures 64 --min-psnr 30
    """
    from qdiff import api

    opened = api.compare(
        run,
        engine,
        prompts=prompts,
        pictures=pictures,
        seed=seed,
        minimum_psnr=min_psnr,
        accept_quality=accept_quality,
        force=force,
    )
    show(opened.results["compare"], json, present.compare)


@app.command()
def report(run: RunArgument, json: JsonOption = False) -> None:
    """Write report.html and report.json from what the run folder holds.

    Example: qdiff report runs/pixart
    """
    from qdiff import api

    opened = api.open_run(run)
    api.write_report(opened)
    show(opened.results["report"], json, present.report)


@app.command("run")
@with_calibration
def run_all(
    model: ModelOption = "pixart",
    weights: WeightsOption = "bundled",
    prompts: PromptsOption = None,
    *,
    calibration: Calibration,
    recipe: RecipeOption = "int8",
    budget: BudgetOption = None,
    density: DensityOption = None,
    set: SetOption = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="engines to build [default: all that can be]")
    ] = None,
    profile: ProfileOption = None,
    compute_capability: CapabilityOption = None,
    pictures: PicturesOption = 16,
    min_psnr: PsnrOption = None,
    accept_quality: AcceptOption = False,
    output: RunOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Do everything: calibrate, quantize, export, build, compare, report. Finished stages are skipped.

    Example: qdiff run --model pixart
    """
    from qdiff import api

    run = api.run_all(
        model,
        recipe,
        output=output,
        prompts=prompts,
        weights=weights,
        settings=set or (),
        budget=budget,
        density=density,
        engines=engine,
        profiles=profile,
        compute_capability=compute_capability,
        pictures=pictures,
        minimum_psnr=min_psnr,
        accept_quality=accept_quality,
        force=force,
        **calibration,
    )
    show(run.results["run"], json, present.run)
