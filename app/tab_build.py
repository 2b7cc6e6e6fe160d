"""The tab Build: a model, a recipe, a budget, and a build that anyone who opens the page sees."""

from typing import TYPE_CHECKING

from qdiff.app import views
from qdiff.app.builds import buildable_engines
from qdiff.app.follow import Changes, EventOptions, alert
from qdiff.app.service import Service
from qdiff.app.sources import BUDGETS

if TYPE_CHECKING:
    import gradio as gr

_WORDS = {"quick": "a first look", "standard": "as the command line", "thorough": "for the last tenth of a dB"}


def add(service: Service, page: "gr.Blocks", tab: "gr.Tab", lists: "list[gr.Dropdown]") -> None:
    """Add the tab's components. ``lists`` are the other tabs' lists of models: a finished build joins them."""
    import gradio as gr

    from qdiff.app.tab_generate import _names
    from qdiff.recipes import built_in, load_recipe

    models = list(service.sources.buildable())
    engines = buildable_engines()
    running_here = [name for name, runs in engines.items() if runs]

    def about(recipe: str) -> str:
        return f'<p class="qd-note">{views.text(load_recipe(recipe).description)}</p>'

    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            model = gr.Dropdown(
                models, value=models[0] if models else None, label="Model", filterable=False, elem_id="build-model"
            )
            recipe = gr.Dropdown(built_in(), value="int8", label="Recipe", filterable=False, elem_id="recipe")
            described = gr.HTML(about("int8"))
            budget = gr.Radio(
                [(f"{name}: {count} prompts, {_WORDS[name]}", name) for name, count in BUDGETS.items()], value="quick",
                label="Calibration budget", elem_id="budget",
            )  # fmt: skip
            wanted = gr.CheckboxGroup(
                [(name if name in running_here else f"{name} (cannot run here)", name) for name in engines],
                value=running_here[:1], label="Engines to build", elem_id="build-engines",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button("Calibrate and build", variant="primary", elem_id="build", scale=3)
                stop = gr.Button("Stop", variant="stop", elem_id="build-stop", scale=1, min_width=90)
        with gr.Column(scale=6, min_width=300):
            shown = gr.HTML(elem_id="build-state")
    clock = gr.Timer(1.0, active=False)
    seen = gr.State(service.sources.version)
    outputs = [shown, go, stop, clock, seen, *lists]

    def state(version: int) -> Changes:
        now = service.builds.state()
        running = now is not None and now.state == "running"
        found: Changes = {
            shown: views.build(now), go: gr.Button(interactive=not running), stop: gr.Button(interactive=running),
            clock: gr.Timer(active=running), seen: service.sources.version,
        }  # fmt: skip
        if version != service.sources.version:
            found |= {one: gr.Dropdown(choices=_names(service)) for one in lists}
        return found

    def begin(model: str, recipe: str, budget: str, wanted: list[str], version: int) -> Changes:
        try:
            service.start_build(model or "", recipe or "", budget or "", list(wanted or []))
        except Exception as error:
            raise alert(service, error) from None
        return state(version)

    def end(version: int) -> Changes:
        service.builds.cancel()
        return state(version)

    quiet: EventOptions = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    go.click(begin, [model, recipe, budget, wanted, seen], outputs, **quiet)
    stop.click(end, seen, outputs, **quiet)
    clock.tick(state, seen, outputs, **quiet)
    page.load(lambda: state(-1), None, outputs, **quiet)  # a reload finds the build, and runs that were made meanwhile
    tab.select(state, seen, outputs, **quiet)  # another visitor may have begun one since
    recipe.change(about, recipe, described, **quiet)
