"""The stages as Python functions. Each takes a run folder (or what a run begins with) and returns a :class:`~qdiff.runs.run.Run`.

The facts that a stage found (sizes, seconds, PSNR) are in ``run.results`` under the stage's name, as JSON values: what the
command line prints. Everything else is in the files of the run folder. Finished stages are skipped, as on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from qdiff.api.arguments import checked
from qdiff.api.calibration import Calibration, calibrate, calibration_options
from qdiff.api.progress import Progress, reporting
from qdiff.api.run import RunOrPath, open_run, working
from qdiff.api.source import begin
from qdiff.errors import UsageError
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TARGETS = ("onnxruntime", "tensorrt")


@checked
def quantize(
    source: RunOrPath | DiffusionPipeline,
    recipe: Path | str = "int8",
    *,
    prompts: Sequence[str] | Path | None = None,
    output: Path | str | None = None,
    weights: Path | str | None = None,
    settings: Sequence[str] = (),
    budget: str | None = None,
    density: float | None = None,
    plan: Path | str | None = None,
    accept_quality: bool = False,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    progress: Progress = None,
    **options: Unpack[Calibration],
) -> Run:
    """Decide formats and methods for every layer; write the plan and the packed checkpoint.

    A model is calibrated first; a run folder has been.

    Args:
        source: a run, its folder, or what :func:`calibrate` takes.
        recipe: name of a built-in recipe, or path of a YAML file.
        prompts: of the calibration; see :func:`calibrate`.
        output: of the calibration; see :func:`calibrate`.
        weights: of the calibration; see :func:`calibrate`.
        settings: entries of the recipe to change, each ``"a.b=value"``.
        budget: ``"bits=5.5"``, ``"bytes=4000000"`` or ``"latency=MILLISECONDS"`` of recipes that choose formats.
        density: share of the blocks that self-attentions read.
        plan: a plan whose decisions are taken in place of a recipe's.
        accept_quality: whether a prediction below the recipe's floor is no error.
        force: see :func:`calibrate`.
        dry_run: whether only an estimate is made: of the calibration, where the run has none yet.
        device: see :func:`calibrate`.
        progress: see :func:`calibrate`.
        options: of the calibration; see :func:`calibrate`.

    Returns:
        the run, with ``run.results["quantize"]``.

    Raises:
        UsageError: an option that is not the recipe's, or options of a calibration for a run that has one.
        InputError: a recipe or plan that cannot be carried out.
        QualityGateError: the prediction at a recorded step is below the recipe's floor.
    """
    from qdiff.runs import manifest
    from qdiff.stages import quantize as stage
    from qdiff.stages.decisions import read_recipe

    overrides = recipe_changes(settings, budget, density)
    if isinstance(source, Run) or (isinstance(source, str | Path) and manifest.is_there(Path(source))):
        if prompts is not None or output is not None or weights is not None or options:
            raise UsageError(
                f"{source if not isinstance(source, Run) else source.path} is calibrated already",
                "leave the options of a calibration out, or name a model",
            )
        run = open_run(source)
    else:
        if plan is None:
            read_recipe(str(recipe), overrides)  # refuses a wrong one before anything is calibrated
        run = calibrate(
            source,
            output=output,
            prompts=prompts,
            weights=weights,
            attention=density is not None,
            dry_run=dry_run,
            device=device,
            progress=progress,
            **options,
        )
        if dry_run:
            return run
    with working(device, progress):
        run.results["quantize"] = stage.quantize(
            run,
            str(recipe),
            overrides,
            plan_file=None if plan is None else Path(plan),
            force=force,
            dry_run=dry_run,
            accept_quality=accept_quality,
        )
    return run


@checked
def export(
    run: RunOrPath,
    target: str | Sequence[str] = TARGETS,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
) -> Run:
    """Write the ONNX graph for one target or several, and check what the files really hold.

    Args:
        run: with a finished quantization.
        target: ``"onnxruntime"``, ``"tensorrt"`` (also for OpenVINO), or several.
        force: see :func:`calibrate`.
        dry_run: see :func:`calibrate`.
        progress: see :func:`calibrate`.

    Returns:
        the run, with a list of one result for each target in ``run.results["export"]``.

    Raises:
        InputError: a format that a target cannot run; names the layer.
        MissingDependencyError: onnx is not installed.
    """
    from qdiff.stages import export as stage

    run = open_run(run)
    with reporting(progress):
        names = [target] if isinstance(target, str) else target
        run.results["export"] = [stage.export(run, name, force=force, dry_run=dry_run) for name in names]
    return run


@checked
def build(
    run: RunOrPath,
    engine: str | None = None,
    *,
    profiles: Sequence[str] | None = None,
    compute_capability: str | None = None,
    flags: Mapping[str, str] | None = None,
    whole: bool = False,
    export_first: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
) -> Run:
    """Build an engine from the exported graph of its target.

    Args:
        run: with a finished quantization.
        engine: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt_rtx"`` or ``"tensorrt"``; ``None``: the fastest that can be built.
        profiles: ranges of input sizes of TensorRT engines, such as ``"512"`` or ``"dyn-256-1024"``.
        compute_capability: of the GPU that a TensorRT-RTX engine is for, such as ``"12.0"``.
        flags: settings of the backend by name.
        whole: whether one engine computes everything at every step.
        export_first: whether the graph is exported where the run does not hold it yet.
        force: see :func:`calibrate`.
        dry_run: see :func:`calibrate`.
        progress: see :func:`calibrate`.

    Returns:
        the run, with ``run.results["build"]``.

    Raises:
        InputError: the graph is not there and ``export_first`` is not set, or the backend refuses it.
        MissingDependencyError: what building needs is not there.
    """
    from qdiff.engines import choose_engine
    from qdiff.stages import build as stage

    run = open_run(run)
    with reporting(progress):
        target = choose_engine(engine).target
        if export_first and target is not None and not run.done(f"export:{target}"):
            export(run, target, dry_run=dry_run, progress=progress)
        run.results["build"] = stage.build(
            run,
            engine,
            profiles=None if profiles is None else list(profiles),
            compute_capability=compute_capability,
            flags=flags,
            whole=whole,
            force=force,
            dry_run=dry_run,
        )
    return run


@checked
def run_all(
    source: DiffusionPipeline | Path | str = "pixart",
    recipe: Path | str = "int8",
    *,
    output: Path | str | None = None,
    prompts: Sequence[str] | Path | None = None,
    weights: Path | str | None = None,
    settings: Sequence[str] = (),
    budget: str | None = None,
    density: float | None = None,
    engines: Sequence[str] | None = None,
    profiles: Sequence[str] | None = None,
    compute_capability: str | None = None,
    pictures: int = 16,
    minimum_psnr: float | None = None,
    accept_quality: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: Progress = None,
    **options: Unpack[Calibration],
) -> Run:
    """Calibrate, quantize, export, build, compare and report.

    Args:
        source: see :func:`calibrate`.
        recipe: see :func:`quantize`.
        output: see :func:`calibrate`.
        prompts: see :func:`calibrate`.
        weights: see :func:`calibrate`.
        settings: see :func:`quantize`.
        budget: see :func:`quantize`.
        density: see :func:`quantize`.
        engines: names; ``None``: all that can be built here.
        profiles: see :func:`build`.
        compute_capability: see :func:`build`.
        pictures: see :func:`compare`.
        minimum_psnr: see :func:`compare`.
        accept_quality: see :func:`quantize`.
        force: see :func:`calibrate`.
        device: see :func:`calibrate`.
        progress: see :func:`calibrate`.
        options: see :func:`calibrate`.

    Returns:
        the run, with ``run.results["run"]``.
    """
    from qdiff.stages import run as stage

    overrides = recipe_changes(settings, budget, density)
    with working(device, progress):
        chosen, run = begin(source, output, revision=options.get("revision"), weights=weights, force=force)
        run.results["run"] = stage.run_all(
            run,
            calibration_options(chosen.model, chosen.weights, prompts, options),
            str(recipe),
            overrides,
            None if engines is None else list(engines),
            compute_capability=compute_capability,
            profiles=None if profiles is None else list(profiles),
            pictures=pictures,
            minimum_psnr=minimum_psnr,
            accept_quality=accept_quality,
            force=force,
        )
    return run


@checked
def inspect(run: RunOrPath, *, layers: bool = False) -> dict[str, Any]:
    """Return what a run folder holds, as JSON values, and whether its files are unchanged.

    Args:
        run: a run or its folder.
        layers: whether every layer of the plan is listed.
    """
    from qdiff.stages import inspection

    return inspection.inspect(open_run(run), layers=layers)


def doctor() -> dict[str, Any]:
    """Return versions, hardware, and which engines can run or build here, as JSON values."""
    from qdiff.stages import inspection

    return inspection.doctor()


def list_models() -> list[dict[str, Any]]:
    """Return the model families, their bundled weights and their full-size random configurations, as JSON values."""
    from qdiff.stages import inspection

    return inspection.models()


def recipe_changes(settings: Sequence[str], budget: str | None, density: float | None) -> list[str] | None:
    """Return changes of a recipe's entries, with those that a budget and a density are short for; ``None``: no change."""
    from qdiff.recipes import budget_override, density_override

    short = [] if budget is None else [budget_override(budget)]
    short += [] if density is None else [density_override(density)]
    return [*settings, *short] or None
