"""The tab Inspect: what a run decided and what came of it. Drawn when it is looked at."""

from typing import TYPE_CHECKING

from qdiff.app import plan_picture, views
from qdiff.app.follow import EventOptions
from qdiff.app.service import Service

if TYPE_CHECKING:
    import gradio as gr


def add(service: Service, tab: "gr.Tab") -> "gr.Dropdown":
    """Add the tab's components; return the list of models, which a finished build changes."""
    import gradio as gr

    from qdiff.app.tab_generate import _names

    first = next((source for source in service.sources.all() if source.quantized), service.sources[""])
    model = gr.Dropdown(_names(service), value=first.name, label="Model", filterable=False, elem_id="inspect-model")
    shown = gr.HTML(views.empty("Reading the plan", "a moment"), elem_id="inspect")

    def inspect(name: str) -> str:
        try:
            return plan_picture.inspect(service.sources[name])
        except Exception as error:
            return views.failed(service.shown(error))

    quiet: EventOptions = {
        "show_progress": "hidden",
        "concurrency_limit": 2,
        "concurrency_id": "inspect",
        "api_visibility": "private",
    }
    tab.select(inspect, model, shown, **quiet)
    model.change(inspect, model, shown, **quiet)
    return model
