"""The tab Generate: a prompt, a picture that forms while one looks, and everything to make it again.

Here is what the tab looks like: its components (:func:`lay_out`), and which event calls which handler (:func:`connect`). What a
handler does is in :mod:`.generate_handlers`.
"""

import functools
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from qdiff.app import views
from qdiff.app.follow import Changes, EventOptions, client_of
from qdiff.app.service import Service
from qdiff.app.settings import PastPicture
from qdiff.app.sources import Source

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

    from qdiff.app.generate_handlers import GenerateHandlers


@dataclass(frozen=True)
class Fields:
    """Components that a user fills in: the settings of a picture."""

    prompt: "gr.Textbox"
    negative: "gr.Textbox"
    model: "gr.Dropdown"
    engine: "gr.Dropdown"
    steps: "gr.Slider"
    guidance: "gr.Slider"
    width: "gr.Slider"
    height: "gr.Slider"
    pictures: "gr.Slider"
    frames: "gr.Slider"
    seed: "gr.Number"
    fresh: "gr.Checkbox"

    def all(self) -> "list[Component]":
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
    examples: "dict[str, gr.Button]"
    go: "gr.Button"
    stop: "gr.Button"
    canvas: "gr.HTML"
    facts: "gr.HTML"
    png: "gr.DownloadButton"
    settings_file: "gr.DownloadButton"
    pasted: "gr.Textbox"
    apply: "gr.Button"
    visit: "gr.HTML"
    gallery: "gr.Gallery"
    history: "gr.State"


def add(service: Service) -> "gr.Dropdown":
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
            settings, examples, go, stop = _settings_column(service)
        with gr.Column(scale=6, min_width=300):
            canvas, facts, png, settings_file = _result_column()
    pasted, apply, visit, gallery = _bottom(service)
    return Layout(
        settings, examples, go, stop, canvas, facts, png, settings_file, pasted, apply, visit, gallery, history
    )


def _settings_column(service: Service) -> "tuple[Fields, dict[str, gr.Button], gr.Button, gr.Button]":
    """Add what a user fills in and presses; return the fields, the buttons of the examples, and those that start and
    cancel a job.
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
        settings = _more_settings(service, prompt, model, engine)
    return settings, examples, go, stop


def _more_settings(service: Service, prompt: "gr.Textbox", model: "gr.Dropdown", engine: "gr.Dropdown") -> Fields:
    """Add the fields that have good values already; return them with those that are there."""
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
    return Fields(prompt, negative, model, engine, steps, guidance, width, height, pictures, frames, seed, fresh)


def _result_column() -> "tuple[gr.HTML, gr.HTML, gr.DownloadButton, gr.DownloadButton]":
    """Add the picture, its figures, and the downloads of the picture and of its settings."""
    import gradio as gr

    ready = views.empty("No picture yet", "Write a prompt and press Generate, or click an example.")
    canvas = gr.HTML(ready, elem_id="canvas")
    facts = gr.HTML("")
    with gr.Row():
        png = gr.DownloadButton("Picture (PNG)", size="sm", interactive=False, elem_id="png", min_width=120)
        settings_file = gr.DownloadButton(
            "Settings (JSON)", size="sm", interactive=False, elem_id="json", min_width=120
        )
    return canvas, facts, png, settings_file


def _bottom(service: Service) -> "tuple[gr.Textbox, gr.Button, gr.HTML, gr.Gallery]":
    """Add pasted settings with their button, and the pictures of this visit under their line."""
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
    return pasted, apply, visit, gallery


def connect(layout: Layout, handlers: "GenerateHandlers") -> None:
    """Say which event calls which handler, with what, and what it may change."""
    import gradio as gr

    asked = layout.fields
    quiet: EventOptions = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    hidden: EventOptions = {"show_progress": "hidden", "api_visibility": "private"}
    at_once: EventOptions = {"queue": False, "api_visibility": "private"}
    # A set of inputs: the handler gets one dict of values by component.
    read = {*asked.all(), layout.history}
    result = [layout.canvas, layout.facts, layout.png, layout.settings_file, layout.pasted]
    working = [*result, layout.go, layout.stop, asked.seed, layout.history, layout.gallery, layout.visit]

    # Gradio finds out by annotations of its own types who asks and which picture was clicked; they end here.
    async def generate(values: Changes, request: gr.Request) -> AsyncIterator[Changes]:
        async with aclosing(handlers.generate(values, client_of(request))) as updates:
            async for changes in updates:
                yield changes

    def cancel(request: gr.Request) -> None:
        handlers.cancel(client_of(request))

    def recall(past: list[PastPicture], event: gr.SelectData) -> Changes:
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


def _engines(source: Source) -> list[tuple[str, str]]:
    """Return engines that can run here; what cannot is shown, with the reason, on the tab Inspect."""
    return [(choice.name, choice.name) for choice in source.engines() if not choice.why_not]


def _whole(value: object) -> object:
    """Return the whole number that a slider or number field gives as a float; anything else as it is, for
    :class:`Settings` to refuse.
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value
