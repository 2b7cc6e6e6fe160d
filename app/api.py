"""The named endpoints, for ``gradio_client`` and for programs. They take and give plain values and files, and stay as they are
when the page changes; the page's own events are private.

    generate     prompt and settings -> picture files (PNG with metadata), and what was measured
    compare      the same on float and on engines
    models       what there is, with engines and the model's own settings
    cancel       ends what this client has in work
    build, build_state, stop_build
    status       queue and memory
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, TypeVar

from qdiff.app.drawing import Made
from qdiff.app.follow import alert, client_of, follow
from qdiff.app.jobs import Job
from qdiff.app.service import Service
from qdiff.app.settings import Settings
from qdiff.errors import InputError

T = TypeVar("T")


class FileAnswer(TypedDict):
    """A file as Gradio's clients take it."""

    path: str
    orig_name: str
    meta: dict[str, str]


def names_of(value: object) -> list[str]:
    """Return engines that a caller names.

    Raises:
        InputError: something other than a list of texts.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InputError("The engines are not a list of names.", 'For example ["openvino"].')
    return list(value)


def add(service: Service) -> None:
    """Register the endpoints in the blocks that are being built."""
    import gradio as gr
    from gradio.processing_utils import save_file_to_cache
    from gradio.utils import get_upload_folder

    def file(path: Path) -> FileAnswer:
        cached = save_file_to_cache(path, cache_dir=get_upload_folder())
        return {"path": cached, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def told(made: Made) -> dict[str, object]:
        return {**made.facts(), "pictures": [file(path) for path in made.files]}

    async def run(job: Job[T]) -> T | None:
        update = job.update
        async with contextlib.aclosing(follow(service, job)) as updates:
            async for last in updates:
                update = last
        if update.error is not None:
            raise update.error
        return update.result

    async def generate(
        prompt: str, negative_prompt: str = "", model: str = "", engine: str = "", steps: int | None = None,
        guidance: float | None = None, seed: int | None = None, width: int | None = None, height: int | None = None,
        pictures: int = 1, frames: int | None = None, request: gr.Request | None = None,
    ) -> dict:  # fmt: skip
        """Draw pictures or clips. Empty and null mean the model's own; the answer has the settings used and the
        files.
        """
        try:
            if isinstance(guidance, int) and not isinstance(guidance, bool) and abs(guidance) < 2**53:
                guidance = float(guidance)
            settings = Settings.make(
                prompt=prompt, negative_prompt=negative_prompt, model=model, engine=engine, steps=steps,
                guidance=guidance, seed=seed, width=width, height=height, pictures=pictures,
                frames=frames,
            )  # fmt: skip
            made = await run(service.generate(settings, client_of(request)))
            return {"cancelled": True} if made is None else told(made)
        except Exception as error:
            raise alert(service, error) from None

    async def compare(
        prompt: str, model: str = "", engines: list[str] | None = None, steps: int | None = None, seed: int | None = None,
        request: gr.Request | None = None,
    ) -> dict:  # fmt: skip
        """Draw the same picture with the float model and with engines (default: the fastest); PSNR is against float."""
        try:
            settings = Settings.make(prompt=prompt, model=model, steps=steps, seed=seed)
            rows = await run(service.compare(settings, names_of(engines or []), client_of(request)))
            return {"cancelled": True} if rows is None else {"engines": [told(row) for row in rows]}
        except Exception as error:
            raise alert(service, error) from None

    def models() -> list:
        """Return every model with its engines, and why an engine cannot run here."""
        return [
            {
                "name": source.name, "title": source.title, "family": source.weights.family, "quantized": source.quantized,
                "engines": [asdict(choice) for choice in source.engines()],
            }
            for source in service.sources.all()
        ]  # fmt: skip

    def cancel(request: gr.Request) -> int:
        """End what this client has in work; how many jobs that were."""
        return service.cancel(client_of(request))

    def build(model: str, recipe: str = "int8", budget: str = "quick", engines: list[str] | None = None) -> dict:
        """Begin to calibrate and build; one at a time."""
        try:
            from qdiff.app.builds import buildable_engines

            chosen = (
                [name for name, runs in buildable_engines().items() if runs][:1]
                if engines is None
                else names_of(engines)
            )
            service.start_build(model, recipe, budget, chosen)
            return build_state()
        except Exception as error:
            raise alert(service, error) from None

    def build_state() -> dict:
        """Return the build that runs or ran last; empty before the first."""
        state = service.builds.state()
        return {} if state is None else asdict(state)

    def stop_build() -> dict:
        """Stop the build; what it finished is kept."""
        service.builds.cancel()
        return build_state()

    def status() -> dict:
        """Return the queue and the work in progress."""
        return {"waiting": service.queue_length, "busy": service.busy, "building": service.builds.running}

    endpoints: list[Callable[..., object]] = [generate, compare, models, cancel, build, build_state, stop_build, status]
    for endpoint in endpoints:
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None if endpoint in endpoints[:2] else 8)
