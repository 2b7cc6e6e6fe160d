"""The stages that make pictures with the engines of a run: generate, compare, correct, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qdiff.api.arguments import checked
from qdiff.api.progress import Progress
from qdiff.api.run import RunOrPath, open_run, working
from qdiff.runs.run import Run


@checked
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
    with working(device, progress):
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


@checked
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
    with working(device, progress):
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


@checked
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
    with working(device, progress):
        run.results["correct"] = stage.correct(
            run, None if methods is None else list(methods), engine=engine, goal=goal, pictures=pictures, force=force
        )
    return run


@checked
def write_report(run: RunOrPath) -> Path:
    """Write ``report.html`` and ``report.json`` from what the run folder holds; return the path of the page."""
    from qdiff.stages import report as stage

    run = open_run(run)
    run.results["report"] = stage.report(run)
    return Path(run.results["report"]["html"])
