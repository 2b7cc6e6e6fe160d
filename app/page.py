"""The page as Gradio blocks: the header, the tabs, and what they share. Building it starts nothing and loads nothing."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.app import views
from qdiff.app.service import Service

if TYPE_CHECKING:
    import gradio as gr

STYLE = Path(__file__).with_name("style.css")  # goes into the head as it is: Gradio would rewrite its selectors
EXAMPLES = {
    "Rocket": "a rocket on a blue background",
    "Cheese": "a cheese wedge on a red background",
    "Octopus": "an octopus on a yellow background",
    "Apple": "a red apple on a white background",
    "Snowman": "a snowman on a purple background",
    "Guitar": "a guitar on a green background",
}
CLIPS = {
    "Rocket": "a rocket flies up on a blue background",
    "Cheese": "a cheese wedge spins on a red background",
    "Octopus": "an octopus moves left on a yellow background",
    "Apple": "a red apple falls on a white background",
    "Snowman": "a snowman fades away on a purple background",
    "Guitar": "a guitar grows on a green background",
}  # of the same names, for models that make clips


def build_page(service: Service) -> "gr.Blocks":
    """Return the :class:`gradio.Blocks` of a service."""
    import gradio as gr

    from qdiff.app import api, tab_build, tab_compare, tab_generate, tab_inspect
    from qdiff.app.follow import client_of

    machine, gpu = describe_machine()
    with gr.Blocks(title="qdiff", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        api.add(service)  # first: the names are the endpoints', not those of the page's own events

        def head() -> str:
            state = service.builds.state()
            building = state.run if state is not None and state.state == "running" else ""
            return views.header(machine, gpu, service.queue_length, service.busy, building)

        top = gr.HTML(head())
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                generate = tab_generate.add(service)
            with gr.Tab("Compare", id="compare"):
                compare = tab_compare.add(service)
            with gr.Tab("Inspect", id="inspect") as inspect_tab:
                inspect = tab_inspect.add(service, inspect_tab)
            with gr.Tab("Build", id="build") as build_tab:
                tab_build.add(service, page, build_tab, lists=[generate, compare, inspect])
        clock = gr.Timer(3)
        clock.tick(head, None, top, show_progress="hidden", queue=False, api_visibility="private")

        def leave(request: gr.Request) -> None:
            service.cancel(client_of(request))

        page.unload(leave)
    page.queue(max_size=64, default_concurrency_limit=None, api_open=False)
    return page


def describe_machine() -> tuple[str, bool]:
    """Return the processor in a few words, and whether there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), True
    return f"{os.cpu_count()} CPU cores, {platform.machine()}", False
