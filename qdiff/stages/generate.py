"""Making pictures: diffusers' pipeline with an engine in the backbone's place."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import UsageError, command, option
from qdiff.events import Progress, log
from qdiff.files import require_writable
from qdiff.resources import measure_usage, release_memory
from qdiff.runs.run import Run
from qdiff.stages.build import beside, default_engine, load_runner
from qdiff.stages.calibrate import check_sampling
from qdiff.stages.calibrated_model import guidance_range, options_of, reload_model

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from qdiff.correction import Correction
    from qdiff.engines import Runner
    from qdiff.engines.recorder import CallRecorder
    from qdiff.evaluation.video import Clip
    from qdiff.models.model import Model, Request, StepCallback

CORRECTION = "correction.json"  # of the trajectory, where the stage `correct` was done
LONGEST_PROMPT = 2_000
MOST_PICTURES = 256


@dataclass
class Pictures:
    """What one engine made: pictures in the request's order, seconds of the backbone in every step, memory that it added."""

    engine: str
    images: list[Image | Clip]
    step_seconds: list[float]
    seconds: float
    load_seconds: float
    added_bytes: int

    @property
    def seconds_per_step(self) -> float:
        """Return the median seconds over the steps, the first left out: it compiles and warms caches."""
        steps = self.step_seconds[1:] or self.step_seconds
        return statistics.median(steps)


class Session:
    """A run's pipeline with one engine in it, kept loaded for several requests; with the run's ``correction``, where it has one
    and the engine is a quantized one.

    Args:
        run: a run with a finished calibration.
        engine: its name; ``None``: the fastest that is there.
        model: the float pipeline if the caller has it already.
    """

    def __init__(self, run: Run, engine: str | None, model: Model | None = None, threads: int | None = None) -> None:
        from qdiff.engines import choose_engine
        from qdiff.engines.pipeline import replace as put_engine

        self.run = run
        self.engine = choose_engine(engine or default_engine(run)).name
        release_memory()
        start = time.perf_counter()
        self.model = model or reload_model(run)
        float_backbone = self.model.backbone
        inputs = self.model.family.inputs(float_backbone.config)  # type: ignore[arg-type]
        self.runner: Runner = load_runner(run, self.engine, self.model, threads)
        self.correction = None if self.engine == "float" else correction_of(run)
        self._float = float_backbone if model is not None else None
        unread = self.model.family.unread(float_backbone.config)  # type: ignore[arg-type]
        self._stand_in = put_engine(
            self.model.pipeline, self.model.family.backbone_attribute, self.runner, inputs, self.engine, unread
        )
        self.load_seconds = time.perf_counter() - start

    def close(self) -> None:
        """Free the engine and give a borrowed pipeline its float backbone back."""
        if self._float is not None:
            self.model.backbone, self.model.correction = self._float, None
        self.runner.close()

    def recorder(self, most: int) -> CallRecorder:
        """Keep the inputs of the backbone's next ``most`` calls, for :mod:`qdiff.stages.speed`."""
        from qdiff.engines.recorder import CallRecorder

        recorder = self._stand_in.runner = CallRecorder(self.runner, most)
        return recorder

    def pictures(self, request: Request, batch: int = 4, on_step: StepCallback | None = None) -> Pictures:
        """Make the pictures of ``request``, ``batch`` at a time; every picture depends on its own seed alone.

        ``on_step(steps done so far, timestep, latents)`` is called after every step; an exception that it raises stops the
        work at once. Several sessions may share one model: the one that is asked puts its engine in.
        """
        self.model.backbone, self.model.correction = self._stand_in, self.correction
        steps = self.model.steps(request.steps)
        chunks = range(0, len(request.prompts), batch)
        together = self.model.calls_of_a_step(request.guidance, request.scheduler)
        step_seconds: list[float] = []
        images: list[Image | Clip] = []
        with measure_usage() as usage, Progress(f"generate ({self.engine})", len(chunks) * steps) as progress:

            def report(step: int, timestep: float, latents: Tensor) -> None:
                progress.advance()
                if on_step is not None:
                    on_step(progress.done, timestep, latents)

            for start in chunks:
                part = replace(
                    request, prompts=request.prompts[start : start + batch], seeds=request.seeds[start : start + batch]
                )
                self._stand_in.seconds.clear()
                images += self.model.generate(part, on_step=report)
                step_seconds += _by_step(self._stand_in.seconds, together)
        return Pictures(
            self.engine,
            images,
            step_seconds,
            usage.seconds,
            self.load_seconds,
            max(0, usage.peak_bytes - usage.start_bytes),
        )


def correction_of(run: Run) -> Correction | None:
    """Return what corrects the trajectory of the run's quantized engines; ``None`` where nothing was fitted, or nothing
    gained.

    Raises:
        IntegrityError: the file was changed since.
    """
    from qdiff.correction import load_correction
    from qdiff.files import read_json

    if not run.done("correct"):
        return None
    run.verify("correct")
    kept = read_json(run.file(CORRECTION), "the correction")["correction"]
    return None if kept is None else load_correction(kept)


def simulate(model: Model, backbone: nn.Module, request: Request, batch: int) -> list[Image | Clip]:
    """Return pictures of the model's pipeline with a torch module as its backbone, ``batch`` at a time; no run is asked
    for.

    Args:
        model: with the pipeline.
        backbone: of the model's class, float or quantized.
        request: prompts, seeds and settings.
        batch: pictures that are denoised together.
    """
    from qdiff.engines.eager import ModuleRunner
    from qdiff.engines.pipeline import insert
    from qdiff.models.base import NamedInputs

    named = NamedInputs(model.family, backbone)
    name = "float" if backbone is model.backbone else "torch"
    images: list[Image | Clip] = []
    inputs = model.family.inputs(backbone.config)  # type: ignore[arg-type]
    unread = model.family.unread(backbone.config)  # type: ignore[arg-type]
    with insert(model.pipeline, model.family.backbone_attribute, ModuleRunner(named), inputs, name, unread):
        for start in range(0, len(request.prompts), batch):
            part = slice(start, start + batch)
            images += model.generate(replace(request, prompts=request.prompts[part], seeds=request.seeds[part]))
    return images


def _by_step(calls: list[float], together: int) -> list[float]:
    """Return seconds of the calls of each step, added up."""
    return [sum(calls[start : start + together]) for start in range(0, len(calls), together)]


def check_pictures(count: int) -> None:
    """Refuse a number of pictures that no comparison makes, before anything is done for them.

    Raises:
        UsageError: with the range.
    """
    if not 1 <= count <= MOST_PICTURES:
        raise UsageError(
            f"{option('pictures', count)} is not between 1 and {MOST_PICTURES}", "16 judge well, 48 better"
        )


def make_request(
    run: Run,
    prompts: list[str],
    *,
    negative_prompt: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    frames: int | None = None,
) -> Request:
    """Return a checked request; what is not given is as in the run's calibration.

    Raises:
        UsageError: empty or overlong prompts, too many pictures, numbers out of range.
    """
    from qdiff.models import FAMILIES
    from qdiff.models.model import Request
    from qdiff.models.sizes import check_frames

    calibrated = options_of(run)
    if not prompts:
        raise UsageError("there is no prompt", f"give one with {option('prompt')}")
    for prompt in [*prompts, negative_prompt]:
        if len(prompt) > LONGEST_PROMPT:
            raise UsageError(f"a prompt has {len(prompt):,} characters", f"at most {LONGEST_PROMPT:,} are taken")
    if len(prompts) > MOST_PICTURES:
        raise UsageError(f"{len(prompts)} pictures were asked for", f"at most {MOST_PICTURES} in one call")
    empty = sum(not prompt.strip() for prompt in prompts)
    if empty:
        which = "the prompt is" if len(prompts) == 1 else f"{empty} of {len(prompts)} prompts are"
        log.warning("%s empty: nothing says what such a picture shows", which)
    check_sampling(steps, guidance)
    check_frames(FAMILIES[calibrated.model], frames)
    if not 0 <= seed < 2**63 - MOST_PICTURES:
        raise UsageError(f"{option('seed', seed)} is not between 0 and 2^63")
    return Request(
        prompts=prompts,
        seeds=[seed + i for i in range(len(prompts))],
        negative_prompt=negative_prompt,
        steps=steps if steps is not None else calibrated.steps,
        guidance=guidance if guidance is not None else calibrated.guidance,
        height=height,
        width=width,
        scheduler=scheduler or calibrated.scheduler,
        frames=frames,
    )


def guidance_warning(run: Run, model: Model, guidance: float | None) -> str | None:
    """Return what to say about a guidance scale outside those that the run was calibrated with; ``None`` within them.

    What activations are depends on the guidance scale, so constant scales of activations fit the calibrated ones.
    """
    least, largest = guidance_range(run, model)
    wanted = model.guidance(guidance)
    if least <= wanted <= largest:
        return None
    calibrated = f"{least:g}" if least == largest else f"{least:g} to {largest:g}"
    scales = [scale for scale in (min(least, wanted), max(largest, wanted)) if (scale > 1) == (wanted > 1)]
    return (
        f"guidance {wanted:g} is outside what this run was calibrated with ({calibrated}): how near to float its pictures are "
        f"was not seen, and errors grow with the scale; to cover it: {command('calibrate', guidance=scales)}"
    )


def save_pictures(run: Run, made: Pictures, request: Request, model: Model, paths: list[Path]) -> None:
    """Write PNGs that carry prompt, seed, settings and run id; of clips an MP4, and a PNG with some frames beside it.

    Args:
        run: whose id the files carry.
        made: the pictures or clips.
        request: prompts, seeds and settings.
        model: that made the pictures.
        paths: of the PNGs; a clip whose path is that of an MP4 gets no strip of frames beside it.
    """
    from qdiff.evaluation.images import PictureInfo, save_png
    from qdiff.evaluation.video import Clip, save_mp4

    for image, path, prompt, seed in zip(made.images, paths, request.prompts, request.seeds, strict=True):
        info = PictureInfo(
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            steps=model.steps(request.steps),
            guidance=model.guidance(request.guidance),
            engine=made.engine,
            model=f"{model.family.name} ({model.weights})",
            run_id=run.id,
        )
        if isinstance(image, Clip):
            alone = path.suffix.lower() == ".mp4"
            save_mp4(path if alone else path.with_suffix(".mp4"), image, info)
            if alone:
                continue
            image = image.strip()
        save_png(path, image, info)


def default_output(run: Run) -> Path:
    """Return where what the run's model makes goes when no path is given."""
    from qdiff.models import FAMILIES

    return Path("out.mp4" if FAMILIES[options_of(run).model].media == "video" else "out.png")


def generate(run: Run, request: Request, engine: str | None, output: Path, batch: int = 4) -> dict[str, Any]:
    """Generate pictures into ``output`` (several: ``output-0.png`` …), clips as MP4s.

    Raises:
        UsageError: ``output`` is no path of what the model makes, or frames are asked of a picture.
    """
    from qdiff.models import FAMILIES

    if not 1 <= batch <= MOST_PICTURES:
        raise UsageError(f"{option('batch', batch)} is not between 1 and {MOST_PICTURES}")
    family = FAMILIES[options_of(run).model]
    suffix, what = (
        (".mp4", "clips are written as MP4") if family.media == "video" else (".png", "pictures are written as PNG")
    )
    if output.suffix.lower() != suffix:
        raise UsageError(f"{output} does not end in {suffix}", f"{what}, with their settings inside")
    if not output.parent.is_dir():
        raise UsageError(
            f"the folder {output.parent} does not exist", f"make it, or choose another path with {option('output')}"
        )
    if output.is_dir():
        raise UsageError(f"{output} is a folder", f"choose another path with {option('output')}")
    require_writable(output.parent)
    with beside(run, [engine or default_engine(run)]):
        session = Session(run, engine)
    if request.negative_prompt and not session.model.guided(request.guidance):
        log.warning("the negative prompt has no effect: there is no guidance away from it at a scale of 1 and below")
    warning = None if session.engine == "float" else guidance_warning(run, session.model, request.guidance)
    if warning is not None:
        log.warning("%s", warning)
    try:
        made = session.pictures(request, batch)
    finally:
        session.close()
    count = len(made.images)
    paths = [output] if count == 1 else [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]
    save_pictures(run, made, request, session.model, paths)
    return {
        "run": str(run.path),
        "engine": made.engine,
        "weights": session.model.note,
        "images": [str(path) for path in paths],
        "seeds": list(request.seeds),
        "seconds": round(made.seconds, 3),
        "load_seconds": round(made.load_seconds, 3),
        "seconds_per_step": round(made.seconds_per_step, 5),
        "warnings": [] if warning is None else [warning],
    }
