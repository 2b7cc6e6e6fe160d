"""The command line: parses, calls a stage, prints its result. What a stage does is in :mod:`qdiff.stages`, what becomes of
errors in :mod:`qdiff.cli.main`.

stdout is the result (``--json``: one JSON object), stderr is progress and log. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qdiff.cli import text as present
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
    GuidanceScalesOption,
    HeightOption,
    JsonOption,
    KeepOption,
    ModelOption,
    PicturesOption,
    PlanOption,
    ProfileOption,
    PromptsOption,
    PsnrOption,
    RecipeOption,
    RevisionOption,
    RunArgument,
    RunOption,
    SamplesOption,
    SchedulerOption,
    SeedOption,
    SetOption,
    StepsOption,
    TimestepsOption,
    WeightsOption,
    WidthOption,
    scales_of,
)
from qdiff.errors import IntegrityError, UsageError
from qdiff.files import path_of

app = typer.Typer(
    name="qdiff",
    help="Quantize a diffusion model, export it, build its engine, and see that it makes the same pictures.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from qdiff.runs.versions import versions

        typer.echo(" ".join(f"{name}={version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _common(
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="no progress and no log")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="tracebacks and debug log")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="versions, and exit")
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("qdiff").setLevel(level)


def _show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    import json

    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text(result))


def _pairs(values: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for value in values or []:
        name, equals, setting = value.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {value!r} is not of the form name=value")
        pairs[name] = setting
    return pairs


@app.command()
def models(json: JsonOption = False) -> None:
    """List model families, their bundled weights and their full-size random configurations."""
    from qdiff import api

    _show(api.list_models(), json, present.models)


@app.command()
def calibrate(
    model: ModelOption = "pixart",
    weights: WeightsOption = "bundled",
    revision: RevisionOption = None,
    prompts: PromptsOption = None,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceScalesOption = None,
    scheduler: SchedulerOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    timesteps: TimestepsOption = "uniform",
    keep: KeepOption = 25,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
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
        revision=revision,
        samples=samples,
        steps=steps,
        guidance=None if guidance is None else scales_of(guidance),
        scheduler=scheduler,
        height=height,
        width=width,
        frames=frames,
        timesteps=timesteps,
        keep=keep,
        batch=batch,
        seed=seed,
    )
    _show(run.results["calibrate"], json, present.calibrate)


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
    _show(opened.results["quantize"], json, present.quantize)


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
    _show(opened.results["export"], json, present.export)


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
        flags=_pairs(flag, "--flag"),
        whole=whole,
        export_first=False,
        force=force,
        dry_run=dry_run,
    )
    _show(opened.results["build"], json, present.build)


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
    _show(opened.results["correct"], json, present.correct)


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
    _show(opened.results["generate"], json, present.generate)


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
    _show(opened.results["compare"], json, present.compare)


@app.command()
def report(run: RunArgument, json: JsonOption = False) -> None:
    """Write report.html and report.json from what the run folder holds.

    Example: qdiff report runs/pixart
    """
    from qdiff import api

    opened = api.open_run(run)
    api.write_report(opened)
    _show(opened.results["report"], json, present.report)


@app.command("run")
def run_all(
    model: ModelOption = "pixart",
    weights: WeightsOption = "bundled",
    revision: RevisionOption = None,
    prompts: PromptsOption = None,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceScalesOption = None,
    scheduler: SchedulerOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    timesteps: TimestepsOption = "uniform",
    keep: KeepOption = 25,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
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
        revision=revision,
        samples=samples,
        steps=steps,
        guidance=None if guidance is None else scales_of(guidance),
        scheduler=scheduler,
        height=height,
        width=width,
        frames=frames,
        timesteps=timesteps,
        keep=keep,
        batch=batch,
        seed=seed,
    )
    _show(run.results["run"], json, present.run)


@app.command()
def inspect(
    run: RunArgument,
    layers: Annotated[bool, typer.Option("--layers", help="every layer of the plan")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a run folder holds, and whether its files are unchanged.

    Example: qdiff inspect runs/pixart --layers
    """
    from qdiff import api

    result = api.inspect(run, layers=layers)
    _show(result, json, present.inspect)
    if result["changed"]:
        raise IntegrityError(f"{result['run']} is not as it was made: {result['changed'][0]}", result["fixes"][0])


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Show versions, hardware, and which engines can run or build here.

    Example: qdiff doctor
    """
    from qdiff import api

    _show(api.doctor(), json, present.doctor)


@app.command()
def demo(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]…", parser=path_of, help="run folders [default: those in runs/]"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback needs --auth")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    auth: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=path_of, help="file with lines name:password, only for its owner to read"),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PATH", parser=path_of, help="folder for runs built on the page")
    ] = Path("runs"),
    allow: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=WEIGHTS", help="may be built on the page too")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB for loaded engines [default: half the free]")
    ] = None,
) -> None:
    """Start the web page: generate, compare float with engines, inspect plans, build.

    Example: qdiff demo runs/pixart
    """
    from qdiff.app import server

    server.demo(runs or [], host, port, auth, output, allow or [], memory)
