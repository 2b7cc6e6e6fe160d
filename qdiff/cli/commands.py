"""The command line: parses, calls a stage, prints its result. What a stage does is in :mod:`qdiff.stages`, what becomes of
errors in :mod:`qdiff.cli.main`.

stdout is the result (``--json``: one JSON object), stderr is progress and log. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

if TYPE_CHECKING:
    from qdiff.runs.run import Run
    from qdiff.stages.calibrate import CalibrateOptions

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
        from qdiff.runs.run import versions

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


def _open(path: Path) -> Run:
    from qdiff.runs.run import Run

    return Run.existing(path)


def _overrides(given: list[str] | None, budget: str | None, density: float | None) -> list[str] | None:
    """Return ``--set`` with ``--budget`` and ``--density``, which are short forms of one."""
    from qdiff.recipes import budget_override, density_override

    short = [] if budget is None else [budget_override(budget)]
    short += [] if density is None else [density_override(density)]
    return [*(given or []), *short] if short else given


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
    from qdiff.stages import inspection

    _show(inspection.models(), json, present.models)


def _calibrate_options(given: dict[str, Any]) -> CalibrateOptions:
    """Return those of a command's parameters that a calibration takes."""
    from qdiff.stages.calibrate import CalibrateOptions

    first, *others = [None] if given["guidance"] is None else scales_of(given["guidance"])
    given = {**given, "guidance": first, "other_guidance": tuple(others)}
    return CalibrateOptions(**{field.name: given[field.name] for field in dataclasses.fields(CalibrateOptions)})


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
    options = _calibrate_options(locals())
    from qdiff.runs.run import Run
    from qdiff.stages import calibrate as stage

    run = Run(output or Path("runs") / model)
    if attention:
        from qdiff.stages.attention import require_sparse

        require_sparse(model)
    result = stage.calibrate(run, options, force=force, dry_run=dry_run)
    if attention and not dry_run:
        from qdiff.stages.attention import calibrate_attention

        result["attention"] = calibrate_attention(run, force=force)
    _show(result, json, present.calibrate)


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
    from qdiff.stages import quantize as stage

    overrides = _overrides(set, budget, density)
    result = stage.quantize(
        _open(run), recipe, overrides, plan_file=plan, force=force, dry_run=dry_run, accept_quality=accept_quality
    )
    _show(result, json, present.quantize)


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
    from qdiff.stages import export as stage

    folder = _open(run)
    results = [
        stage.export(folder, name, force=force, dry_run=dry_run) for name in target or ["onnxruntime", "tensorrt"]
    ]
    _show(results, json, present.export)


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
    from qdiff.stages import build as stage

    result = stage.build(
        _open(run),
        engine,
        profiles=profile,
        compute_capability=compute_capability,
        flags=_pairs(flag, "--flag"),
        whole=whole,
        force=force,
        dry_run=dry_run,
    )
    _show(result, json, present.build)


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
    from qdiff.stages import correct as stage

    result = stage.correct(_open(run), method, engine=engine, goal=goal, pictures=pictures, force=force)
    _show(result, json, present.correct)


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
    from qdiff.stages import generate as stage

    folder = _open(run)
    request = stage.make_request(
        folder,
        prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        seed=seed,
        height=height,
        width=width,
        scheduler=scheduler,
        frames=frames,
    )
    output = output or stage.default_output(folder)
    _show(stage.generate(folder, request, engine, output, batch), json, present.generate)


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
    from qdiff.calib.prompts import read_prompts
    from qdiff.stages import compare as stage

    texts = read_prompts(prompts) if prompts else None
    result = stage.compare(
        _open(run),
        engines=engine,
        prompts=texts,
        pictures=pictures,
        seed=seed,
        minimum_psnr=min_psnr,
        accept_quality=accept_quality,
        force=force,
    )
    _show(result, json, present.compare)


@app.command()
def report(run: RunArgument, json: JsonOption = False) -> None:
    """Write report.html and report.json from what the run folder holds.

    Example: qdiff report runs/pixart
    """
    from qdiff.stages import report as stage

    _show(stage.report(_open(run)), json, present.report)


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
    options = _calibrate_options(locals())
    from qdiff.runs.run import Run
    from qdiff.stages import run as stage

    result = stage.run_all(
        Run(output or Path("runs") / model),
        options,
        recipe,
        _overrides(set, budget, density),
        engine,
        compute_capability=compute_capability,
        profiles=profile,
        pictures=pictures,
        minimum_psnr=min_psnr,
        accept_quality=accept_quality,
        force=force,
    )
    _show(result, json, present.run)


@app.command()
def inspect(
    run: RunArgument,
    layers: Annotated[bool, typer.Option("--layers", help="every layer of the plan")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a run folder holds, and whether its files are unchanged.

    Example: qdiff inspect runs/pixart --layers
    """
    from qdiff.stages import inspection

    result = inspection.inspect(_open(run), layers=layers)
    _show(result, json, present.inspect)
    if result["changed"]:
        raise IntegrityError(f"{result['run']} is not as it was made: {result['changed'][0]}", result["fixes"][0])


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Show versions, hardware, and which engines can run or build here.

    Example: qdiff doctor
    """
    from qdiff.stages import inspection

    _show(inspection.doctor(), json, present.doctor)


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
