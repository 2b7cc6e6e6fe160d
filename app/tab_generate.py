"""The tab Generate: a prompt, a picture that forms while one looks, and everything to make it again."""

import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qdiff.app import views
from qdiff.app.drawing import Defaults, Made, file_of
from qdiff.app.follow import alert, client_of, drawn
from qdiff.app.service import Service
from qdiff.app.settings import Settings
from qdiff.errors import QdiffError

_HISTORY = 24  # pictures of a visit that are kept


def add(service: Service) -> Any:
    """Add the tab's components; return the list of models, which a finished build changes."""
    import gradio as gr

    from qdiff.app.page import CLIPS, EXAMPLES

    limits, first = service.limits, service.sources[""]
    own = service.defaults(first)
    ready = views.empty("No picture yet", "Write a prompt and press Generate, or click an example.")
    history = gr.State([], time_to_live=3600)

    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            prompt = gr.Textbox(
                label="Prompt", placeholder="a rocket on a blue background", lines=2, max_lines=5, autofocus=True,
                max_length=limits.prompt_characters, elem_id="prompt",
            )  # fmt: skip
            with gr.Row(elem_classes="qd-examples"):
                examples = {name: gr.Button(name, size="sm", variant="secondary") for name in EXAMPLES}
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", scale=1, min_width=90)
            with gr.Row():
                model = gr.Dropdown(
                    _names(service), value=first.name, label="Model", elem_id="model", filterable=False, min_width=150
                )
                engine = gr.Dropdown(
                    _engines(first),
                    value=first.engine(""),
                    label="Engine",
                    elem_id="engine",
                    filterable=False,
                    min_width=150,
                )
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", max_length=limits.prompt_characters, lines=1)
                steps = gr.Slider(1, limits.steps, own.steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(0, limits.guidance, own.guidance, step=0.1, label="Guidance")
                divisor = first.family.size_divisor
                with gr.Row():
                    width = gr.Slider(
                        limits.smallest_side, limits.largest_side, own.width, step=divisor, label="Width", min_width=120
                    )
                    height = gr.Slider(
                        limits.smallest_side,
                        limits.largest_side,
                        own.height,
                        step=divisor,
                        label="Height",
                        min_width=120,
                    )
                with gr.Row():
                    pictures = gr.Slider(1, limits.pictures, 1, step=1, label="Pictures", min_width=120)
                    frames = gr.Slider(
                        1 + own.frames_step, limits.frames, own.frames or 2, step=own.frames_step, label="Frames",
                        visible=own.frames is not None,
                        min_width=120, elem_id="frames",
                    )  # fmt: skip
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=120)
                    fresh = gr.Checkbox(True, label="A new seed each time", min_width=160)
        with gr.Column(scale=6, min_width=300):
            canvas = gr.HTML(ready, elem_id="canvas")
            facts = gr.HTML("")
            with gr.Row():
                png = gr.DownloadButton("Picture (PNG)", size="sm", interactive=False, elem_id="png", min_width=120)
                settings_file = gr.DownloadButton(
                    "Settings (JSON)", size="sm", interactive=False, elem_id="json", min_width=120
                )
    with gr.Accordion("Paste settings (JSON)", open=False):
        pasted = gr.Textbox(
            show_label=False, lines=6, max_lines=14, max_length=limits.settings_characters, elem_id="pasted",
            placeholder='{"prompt": "a rocket on a blue background", "seed": 7}',
        )  # fmt: skip
        apply = gr.Button("Use these settings", size="sm", elem_id="apply")
    visit = gr.HTML('<p class="qd-note">This visit: click a picture to get its settings back.</p>', visible=False)
    gallery = gr.Gallery(
        show_label=False, columns=8, fit_columns=False, height=110, object_fit="contain", allow_preview=False, interactive=False,
        visible=False, elem_id="history", buttons=[], format="png",
    )  # fmt: skip

    inputs = [prompt, negative, model, engine, steps, guidance, seed, fresh, width, height, pictures, frames]
    working = [canvas, facts, go, stop, png, settings_file, pasted, seed, history, gallery, visit]

    async def generate(
        prompt: str, negative: str, model: str, engine: str, steps: float, guidance: float, seed: float | None, fresh: bool,
        width: float, height: float, pictures: float, frames: float, past: list[dict[str, Any]], request: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:  # fmt: skip
        idle = {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
        try:
            settings = Settings.make(
                prompt=prompt or "", negative_prompt=negative or "", model=model, engine=engine, steps=_whole(steps),
                guidance=None if guidance is None else float(guidance), seed=None if fresh or seed is None else _whole(seed),
                width=_whole(width), height=_whole(height), pictures=_whole(pictures) or 1,
                frames=_whole(frames) if service.sources[model].family.media == "video" else None,
            )  # fmt: skip
            job = service.generate(settings, client_of(request))
        except QdiffError as error:
            yield {**idle, canvas: views.failed(error), facts: ""}
            return
        except Exception as error:
            yield {**idle, canvas: views.failed(service.shown(error)), facts: ""}
            return
        yield {
            canvas: views.progress(job.update),
            facts: "",
            go: gr.Button(interactive=False),
            stop: gr.Button(interactive=True),
        }
        async for changes in drawn(service, job, idle, canvas, lambda made: _result(made, past)):
            yield changes

    def _result(made: Made, past: list[dict[str, Any]]) -> dict[Any, Any]:
        new = []
        for path, one in zip(made.paths, made.each(), strict=True):
            file = path.with_suffix(".json")
            file.write_text(json.dumps(one.facts(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            new.append({"path": str(path), "settings": one.settings.to_json()})
        past = [entry for entry in [*new, *past] if Path(entry["path"]).exists()][:_HISTORY]
        return {
            canvas: views.made(made),
            facts: views.facts(made),
            **_downloads(made.paths[0]),
            pasted: json.dumps(made.settings.to_json(), indent=2, ensure_ascii=False),
            seed: made.settings.seed,
            history: past,
            gallery: gr.Gallery(value=[entry["path"] for entry in past], visible=True),
            visit: gr.HTML(visible=True),
        }

    def _downloads(path: Path) -> dict[Any, Any]:
        return {
            png: gr.DownloadButton(
                "Clip (MP4)" if file_of(path) != path else "Picture (PNG)", value=str(file_of(path)), interactive=True
            ),
            settings_file: gr.DownloadButton(value=str(path.with_suffix(".json")), interactive=True),
        }

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    gr.on([go.click, prompt.submit], generate, [*inputs, history], working, **quiet)

    def words(example: str, chosen: str) -> str:
        return (CLIPS if service.sources[chosen].family.media == "video" else EXAMPLES)[example]

    for name, example in examples.items():
        said = functools.partial(words, name)
        example.click(said, model, prompt, queue=False, api_visibility="private").then(
            generate, [*inputs, history], working, **quiet
        )

    def cancel(request: gr.Request) -> None:
        service.cancel(client_of(request))

    stop.click(cancel, None, None, queue=False, api_visibility="private")

    def changed(name: str, engine_now: str) -> tuple[Any, Any, Any, Any, Any, Any]:
        try:
            source = service.sources[name]
            own = service.defaults(source)
        except QdiffError as error:
            raise alert(service, error) from None
        choices = _engines(source)
        value = engine_now if engine_now in [value for _, value in choices] else source.engine("")
        length = _length(own, own.frames)
        return gr.Dropdown(choices, value=value), own.steps, own.guidance, own.width, own.height, length

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    model.input(changed, [model, engine], [engine, steps, guidance, width, height, frames], **hidden)

    def _length(own: Defaults, value: int | None) -> Any:
        step = own.frames_step
        return gr.Slider(1 + step, value=value or 1 + step, step=step, visible=own.frames is not None)

    def fill(settings: Settings) -> dict[Any, Any]:
        source = service.sources[settings.model]
        own, name = service.defaults(source), source.engine(settings.engine)
        service.limits.check(settings, source.family.size_divisor, source.family.media)
        return {
            prompt: settings.prompt, negative: settings.negative_prompt, model: gr.Dropdown(_names(service), value=source.name),
            engine: gr.Dropdown(_engines(source), value=name), steps: settings.steps or own.steps,
            guidance: own.guidance if settings.guidance is None else settings.guidance,
            seed: settings.seed, fresh: settings.seed is None,
            width: settings.width or own.width, height: settings.height or own.height, pictures: settings.pictures,
            frames: _length(own, settings.frames or own.frames),
        }  # fmt: skip

    def paste(words: str) -> dict[Any, Any]:
        try:
            return fill(Settings.parse(words or "", limits.settings_characters))
        except Exception as error:
            raise alert(service, error) from None

    def recall(past: list[dict[str, Any]], event: gr.SelectData) -> dict[Any, Any]:
        try:
            entry = past[int(event.index)]
            path = Path(entry["path"])
            shown = {}
            if path.exists():
                shown = {canvas: views.past(path, entry["settings"]["prompt"]), **_downloads(path)}
            settings = Settings.make(**entry["settings"])
            return {
                **fill(settings),
                **shown,
                facts: "",
                pasted: json.dumps(entry["settings"], indent=2, ensure_ascii=False),
            }
        except Exception as error:
            raise alert(service, error) from None

    apply.click(paste, pasted, inputs, **hidden)
    gallery.select(recall, history, [*inputs, canvas, facts, pasted, png, settings_file], **hidden)
    return model


def _names(service: Service) -> list[tuple[str, str]]:
    return [(source.title, source.name) for source in service.sources.all()]


def _engines(source: Any) -> list[tuple[str, str]]:
    """Return engines that can run here; what cannot is shown, with the reason, on the tab Inspect."""
    return [(choice.name, choice.name) for choice in source.engines() if not choice.why_not]


def _whole(value: float | None) -> int | float | None:
    """Return sliders and number fields give floats; a fraction stays one, for the service to refuse."""
    return int(value) if value is not None and float(value).is_integer() else value
