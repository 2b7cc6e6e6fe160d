"""The tab Compare: one seed on float and on engines, a slider over the two, and a round of "which one is quantized?"."""

import functools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from qdiff.app import views
from qdiff.app.drawing import Made
from qdiff.app.follow import Changes, EventOptions, client_of, drawn
from qdiff.app.service import Service
from qdiff.app.settings import Settings
from qdiff.app.sources import Source
from qdiff.errors import QdiffError

if TYPE_CHECKING:
    import gradio as gr

_SLIDER_SIDE = 512  # smaller pictures are enlarged by whole factors, without smoothing


class EnginePicture(TypedDict):
    """An engine's picture of a comparison; ``beside`` is the clip with float's on the left, or empty."""

    engine: str
    path: str
    beside: str


class Round(TypedDict):
    """A question "which one is quantized?": the two pictures as they are shown, and what the answer uncovers."""

    order: list[EnginePicture]
    cards: str
    names: list[str]


def add(service: Service) -> "gr.Dropdown":
    """Add the tab's components; return the list of models, which a finished build changes."""
    import gradio as gr

    from qdiff.app.tab_generate import _names, _whole

    limits = service.limits
    first = next((source for source in service.sources.all() if source.quantized), service.sources[""])
    nothing = views.empty(
        "Nothing compared yet", "The same prompt and seed are drawn by the float model and by each engine."
    )
    none_there = views.empty(
        "Nothing to compare with", "This model has no quantized engine yet. Build one on the Build tab."
    )
    round_ = gr.State(None, time_to_live=3600)
    made_state = gr.State([], time_to_live=3600)
    score = gr.State((0, 0), time_to_live=3600)

    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            prompt = gr.Textbox(
                "a rocket on a blue background", label="Prompt", lines=2, max_lines=5, max_length=limits.prompt_characters,
                elem_id="compare-prompt",
            )  # fmt: skip
            model = gr.Dropdown(
                _names(service), value=first.name, label="Model", filterable=False, elem_id="compare-model"
            )
            choices = _quantized(first)
            engines = gr.CheckboxGroup(
                choices, value=choices[:1], label="Engines beside float", elem_id="compare-engines"
            )
            with gr.Row():
                seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=100)
                steps = gr.Slider(1, limits.steps, service.defaults(first).steps, step=1, label="Steps", min_width=160)
            hide = gr.Checkbox(False, label="Blind: let me guess which one is quantized", elem_id="blind")
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare", scale=3)
                stop = gr.Button(
                    "Cancel", variant="stop", interactive=False, scale=1, min_width=90, elem_id="compare-cancel"
                )
        with gr.Column(scale=6, min_width=300):
            canvas = gr.HTML(nothing if first.quantized else none_there, elem_id="compare-canvas")
            slider = gr.ImageSlider(
                visible=False, type="filepath", format="png", interactive=False, show_label=True, elem_classes="qd-slider",
                label="float (left), engine (right)", elem_id="slider", buttons=["fullscreen"], max_height=520,
            )  # fmt: skip
            shown = gr.Radio([], label="On the right", visible=False, elem_id="shown")
            with gr.Row(visible=False) as guesses:
                guess_a = gr.Button("A is quantized", elem_id="guess-a", min_width=110)
                guess_b = gr.Button("B is quantized", elem_id="guess-b", min_width=110)
                skip = gr.Button("I see no difference", elem_id="guess-none", min_width=110)
            cards = gr.HTML("", elem_id="cards")

    working = [canvas, slider, shown, guesses, cards, go, stop, round_, made_state]

    async def compare(
        prompt: str, model: str, engines: list[str], seed: float | None, steps: float, hide: bool, request: gr.Request
    ) -> AsyncIterator[Changes]:
        idle: Changes = {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
        clean: Changes = {
            slider: gr.ImageSlider(visible=False), shown: gr.Radio(visible=False), guesses: gr.Row(visible=False), cards: "",
        }  # fmt: skip
        try:
            wanted = None if seed is None else _whole(seed)
            settings = Settings.make(prompt=prompt or "", model=model, seed=wanted, steps=_whole(steps))
            job = service.compare(settings, list(engines or []), client_of(request))
        except Exception as error:
            shown_error = error if isinstance(error, QdiffError) else service.shown(error)
            yield {**idle, **clean, canvas: gr.HTML(views.failed(shown_error), visible=True)}
            return
        yield {
            **clean, canvas: gr.HTML(views.progress(job.update), visible=True), go: gr.Button(interactive=False),
            stop: gr.Button(interactive=True),
        }  # fmt: skip
        async for changes in drawn(service, job, idle, canvas, lambda made: _result(made, hide)):
            yield changes

    def _result(rows: list[Made], hide: bool) -> Changes:
        names = [row.engine for row in rows[1:]]
        state: list[EnginePicture] = [
            {"engine": row.engine, "path": str(row.paths[0]), "beside": str(row.beside or "")} for row in rows
        ]
        titles = {choice.name: choice.title for choice in service.sources[rows[0].settings.model].engines()}
        told = views.comparison(rows, titles)
        if hide:
            order = random.SystemRandom().sample([state[0], state[1]], 2)
            question = views.blind(Path(order[0]["path"]), Path(order[1]["path"]))
            asked: Round = {"order": order, "cards": told, "names": names}
            return {
                canvas: gr.HTML(question, visible=True), guesses: gr.Row(visible=True), made_state: state, round_: asked,
            }  # fmt: skip
        return {made_state: state, cards: told, **_reveal(state, names[0]), shown: _names_of(names)}

    def _names_of(names: list[str]) -> gr.Radio:
        return gr.Radio(names, value=names[0], visible=len(names) > 1)

    def _reveal(state: list[EnginePicture], engine: str) -> Changes:
        """Return the float model's picture and an engine's under a slider, or their clips in step."""
        other = next(row for row in state if row["engine"] == engine)
        if other["beside"]:
            return {
                slider: gr.ImageSlider(visible=False),
                canvas: gr.HTML(views.in_step(Path(other["beside"]), engine), visible=True),
            }
        pair = (enlarged(Path(state[0]["path"])), enlarged(Path(other["path"])))
        label = f"float (left) and {engine} (right)"
        return {slider: gr.ImageSlider(pair, visible=True, label=label), canvas: gr.HTML(visible=False)}

    def choose(engine: str, state: list[EnginePicture]) -> Changes:
        pair = [row for row in state if row["engine"] in ("float", engine)]
        if len(pair) != 2 or not all(Path(row["path"]).exists() for row in pair):
            return {slider: gr.skip()}
        return _reveal(state, engine)

    def answer(guess: str, asked: Round | None, state: list[EnginePicture], tally: tuple[int, int]) -> Changes:
        if not asked:
            return {guesses: gr.Row(visible=False)}
        order = asked["order"]
        quantized = "A" if order[0]["engine"] != "float" else "B"
        right, total = tally[0] + (guess == quantized), tally[1] + (guess != "")
        verdict = {quantized: "Right.", "": "Fair enough."}.get(guess, "No.")
        words = f"{verdict} {quantized} is quantized ({views.text(state[1]['engine'])})."
        words += f" {right} of {total} right so far." if total else ""
        seen = views.blind(Path(order[0]["path"]), Path(order[1]["path"]), words)
        return {
            **_reveal(state, asked["names"][0]), shown: _names_of(asked["names"]),
            canvas: gr.HTML(seen, visible=True), guesses: gr.Row(visible=False),
            cards: asked["cards"], round_: None, score: (right, total),
        }  # fmt: skip

    quiet: EventOptions = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    inputs = [prompt, model, engines, seed, steps, hide]
    gr.on([go.click, prompt.submit], compare, inputs, working, **quiet)
    shown.input(choose, [shown, made_state], [slider, canvas], **quiet)
    told = [canvas, guesses, cards, round_, score, slider, shown]
    for button, guess in ((guess_a, "A"), (guess_b, "B"), (skip, "")):
        button.click(functools.partial(answer, guess), [round_, made_state, score], told, **quiet)

    def cancel(request: gr.Request) -> None:
        service.cancel(client_of(request))

    stop.click(cancel, None, None, queue=False, api_visibility="private")

    def changed(name: str) -> tuple[gr.CheckboxGroup, str]:
        source = service.sources[name]
        names = _quantized(source)
        return gr.CheckboxGroup(names, value=names[:1]), nothing if source.quantized else none_there

    model.change(changed, model, [engines, canvas], **quiet)
    return model


def _quantized(source: Source) -> list[str]:
    return [choice.name for choice in source.engines() if choice.name != "float" and not choice.why_not]


def enlarged(path: Path) -> str:
    """Return the path of a copy that a slider can show: pictures of 64 pixels would stay that small."""
    from PIL import Image

    with Image.open(path) as image:
        factor = _SLIDER_SIDE // max(image.size)
        if factor < 2:
            return str(path)
        large = path.with_name(f"{path.stem}-x{factor}.png")
        if not large.exists():
            image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(large)
        return str(large)
