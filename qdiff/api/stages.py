"""The stages as Python functions. Each takes a run folder (or what a run begins with) and returns a :class:`~qdiff.runs.run.Run`.

The facts that a stage found (sizes, seconds, PSNR) are in ``run.results`` under the stage's name, as JSON values: what the
command line prints. Everything else is in the files of the run folder. Finished stages are skipped, as on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from qdiff.api.progress import Progress, reporting
from qdiff.api.source import source_of
from qdiff.errors import UsageError
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from qdiff.stages.calibrate import CalibrateOptions

RunOrPath = Run | Path | str
TARGETS = ("onnxruntime", "tensorrt")


class Calibration(TypedDict, total=False):
    """Options of a calibration; what is left out is the model's own default.

    Keys:
        revision: commit, tag or branch of a Hub id.
        samples: how many prompts are taken.
        steps: denoising steps.
        guidance: guidance scale, or several that batches of prompts take turns at.
        scheduler: ``"dpmsolver++"`` … or a diffusers class name.
        height, width: in pixels.
        frames: of a clip.
        timesteps: which steps are recorded: ``"uniform"``, ``"normal"`` or ``"all"``.
        keep: how many steps of a trajectory are recorded.
        batch: prompts that are denoised together.
        seed: picture i starts from the noise of ``seed + i``.
    """

    revision: str | None
    samples: int | None
    steps: int | None
    guidance: float | Sequence[float] | None
    scheduler: str | None
    height: int | None
    width: int | None
    frames: int | None
    timesteps: str
    keep: int
    batch: int
    seed: int


def open_run(run: RunOrPath) -> Run:
    """Return the run of a folder that has to be there; a :class:`~qdiff.runs.run.Run` is returned as it is.

    Raises:
        InputError: the folder is no run folder.
    """
    return run if isinstance(run, Run) else Run.existing(run)


def calibrate(
    source: DiffusionPipeline | Path | str = "pixart",
    *,
    output: Path | str | None = None,
    prompts: Sequence[str] | Path | None = None,
    weights: Path | str | None = None,
    attention: bool = False,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    progress: Progress = None,
    **options: Unpack[Calibration],
) -> Run:
    """Run the float model on prompts; record its trajectory and the statistics of its layers.

    Args:
        source: a diffusers pipeline, a folder, a Hub id, or the name of a bundled model.
        output: the run folder; ``None``: ``runs/MODEL``.
        prompts: texts, or a UTF-8 file with one a line; ``None``: those of the kind that the bundled models know.
        weights: for a pipeline object, where its weights are (it is saved into the run folder otherwise); for a family's name,
            the weights in the place of the bundled ones.
        attention: whether self-attentions are looked at too, for :func:`quantize` with a density.
        force: whether a finished calibration is made anew.
        dry_run: whether only an estimate is made.
        device: where torch computes.
        progress: see :data:`qdiff.api.progress.Progress`.
        options: see :class:`Calibration`.

    Returns:
        the run, with ``run.results["calibrate"]``.

    Raises:
        UsageError: an option out of range.
        InputError: a model that cannot be loaded, or a folder that another model was calibrated in.
    """
    from qdiff.stages import calibrate as stage

    folder = Path(output) if output is not None else None
    with _working(device, progress):
        chosen = source_of(
            source, folder or Path("runs") / "pipeline", revision=options.get("revision"), weights=weights
        )
        run = Run(folder or Path("runs") / chosen.model)
        if attention:
            from qdiff.stages.attention import require_sparse

            require_sparse(chosen.model)
        settings = calibration_options(chosen.model, chosen.weights, prompts, options)
        result = stage.calibrate(run, settings, force=force, dry_run=dry_run)
        if attention and not dry_run:
            from qdiff.stages.attention import calibrate_attention

            result["attention"] = calibrate_attention(run, force=force)
    run.results["calibrate"] = result
    return run


def calibration_options(
    model: str, weights: str, prompts: Sequence[str] | Path | None, options: Calibration
) -> CalibrateOptions:
    """Return the options of the stage. Of several guidance scales the first is the calibration's own.

    Raises:
        UsageError: an option that there is not.
    """
    from dataclasses import fields

    from qdiff.stages.calibrate import CalibrateOptions

    unknown = set(options) - {field.name for field in fields(CalibrateOptions)}
    if unknown:
        raise UsageError(
            f"calibration has no option {min(unknown)!r}", f"known: {', '.join(Calibration.__annotations__)}"
        )
    guidance = options.get("guidance")
    first, *others = guidance if isinstance(guidance, Sequence) else [guidance]
    settings: dict[str, Any] = {**options, "guidance": first, "other_guidance": tuple(others)}
    texts = prompts if isinstance(prompts, Path) or prompts is None else tuple(prompts)
    return CalibrateOptions(model=model, weights=weights, prompts=texts, **settings)


def quantize(
    source: RunOrPath | DiffusionPipeline,
    recipe: str = "int8",
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
        dry_run: see :func:`calibrate`.
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

    if isinstance(source, Run) or (isinstance(source, str | Path) and manifest.is_there(Path(source))):
        if prompts is not None or output is not None or weights is not None or options:
            raise UsageError(
                f"{source if not isinstance(source, Run) else source.path} is calibrated already",
                "leave the options of a calibration out, or name a model",
            )
        run = open_run(source)
    else:
        run = calibrate(
            source,
            output=output,
            prompts=prompts,
            weights=weights,
            attention=density is not None,
            device=device,
            progress=progress,
            **options,
        )
    overrides = _overrides(settings, budget, density)
    with _working(device, progress):
        run.results["quantize"] = stage.quantize(
            run,
            recipe,
            overrides,
            plan_file=None if plan is None else Path(plan),
            force=force,
            dry_run=dry_run,
            accept_quality=accept_quality,
        )
    return run


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
        profiles: ranges of input sizes of TensorRT engines, as ``--profile`` takes them.
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
            export(run, target, dry_run=dry_run)
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


def correct(
    run: RunOrPath,
    methods: Sequence[str] | None = None,
    *,
    engine: str | None = None,
    goal: Literal["float", "prompt"] = "float",
    pictures: int = 16,
    force: bool = False,
    device: str | None = None,
    progress: Progress = None,
) -> Run:
    """Correct the sampler's steps for what quantization does to predictions, where pictures gain by it.

    Args:
        run: with a built engine.
        methods: ``"q_drift"``, ``"ptqd"``, ``"q_sched"``; ``None``: all.
        engine: whose predictions are corrected; ``None``: the fastest.
        goal: whether pictures are judged by the float model's, or by the nearest known ones.
        pictures: how many are made to judge.
        force: see :func:`calibrate`.
        device: see :func:`calibrate`.
        progress: see :func:`calibrate`.

    Returns:
        the run, with ``run.results["correct"]``.
    """
    from qdiff.stages import correct as stage

    run = open_run(run)
    with _working(device, progress):
        run.results["correct"] = stage.correct(
            run, None if methods is None else list(methods), engine=engine, goal=goal, pictures=pictures, force=force
        )
    return run


def generate(
    run: RunOrPath,
    prompt: str | Sequence[str],
    *,
    output: Path | str | None = None,
    engine: str | None = None,
    negative_prompt: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    scheduler: str | None = None,
    batch: int = 4,
    device: str | None = None,
    progress: Progress = None,
) -> list[Path]:
    """Make pictures or clips with an engine of the run and write them as PNG or MP4, with their settings inside.

    For pictures in memory take :func:`qdiff.load_pipeline`.

    Args:
        run: with a built engine.
        prompt: one text or several.
        output: file to write, several get numbers; ``None``: ``out.png`` or ``out.mp4``.
        engine: ``None``: the fastest that is there.
        negative_prompt: what is not to be seen.
        steps: as calibrated where ``None``.
        guidance: as calibrated where ``None``.
        seed: picture i starts from the noise of ``seed + i``.
        height: as calibrated where ``None``.
        width: as calibrated where ``None``.
        frames: as calibrated where ``None``.
        scheduler: as calibrated where ``None``.
        batch: pictures that are denoised together.
        device: see :func:`calibrate`.
        progress: see :func:`calibrate`.

    Returns:
        the written files; ``run.results["generate"]`` says more.

    Raises:
        UsageError: a value out of range, or a path that cannot be written.
    """
    from qdiff.stages import generate as stage

    run = open_run(run)
    with _working(device, progress):
        request = stage.make_request(
            run,
            [prompt] if isinstance(prompt, str) else list(prompt),
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            seed=seed,
            height=height,
            width=width,
            scheduler=scheduler,
            frames=frames,
        )
        path = stage.default_output(run) if output is None else Path(output)
        run.results["generate"] = stage.generate(run, request, engine, path, batch)
    return [Path(name) for name in run.results["generate"]["images"]]


def compare(
    run: RunOrPath,
    engines: Sequence[str] | None = None,
    *,
    prompts: Sequence[str] | Path | None = None,
    pictures: int = 16,
    seed: int | None = None,
    minimum_psnr: float | None = None,
    accept_quality: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: Progress = None,
) -> Run:
    """Make the same pictures with the float model and with engines, and measure how far they are apart.

    Args:
        run: with built engines.
        engines: names; ``None``: the fastest that is there.
        prompts: texts, or a UTF-8 file with one a line; ``None``: those of the calibration's kind.
        pictures: how many.
        seed: the first; ``None``: far from the calibration's.
        minimum_psnr: in dB, of every engine's mean.
        accept_quality: whether pictures below the recipe's floor are no error.
        force: see :func:`calibrate`.
        device: see :func:`calibrate`.
        progress: see :func:`calibrate`.

    Returns:
        the run, with ``run.results["compare"]``.

    Raises:
        QualityGateError: pictures below ``minimum_psnr`` or the recipe's floor.
    """
    from qdiff.calib.prompts import check_prompts, read_prompts
    from qdiff.stages import compare as stage

    texts = read_prompts(prompts) if isinstance(prompts, Path) else None if prompts is None else check_prompts(prompts)
    run = open_run(run)
    with _working(device, progress):
        run.results["compare"] = stage.compare(
            run,
            engines=None if engines is None else list(engines),
            prompts=texts,
            pictures=pictures,
            seed=seed,
            minimum_psnr=minimum_psnr,
            accept_quality=accept_quality,
            force=force,
        )
    return run


def write_report(run: RunOrPath) -> Path:
    """Write ``report.html`` and ``report.json`` from what the run folder holds; return the path of the page."""
    from qdiff.stages import report as stage

    run = open_run(run)
    run.results["report"] = stage.report(run)
    return Path(run.results["report"]["html"])


def run_all(
    source: DiffusionPipeline | Path | str = "pixart",
    recipe: str = "int8",
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

    folder = Path(output) if output is not None else None
    overrides = _overrides(settings, budget, density)
    with _working(device, progress):
        chosen = source_of(
            source, folder or Path("runs") / "pipeline", revision=options.get("revision"), weights=weights
        )
        run = Run(folder or Path("runs") / chosen.model)
        run.results["run"] = stage.run_all(
            run,
            calibration_options(chosen.model, chosen.weights, prompts, options),
            recipe,
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


def _overrides(settings: Sequence[str], budget: str | None, density: float | None) -> list[str] | None:
    """Return changes of a recipe's entries, with those that a budget and a density are short for; ``None``: no change."""
    from qdiff.recipes import budget_override, density_override

    short = [] if budget is None else [budget_override(budget)]
    short += [] if density is None else [density_override(density)]
    return [*settings, *short] or None


@contextmanager
def _working(device: str | None, progress: Progress) -> Iterator[None]:
    """Compute on a device and report progress inside the block."""
    if device is not None:
        from qdiff.device import set_device

        set_device(device)
    with reporting(progress):
        yield
