"""The service behind the page: everything that it can do, without a word about pages.

Callers give names and numbers and get a :class:`~qdiff.app.jobs.Job`; every limit is checked here, before a job is admitted, and
every error that leaves is a :class:`~qdiff.errors.QdiffError` whose text may be shown: no traceback, no path of this machine.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qdiff.app.builds import Builds
from qdiff.app.drawing import Artist, Defaults, Made
from qdiff.app.jobs import AnyJob, Job, Slot, State
from qdiff.app.limits import Limits
from qdiff.app.metrics import Metrics
from qdiff.app.pool import Pool
from qdiff.app.settings import Settings
from qdiff.app.sources import Source, Sources
from qdiff.errors import InputError, MemoryExhaustedError, QdiffError, out_of_memory

log = logging.getLogger("qdiff.app")
T = TypeVar("T")


@dataclass
class Service:
    """One service: sources, a compute slot, loaded engines, builds, counters.

    Args:
        sources: what is offered.
        limits: what may be asked for.
        memory_bytes: budget of loaded models and engines; default: half of what is free now.
    """

    sources: Sources
    limits: Limits = field(default_factory=Limits)
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        import psutil

        self.folder = Path(tempfile.mkdtemp(prefix="qdiff-demo-"))  # mode 0700
        (self.folder / "pictures").mkdir()
        budget = psutil.virtual_memory().available // 2 if self.memory_bytes is None else self.memory_bytes
        self._slot = Slot(self.limits.waiting, self.shown, self._count)
        self.metrics = Metrics(lambda: self._slot.waiting, lambda: self._slot.busy, lambda: self._pool.bytes)
        self._pool = Pool(budget, self.metrics.loads.inc, self.metrics.evictions.inc)
        self.builds = Builds(self.sources)
        self._artist = Artist(
            self._pool, self.limits, self.metrics, self.folder / "pictures", lambda: self.builds.running
        )

    # What there is

    def defaults(self, source: Source) -> Defaults:
        """Return the settings of a source; load its model the first time, in the compute slot."""
        if source.name not in self._artist.known:
            job = self._submit(f"defaults-{secrets.token_hex(4)}", "load", lambda job: self._artist.defaults(source))
            update = job.wait()
            if update.error is not None:
                raise update.error
        return self._artist.known[source.name]

    def warm(self, client: str = "warm-up") -> Job[Made]:
        """Load the first source and its fastest engine and draw one step, so that the first visitor does not wait for
        it.
        """
        source = self.sources[""]
        settings = Settings(prompt="warm up", model=source.name, steps=1, seed=0)
        return self._submit(
            client, "load", lambda job: self._artist.draw(job, source, source.engine(""), settings, keep=False)
        )

    @property
    def queue_length(self) -> int:
        """Return jobs that wait."""
        return self._slot.waiting

    @property
    def busy(self) -> bool:
        """Return whether a job runs."""
        return self._slot.busy

    # What it does

    def generate(self, settings: Settings, client: str) -> Job[Made]:
        """Return pictures from one engine; the job's result is a :class:`Made`.

        Raises:
            InputError: settings beyond the limits, or names that are not on the list.
            BusyError: the queue is full, or this client has a job already.
        """
        with self._refusals("generate"):
            source = self.sources[settings.model]
            settings = self._checked(settings, source)
            engine = source.engine(settings.engine)
            settings = settings.model_copy(update={"engine": engine})
            return self._submit(client, "generate", lambda job: self._artist.draw(job, source, engine, settings))

    def compare(self, settings: Settings, engines: list[str], client: str) -> Job[list[Made]]:
        """Return the same pictures on float and on ``engines``; the result is a list of :class:`Made`, float first.

        Raises:
            InputError: also when the model has no quantized engine.
            BusyError: as :meth:`generate`.
        """
        with self._refusals("compare"):
            source = self.sources[settings.model]
            settings = self._checked(settings, source)
            if not source.quantized:
                raise InputError(
                    f"{source.title} has no quantized engine to compare with.", "Build one on the Build tab."
                )
            names = list(dict.fromkeys(source.engine(name) for name in engines if name != "float")) or [
                source.engine("")
            ]
            if len(names) > self.limits.engines:
                raise InputError(
                    f"{len(names)} engines are chosen.", f"Compare at most {self.limits.engines} with float."
                )
            return self._submit(client, "compare", lambda job: self._artist.compare(job, source, names, settings))

    def cancel(self, client: str) -> int:
        """Cancel what this client has in work; return how many jobs that were."""
        return self._slot.cancel_client(client)

    def start_build(self, model: str, recipe: str, budget: str, engines: list[str]) -> None:
        """Begin a build; see :meth:`Builds.start`."""
        with self._refusals("build"):
            self.builds.start(model, recipe, budget, engines)

    def stop(self, grace: float = 20.0) -> None:
        """Refuse what is new, cancel what waits, and end what runs at its next step. Calling it twice is the same as
        once.
        """
        self._slot.close(grace)

    def close(self) -> None:
        """Call :meth:`stop`, then end the build, let the engines go, and remove the temporary files."""
        self.stop()
        self.builds.close()
        self._pool.drop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # How errors leave

    def shown(self, error: BaseException) -> QdiffError:
        """Return the error that a visitor may see: ours without this machine's paths, anything else by a number that
        the log has too.
        """
        if out_of_memory(error) and not isinstance(error, MemoryExhaustedError):
            return MemoryExhaustedError(
                "There was not enough memory for this.", "Take a smaller size or fewer pictures."
            )
        if not isinstance(error, QdiffError):
            number = secrets.token_hex(4)
            log.error("incident %s", number, exc_info=error)
            return QdiffError("Something broke on our side.", f"The log of qdiff demo has it under {number}.")
        shown = copy.copy(error)
        shown.message = self._without_paths(error.message)
        shown.fix = self._without_paths(error.fix) if error.fix else None
        return shown

    def _without_paths(self, text: str) -> str:
        for source in self.sources.all():
            if source.run is not None:
                text = text.replace(str(source.run.path), source.title)
        for folder in (self.folder, self.sources.workspace.absolute(), Path.cwd(), Path.home()):
            if len(folder.parts) > 1:
                text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), "…")
        return text

    @contextlib.contextmanager
    def _refusals(self, kind: str) -> Iterator[None]:
        try:
            yield
        except QdiffError as error:
            self.metrics.requests.labels(kind, "refused").inc()
            raise self.shown(error) from None

    def _count(self, job: AnyJob, state: State) -> None:
        if job.kind == "load":
            return
        self.metrics.requests.labels(job.kind, state).inc()
        self.metrics.queue_seconds.labels(job.kind).observe((job.started or job.ended or job.submitted) - job.submitted)
        if job.started is not None and job.ended is not None:
            self.metrics.compute_seconds.labels(job.kind).observe(job.ended - job.started)

    # How pictures are made, in the slot's thread

    def _submit(self, client: str, kind: str, work: Callable[[AnyJob], T]) -> Job[T]:
        return self._slot.submit(Job(client, kind, work, self.limits.seconds))

    def _checked(self, settings: Settings, source: Source) -> Settings:
        self.limits.check(settings, source.family.size_divisor, source.family.media)
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        return settings.model_copy(update={"seed": seed, "model": source.name})
