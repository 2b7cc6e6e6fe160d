"""Drawing: what happens in the compute slot's thread between a request that was admitted and pictures with their numbers.

When memory runs out in the middle of a picture, everything else that is loaded is let go and the picture is tried once more;
if that fails too, the request fails, all engines are let go, and the next request starts clean.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.app.jobs import AnyJob, UpdateChanges
from qdiff.app.limits import Limits
from qdiff.app.metrics import Metrics
from qdiff.app.pool import Pool
from qdiff.app.settings import Settings
from qdiff.app.sources import Source
from qdiff.errors import MemoryExhaustedError, out_of_memory
from qdiff.evaluation.timing import Load
from qdiff.resources import release_memory

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from qdiff.app.previews import Previewer
    from qdiff.evaluation.video import Clip
    from qdiff.files import Json
    from qdiff.models import Model, Request
    from qdiff.stages.generate import Pictures, Session

log = logging.getLogger("qdiff.app")
_PREVIEW_SECONDS = 0.12  # between two previews


@dataclass(frozen=True)
class Made:
    """Pictures of one engine. ``settings`` are complete: given back, they make the same pictures."""

    settings: Settings
    paths: tuple[Path, ...]  # PNG with metadata, one for each picture; of clips a strip of frames beside the MP4
    engine: str
    note: str
    seconds: float
    seconds_per_step: float
    load_seconds: float
    memory_bytes: int
    size_bytes: int | None
    psnr_db: float | None = None  # against float, of the first picture
    ssim: float | None = None
    disturbed: bool = False  # a build or another process ran beside it: times are not the engine's own
    images: tuple[Image | Clip, ...] = ()  # of a comparison, until it is judged
    warnings: tuple[str, ...] = ()  # of settings that cost nearness to float
    beside: Path | None = None  # MP4 with float's clip on the left: in one file, so that both stay in step

    @property
    def files(self) -> tuple[Path, ...]:
        """Return what is downloaded: the PNGs or the MP4s."""
        return tuple(file_of(path) for path in self.paths)

    def each(self) -> list[Made]:
        """Return one for each picture, with its own seed: pictures do not depend on those that were made beside
        them.
        """
        seed = self.settings.seed or 0
        return [
            replace(self, paths=(path,), settings=self.settings.model_copy(update={"seed": seed + i, "pictures": 1}))
            for i, path in enumerate(self.paths)
        ]

    def facts(self) -> dict[str, Json]:
        """Return the settings and what was measured, as JSON values for the download."""
        names = ("engine", "note", "seconds", "seconds_per_step", "load_seconds", "memory_bytes", "size_bytes")
        facts = {name: getattr(self, name) for name in (*names, "psnr_db", "ssim", "disturbed")}
        facts["warnings"] = list(self.warnings) or None
        return {"settings": self.settings.to_json(), **{k: v for k, v in facts.items() if v is not None}}


@dataclass(frozen=True)
class Defaults:
    """What a source draws with if nothing is asked for."""

    steps: int
    guidance: float
    width: int
    height: int
    frames: int | None = None
    frames_step: int = 1  # clips have 1 and a multiple of it


def _usual(model: Model) -> dict[str, int]:
    """Return sizes that the pipeline takes when it is given none."""
    from qdiff.models.config import integers

    if model.config.get("sample_size"):
        sides = integers(model.config, "sample_size")
        height, width = (side * model.pixels_per_cell for side in (sides[0], sides[-1]))
        return {"width": width, "height": height}
    known = inspect.signature(model.pipeline.__call__).parameters
    return {name: known[name].default for name in ("width", "height", "num_frames")}


def file_of(path: Path) -> Path:
    """Return the clip that a strip of frames was saved beside, or the picture itself."""
    clip = path.with_suffix(".mp4")
    return clip if clip.exists() else path


class Artist:
    """Draws with the pool's engines into ``folder``.

    Args:
        disturbed: whether something else computes now.
    """

    def __init__(
        self, pool: Pool, limits: Limits, metrics: Metrics, folder: Path, disturbed: Callable[[], bool]
    ) -> None:
        self._pool, self._limits, self._metrics = pool, limits, metrics
        self._folder, self._disturbed = folder, disturbed
        self.known: dict[str, Defaults] = {}  # what was read so far, by source

    def defaults(self, source: Source) -> Defaults:
        """Return the source's own settings; load its model the first time."""
        if source.name not in self.known:
            model = self._pool.model(source)
            usual = {**_usual(model), **model.defaults}
            width, height, video = int(usual["width"]), int(usual["height"]), source.family.media == "video"
            factor = int(model.pipeline.vae_scale_factor_temporal) if video else 1
            inputs = source.run.entry("calibrate")["inputs"] if source.run else {}
            self.known[source.name] = Defaults(
                model.steps(inputs.get("steps")), model.guidance(inputs.get("guidance")), width, height,
                int(usual["num_frames"]) if video else None, factor,
            )  # fmt: skip
        return self.known[source.name]

    def draw(
        self,
        job: AnyJob,
        source: Source,
        engine: str,
        settings: Settings,
        keep: bool = True,
        share: tuple[int, int] | None = None,
    ) -> Made:
        """Draw, and once more after everything else was let go when memory ran out."""
        try:
            return self._draw_once(job, source, engine, settings, keep, share)
        except BaseException as error:
            if not out_of_memory(error):
                raise
            self._metrics.out_of_memory.inc()
        freed = self._pool.drop(keep=(source.name, engine))
        log.warning("memory ran out in %s of %s; %d other engines were let go", engine, source.name, freed)
        try:
            if not freed:
                raise MemoryExhaustedError(
                    "There was not enough memory for this picture.", "Take a smaller size or fewer pictures."
                )
            return self._draw_once(job, source, engine, settings, keep, share)
        except BaseException as error:
            if out_of_memory(error):
                self._pool.drop()
                release_memory()
            raise

    def _draw_once(
        self, job: AnyJob, source: Source, engine: str, settings: Settings, keep: bool, share: tuple[int, int] | None
    ) -> Made:
        from qdiff.models import Request
        from qdiff.stages.generate import guidance_warning

        job.publish(task=f"loading {engine}", step=0, steps=0, preview=None)
        session = self._pool.session(source, engine)
        job.checkpoint()
        defaults = self.defaults(source)
        steps = settings.steps or defaults.steps
        settings = settings.model_copy(
            update={
                "engine": engine,
                "steps": steps,
                "guidance": defaults.guidance if settings.guidance is None else settings.guidance,
                "width": settings.width or defaults.width,
                "height": settings.height or defaults.height,
                "frames": settings.frames or defaults.frames,
            }
        )
        self._limits.check(
            settings, source.family.size_divisor, source.family.media
        )  # the model's own values may be beyond them too
        assert settings.seed is not None
        request = Request(
            prompts=[settings.prompt] * settings.pictures,
            seeds=[settings.seed + i for i in range(settings.pictures)],
            negative_prompt=settings.negative_prompt,
            steps=steps,
            guidance=settings.guidance,
            # A size that is the model's own is left to its pipeline, as the command line does.
            height=None if settings.height == defaults.height and settings.width == defaults.width else settings.height,
            width=None if settings.height == defaults.height and settings.width == defaults.width else settings.width,
            frames=settings.frames,
        )
        job.publish(task=f"drawing with {engine}", step=0, steps=steps)
        watch = _Watch(job, self._pool.previewer(source), steps, share)
        load = Load()
        pictures = session.pictures(request, batch=settings.pictures, on_step=watch)
        if not keep:
            return _made(settings, (), pictures, session, self._pool.engine_bytes(source, engine), None)
        self._metrics.pictures.labels(engine).inc(len(pictures.images))
        paths = self._save(job, source, pictures, request, session.model)
        size = source.engine_bytes(engine)
        # What loading added to the resident set, where that is more than the file: freed heap may have been used again.
        memory = max(self._pool.engine_bytes(source, engine), size or 0)
        if engine == "float":  # its weights came with the pipeline, before the engine was "loaded"
            memory = max(memory, self._pool.backbone_bytes(source))
        disturbed = self._disturbed() or bool(load.reason())
        made = _made(settings, paths, pictures, session, memory, size, disturbed=disturbed)
        if source.run is not None and engine != "float":
            warning = guidance_warning(source.run, session.model, settings.guidance)
            made = made if warning is None else replace(made, warnings=(warning,))
        return made if share is None else replace(made, images=tuple(pictures.images))

    def _save(
        self, job: AnyJob, source: Source, pictures: Pictures, request: Request, model: Model
    ) -> tuple[Path, ...]:
        from qdiff.stages.generate import save_pictures

        self._sweep()
        names = [f"qdiff-{pictures.engine}-seed{seed}-{job.id}.png" for seed in request.seeds]
        paths = [self._folder / name for name in names]
        save_pictures(source.home, pictures, request, model, paths)
        return tuple(paths)

    def _sweep(self) -> None:
        """Remove pictures that are too old or too many."""
        ages = sorted((path.stat().st_mtime, path) for path in self._folder.glob("*.png"))
        beside = {path.stem.removesuffix("-beside-float"): path for path in self._folder.glob("*-beside-float.mp4")}
        oldest = time.time() - self._limits.kept_seconds
        surplus = len(ages) - self._limits.kept_pictures
        for index, (age, path) in enumerate(ages):
            if age < oldest or index < surplus:
                for suffix in (".png", ".json", ".mp4"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
                if path.stem in beside:
                    beside[path.stem].unlink(missing_ok=True)

    def compare(self, job: AnyJob, source: Source, engines: list[str], settings: Settings) -> list[Made]:
        from qdiff.evaluation.images import to_pixels
        from qdiff.evaluation.metrics import paired

        names = ["float", *engines]
        rows = [self.draw(job, source, name, settings, share=(index, len(names))) for index, name in enumerate(names)]
        first, expected = rows[0], to_pixels(rows[0].images[:1])
        judged = [replace(first, images=())]
        for row in rows[1:]:
            quality = paired(expected, to_pixels(row.images[:1]))
            beside = self._beside(first, row) if source.family.media == "video" else None
            judged.append(replace(row, images=(), psnr_db=quality.psnr_db_mean, ssim=quality.ssim_mean, beside=beside))
        return judged

    def _beside(self, reference: Made, other: Made) -> Path:
        """Return two clips side by side as one."""
        import numpy as np

        from qdiff.evaluation.images import PictureInfo
        from qdiff.evaluation.video import Clip, save_mp4

        left, right = reference.images[0], other.images[0]
        assert isinstance(left, Clip) and isinstance(right, Clip)
        path = other.paths[0].with_name(f"{other.paths[0].stem}-beside-float.mp4")
        both = Clip(np.concatenate([left.frames, right.frames], axis=2), left.fps)
        save_mp4(path, both, PictureInfo(prompt=other.settings.prompt, engine=f"float (left), {other.engine} (right)"))
        return path


class _Watch:
    """Called after every denoising step: stops what was cancelled, and publishes the step and, not too often, a preview."""

    def __init__(self, job: AnyJob, previewer: Previewer, steps: int, share: tuple[int, int] | None) -> None:
        self._job, self._previewer = job, previewer
        self._before, self._of = share or (0, 1)
        self._steps = steps
        self._start = time.monotonic()
        self._shown = 0.0

    def __call__(self, step: int, timestep: float, latents: Tensor) -> None:
        self._job.checkpoint()
        now = time.monotonic()
        left = (now - self._start) / step * (self._steps * (self._of - self._before) - step)
        changes: UpdateChanges[object] = {
            "step": self._steps * self._before + step,
            "steps": self._steps * self._of,
            "seconds_left": left,
        }
        if now - self._shown >= _PREVIEW_SECONDS:
            self._shown = now
            changes["preview"] = self._previewer(latents)
        self._job.publish(**changes)


def _made(
    settings: Settings, paths: tuple[Path, ...], pictures: Pictures, session: Session, memory: int, size: int | None,
    disturbed: bool = False,
) -> Made:  # fmt: skip
    return Made(
        settings=settings,
        paths=paths,
        engine=pictures.engine,
        note=session.model.note,
        seconds=round(pictures.seconds, 3),
        seconds_per_step=round(pictures.seconds_per_step, 5),
        load_seconds=round(pictures.load_seconds, 3),
        memory_bytes=memory + pictures.added_bytes,
        size_bytes=size,
        disturbed=disturbed,
    )
