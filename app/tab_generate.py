"""The tab Generate: a prompt, a picture that forms while one looks, and everything to make it again.

Here is what the tab looks like: its components (:func:`lay_out`), and which event calls which handler (:func:`connect`). What a
handler does is in :mod:`.generate_handlers`.
"""

import functools
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from qdiff.app import views
from qdiff.app.follow import client_of
from qdiff.app.service import Service

if TYPE_CHECKING:
    from qdiff.app.generate_handlers import GenerateHandlers


@dataclass(frozen=True)
class Fields:
    """Components that a user fills in: the settings of a picture."""

    prompt: Any
    negative: Any
    model: Any
    engine: Any
    steps: Any
    guidance: Any
    width: Any
    height: Any
    pictures: Any
    frames: Any
    seed: Any
    fresh: Any

    def all(self) -> list[Any]:
        """Return the components in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Layout:
    """Components of the tab.

    Args:
        fields: the settings of a picture.
        examples: a button for each example, by the example's name.
        go: starts a job.
        stop: cancels it.
        canvas: the picture, or how far it is.
        facts: figures under the picture.
        png: downloads the picture.
        settings_file: downloads its settings.
        pasted: settings as JSON text.
        apply: takes the pasted settings.
        visit: the line above the gallery.
        gallery: pictures of this visit.
        history: their paths and settings, newest first.
    """

    fields: Fields
    examples: dict[str, Any]
    go: Any
    stop: Any
    canvas: Any
    facts: Any
    png: Any
    settings_file: Any
    pasted: Any
    apply: Any
    visit: Any
    gallery: Any
    history: Any


def add(service: Service) -> Any:
    """Add the tab's components.

    Returns:
        The list of models, which a finished build changes.
    """
    from qdiff.app.generate_handlers import GenerateHandlers

    layout = lay_out(service)
    connect(layout, GenerateHandlers(service, layout))
    return layout.fields.model


def lay_out(service: Service) -> Layout:
    """Add the tab's components to the page that is being built."""
    import gradio as gr

    history = gr.State([], time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            settings, buttons = _settings_column(service)
        with gr.Column(scale=6, min_width=300):
            result = _result_column()
    return Layout(settings, **buttons, **result, **_bottom(service), history=history)


def _settings_column(service: Service) -> tuple[Fields, dict[str, Any]]:
    """Add what a user fills in and presses.

    Returns:
        The fields, and the buttons by their names in :class:`Layout`.
    """
    import gradio as gr

    from qdiff.app.page import EXAMPLES

    limits, first = service.limits, service.sources[""]
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
        more = _more_settings(service)
    settings = Fields(prompt=prompt, model=model, engine=engine, **more)
    return settings, {"examples": examples, "go": go, "stop": stop}


def _more_settings(service: Service) -> dict[str, Any]:
    """Add the fields that have good values already; return them by their names in :class:`Fields`."""
    import gradio as gr

    limits, first = service.limits, service.sources[""]
    own, divisor = service.defaults(first), first.family.size_divisor
    negative = gr.Textbox(label="Negative prompt", max_length=limits.prompt_characters, lines=1)
    steps = gr.Slider(1, limits.steps, own.steps, step=1, label="Steps", elem_id="steps")
    guidance = gr.Slider(0, limits.guidance, own.guidance, step=0.1, label="Guidance")
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
    return {
        "negative": negative, "steps": steps, "guidance": guidance, "width": width, "height": height,
        "pictures": pictures, "frames": frames, "seed": seed, "fresh": fresh,
    }  # fmt: skip


def _result_column() -> dict[str, Any]:
    """Add the picture and what belongs to it; return the components by their names in :class:`Layout`."""
    import gradio as gr

    ready = views.empty("No picture yet", "Write a prompt and press Generate, or click an example.")
    canvas = gr.HTML(ready, elem_id="canvas")
    facts = gr.HTML("")
    with gr.Row():
        png = gr.DownloadButton("Picture (PNG)", size="sm", interactive=False, elem_id="png", min_width=120)
        settings_file = gr.DownloadButton(
            "Settings (JSON)", size="sm", interactive=False, elem_id="json", min_width=120
        )
    return {"canvas": canvas, "facts": facts, "png": png, "settings_file": settings_file}


def _bottom(service: Service) -> dict[str, Any]:
    """Add pasted settings and the pictures of this visit; return the components by their names in :class:`Layout`."""
    import gradio as gr

    limits = service.limits
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
    return {"pasted": pasted, "apply": apply, "visit": visit, "gallery": gallery}


def connect(layout: Layout, handlers: "GenerateHandlers") -> None:
    """Say which event calls which handler, with what, and what it may change."""
    import gradio as gr

    asked = layout.fields
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    # A set of inputs: the handler gets one dict of values by component.
    read = {*asked.all(), layout.history}
    result = [layout.canvas, layout.facts, layout.png, layout.settings_file, layout.pasted]
    working = [*result, layout.go, layout.stop, asked.seed, layout.history, layout.gallery, layout.visit]

    # Gradio finds out by annotations of its own types who asks and which picture was clicked; they end here.
    async def generate(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        async with aclosing(handlers.generate(values, client_of(request))) as updates:
            async for changes in updates:
                yield changes

    def cancel(request: gr.Request) -> None:
        handlers.cancel(client_of(request))

    def recall(past: list[dict[str, Any]], event: gr.SelectData) -> dict[Any, Any]:
        return handlers.recall(past, int(event.index))

    gr.on([layout.go.click, asked.prompt.submit], generate, read, working, **quiet)
    for name, button in layout.examples.items():
        words = functools.partial(handlers.example, name)
        button.click(words, asked.model, asked.prompt, **at_once).then(generate, read, working, **quiet)
    layout.stop.click(cancel, None, None, **at_once)
    of_model = [asked.engine, asked.steps, asked.guidance, asked.width, asked.height, asked.frames]
    asked.model.input(handlers.change_model, [asked.model, asked.engine], of_model, **hidden)
    layout.apply.click(handlers.paste, layout.pasted, asked.all(), **hidden)
    layout.gallery.select(recall, layout.history, [*asked.all(), *result], **hidden)


def _names(service: Service) -> list[tuple[str, str]]:
    return [(source.title, source.name) for source in service.sources.all()]


def _engines(source: Any) -> list[tuple[str, str]]:
    """Return engines that can run here; what cannot is shown, with the reason, on the tab Inspect."""
    return [(choice.name, choice.name) for choice in source.engines() if not choice.why_not]


def _whole(value: float | None) -> int | float | None:
    """Return sliders and number fields give floats; a fraction stays one, for the service to refuse."""
    return int(value) if value is not None and float(value).is_integer() else value
