"""Stage 1: run the user's pipeline on prompts, keep the trajectory, collect statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, UsageError, option
from qdiff.events import duration, log
from qdiff.files import sha256_json, write_text
from qdiff.runs.run import Run
from qdiff.stages.disk import SMALL_FILES, statistics_bytes, trajectory_bytes

if TYPE_CHECKING:
    from qdiff.calib.record import Recording
    from qdiff.models.model import Model

Later = Callable[["Model", int], int]
DEFAULT_SAMPLES, MOST_SAMPLES = 32, 10_000


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``qdiff calibrate`` takes. ``None`` means the model's own default. ``other_guidance`` are guidance scales besides the
    first, which later stages make their own pictures with: batches of prompts take turns at them.
    """

    model: str = "pixart"
    weights: str = "bundled"
    revision: str | None = None
    prompts: Path | tuple[str, ...] | None = None
    samples: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    timesteps: str = "uniform"
    keep: int = 25
    batch: int = 4
    seed: int = 0
    other_guidance: tuple[float, ...] = ()


def load_prompts(options: CalibrateOptions) -> list[str]:
    """Return the prompts of the file, or the default ones, cut to ``samples``."""
    from qdiff.calib.prompts import check_prompts, choose_prompts, read_prompts
    from qdiff.models import FAMILIES
    from qdiff.models.model import default_prompts

    if options.samples is not None and not 1 <= options.samples <= MOST_SAMPLES:
        raise UsageError(
            f"{option('samples', options.samples)} is not between 1 and {MOST_SAMPLES}", "16 to 128 are usual"
        )
    if options.prompts is None:
        return default_prompts(options.samples or DEFAULT_SAMPLES, options.seed, FAMILIES[options.model].media)
    texts = read_prompts(options.prompts) if isinstance(options.prompts, Path) else check_prompts(options.prompts)
    return choose_prompts(texts, options.samples)


def load_model(options: CalibrateOptions) -> Model:
    """Return the float model, with the scheduler and the size that were named."""
    from qdiff.models import FAMILIES

    model = FAMILIES[options.model].load(options.weights, revision=options.revision, seed=options.seed)
    model.use_scheduler(options.scheduler)
    model.use_size(options.height, options.width, options.frames)
    return model


def check_sampling(steps: int | None, guidance: float | None) -> None:
    """Refuse numbers that no sampler takes, before a model is loaded; ``None`` is the model's own.

    Raises:
        UsageError: with the range.
    """
    if steps is not None and not 1 <= steps <= 1000:
        raise UsageError(f"{option('steps', steps)} is not between 1 and 1000")
    if guidance is not None and not 0 <= guidance <= 100:  # NaN is not either
        raise UsageError(f"{option('guidance', guidance)} is not between 0 and 100")


def recording_of(options: CalibrateOptions, prompts: list[str]) -> Recording:
    """Return what will be recorded.

    Raises:
        UsageError: numbers out of range or an unknown timestep strategy.
    """
    from qdiff.calib.record import Recording
    from qdiff.calib.timesteps import STRATEGIES

    scales = () if options.guidance is None else (options.guidance, *options.other_guidance)
    for guidance in scales or (None,):
        check_sampling(options.steps, guidance)
    if len({guidance > 1 for guidance in scales}) > 1 or len(set(scales)) < len(scales):
        raise UsageError(
            f"{option('guidance', scales)} does not name a range of guidance scales",
            "name different ones, all above 1 (guided, two branches) or all at most 1 (not guided)",
        )
    for name, value in (("keep", options.keep), ("batch", options.batch)):
        if not 1 <= value <= 1000:
            raise UsageError(f"{option(name, value)} is not between 1 and 1000")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"{option('seed', options.seed)} is not between 0 and 2^32")
    STRATEGIES[options.timesteps]
    if -(-len(prompts) // options.batch) < len(scales):
        raise UsageError(
            f"{len(prompts)} prompts in batches of {options.batch} are fewer batches than guidance scales ({len(scales)})",
            f"a batch has one guidance scale: take more prompts ({option('samples')}), or smaller batches ({option('batch')})",
        )
    return Recording(
        prompts,
        options.seed,
        options.steps,
        options.guidance,
        options.scheduler,
        options.timesteps,
        options.keep,
        options.batch,
        options.other_guidance,
    )


def calibrate(
    run: Run, options: CalibrateOptions, *, force: bool = False, dry_run: bool = False, later: Later | None = None
) -> dict[str, Any]:
    """Write ``calibration/`` into the run folder; see the module's docstring for the order of things.

    Args:
        run: its folder gets the files.
        options: of the calibration.
        force: record anew what is there.
        dry_run: record nothing; return the estimate.
        later: bytes on disk that stages after this one need, of the model and the bytes of its trajectory.

    Returns:
        JSON facts: where, how much was recorded, and the estimate that was made before it began.
    """
    from qdiff.models import FAMILIES
    from qdiff.models.sizes import check_frames

    check_frames(FAMILIES[options.model], options.frames)
    prompts = load_prompts(options)
    recording = recording_of(options, prompts)
    folder = run.file("calibration")
    if not dry_run:
        run.require_writable("calibration")
    model = load_model(options if force else _at_recorded_commit(run, options))
    inputs = {
        "model": options.model,
        "weights": model.weights,
        "fingerprint": model.fingerprint,
        "note": model.note,
        "prompts": {"count": len(prompts), "sha256": sha256_json(prompts)},
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "scheduler": options.scheduler,
        "height": options.height,
        "width": options.width,
        "frames": options.frames,
        "timesteps": options.timesteps,
        "keep": options.keep,
        "batch": options.batch,
    }
    if options.other_guidance:
        inputs["other_guidance"] = list(options.other_guidance)
    if model.revision is not None:
        inputs["revision"] = model.revision
    if model.variants:
        inputs["variants"] = model.variants
    if dry_run:
        return {"dry_run": True, "run": str(run.path), **inputs, **_estimate(model, recording)}
    if "calibrate" not in run.manifest["stages"] and folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"{folder} holds files that this run did not make",
            f"choose another folder with {option('output')}, or move them away",
        )
    with run.stage("calibrate", inputs, force=force, leftovers=["calibration"]) as work:
        if work is not None:
            _work(model, recording, folder, prompts, work, later)
    return {"run": str(run.path), "id": run.id, "note": model.note, **_summary(run)}


def _at_recorded_commit(run: Run, options: CalibrateOptions) -> CalibrateOptions:
    """Return the options, with the commit that this run was begun with where the same id is given without one: what the
    Hub calls ``main`` may have moved since.
    """
    recorded = run.manifest["stages"].get("calibrate", {}).get("inputs", {})
    if options.revision is None and recorded.get("weights") == options.weights and "revision" in recorded:
        return replace(options, revision=recorded["revision"])
    return options


def _work(model: Model, recording: Recording, folder: Path, prompts: list[str], work: Any, later: Later | None) -> None:
    from qdiff.calib.collect import PARTIAL, Collector
    from qdiff.calib.record import record
    from qdiff.recording.trajectory import Trajectory
    from qdiff.resources import require_disk

    estimate = _estimate(model, recording)
    log.info("%s", model.note)
    log.info(
        "calibrate: %d prompts, %d steps, about %s%s",
        len(prompts),
        estimate["steps"],
        duration(estimate["seconds"]),
        " less what an earlier try has done" if work.resumed else "",
    )
    require_disk(folder, estimate["bytes"] + SMALL_FILES, "the calibration (trajectory and statistics)")
    if later is not None:
        needed = estimate["bytes"] + later(model, estimate["trajectory_bytes"])
        require_disk(folder, needed, "the whole run (calibration, checkpoint, graphs, engines and pictures)")
    write_text(work.output(folder / "prompts.txt"), "\n".join(prompts) + "\n")
    owner = sha256_json(work.inputs)
    for path in record(model, recording, folder, owner):
        work.output(path)
    collector = Collector(model, Trajectory(folder, model.device), owner)
    statistics = collector.collect(folder / PARTIAL)
    statistics.save(work.output(folder / "statistics.safetensors"))
    (folder / PARTIAL).unlink(missing_ok=True)
    work.fact(
        estimate=estimate,
        device=str(model.device),
        pixels_per_cell=model.pixels_per_cell,
        timesteps=statistics.timesteps,
        shapes={name: list(tensor.shape) for name, tensor in next(iter(collector.trajectory)).inputs.items()},
        groups=len(statistics.inputs),
        layers=sum(len(entry.layers) for entry in statistics.inputs.values()),
    )


def _estimate(model: Model, recording: Recording) -> dict[str, Any]:
    """Return the estimated seconds and bytes, from one timed call of the backbone: it is called once to record and once
    to collect.
    """
    from qdiff.calib.record import seconds_per_call

    seconds, latent_bytes = seconds_per_call(model, recording)
    apart = model.calls_per_step(recording.guidance)
    steps = model.calls_of_a_picture(recording.steps, recording.guidance, recording.scheduler) // apart
    calls = apart * recording.shards * (steps + min(steps, recording.keep if recording.strategy != "all" else steps))
    return {
        "steps": steps,
        "seconds_per_call": round(seconds, 4),
        "seconds": round(seconds * calls, 1),
        "bytes": trajectory_bytes(model, recording, latent_bytes) + statistics_bytes(model, recording),
        "trajectory_bytes": trajectory_bytes(model, recording, latent_bytes),
    }


def _summary(run: Run) -> dict[str, Any]:
    entry = run.entry("calibrate")
    return {
        "prompts": entry["inputs"]["prompts"]["count"],
        "timesteps": len(entry["timesteps"]),
        "layers": entry["layers"],
        "groups": entry["groups"],
        "seconds": entry["seconds"],
        "peak_memory_bytes": entry["peak_memory_bytes"],
    }
