"""Answer the events of the tab Generate. The components are laid out, and the events connected, in :mod:`.tab_generate`.

A handler returns changes: what each component shows from now on, by component.
"""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.app import views
from qdiff.app.drawing import Defaults, Made, file_of
from qdiff.app.follow import Changes, alert, drawn
from qdiff.app.service import Service
from qdiff.app.settings import PastPicture, Settings
from qdiff.app.tab_generate import Layout, _engines, _names, _whole
from qdiff.errors import QdiffError

if TYPE_CHECKING:
    import gradio as gr

_HISTORY = 24  # pictures of a visit that are kept


class GenerateHandlers:
    """Handlers of the tab's events.

    Args:
        service: draws the pictures.
        layout: the components whose values are read and changed.
    """

    def __init__(self, service: Service, layout: Layout) -> None:
        self.service, self.layout = service, layout

    async def generate(self, values: Changes, client: str) -> AsyncGenerator[Changes, None]:
        """Yield what the page shows while a picture is drawn, to the picture or to the error.

        Args:
            values: of the fields and the history, by component.
            client: who asks.
        """
        import gradio as gr

        layout, service = self.layout, self.service
        idle: Changes = {layout.go: gr.Button(interactive=True), layout.stop: gr.Button(interactive=False)}
        try:
            job = service.generate(self._settings(values), client)
        except QdiffError as error:
            yield {**idle, layout.canvas: views.failed(error), layout.facts: ""}
            return
        except Exception as error:
            yield {**idle, layout.canvas: views.failed(service.shown(error)), layout.facts: ""}
            return
        yield {
            layout.canvas: views.progress(job.update),
            layout.facts: "",
            layout.go: gr.Button(interactive=False),
            layout.stop: gr.Button(interactive=True),
        }
        history = values[layout.history]
        past: list[PastPicture] = history if isinstance(history, list) else []
        async for changes in drawn(service, job, idle, layout.canvas, lambda made: self._result(made, past)):
            yield changes

    def cancel(self, client: str) -> None:
        """Cancel the client's job, whether it waits or runs."""
        self.service.cancel(client)

    def example(self, name: str, model: str) -> str:
        """Return the prompt of an example: of a clip where the model makes clips."""
        from qdiff.app.page import CLIPS, EXAMPLES

        return (CLIPS if self.service.sources[model].family.media == "video" else EXAMPLES)[name]

    def change_model(self, name: str, engine_now: str) -> "tuple[gr.Dropdown, int, float, int, int, gr.Slider]":
        """Return the engines of another model, the one that is chosen where the model has it, and the model's own
        settings: steps, guidance, width, height, frames.
        """
        import gradio as gr

        try:
            source = self.service.sources[name]
            own = self.service.defaults(source)
        except QdiffError as error:
            raise alert(self.service, error) from None
        choices = _engines(source)
        value = engine_now if engine_now in [value for _, value in choices] else source.engine("")
        length = _length(own, own.frames)
        return gr.Dropdown(choices, value=value), own.steps, own.guidance, own.width, own.height, length

    def paste(self, words: str) -> Changes:
        """Return the fields as the pasted settings say."""
        try:
            return self._fill(Settings.parse(words or "", self.service.limits.settings_characters))
        except Exception as error:
            raise alert(self.service, error) from None

    def recall(self, past: list[PastPicture], index: int) -> Changes:
        """Return the picture of this visit that was clicked, with its settings; only those when its file is gone."""
        layout = self.layout
        try:
            entry = past[index]
            path = Path(entry["path"])
            shown: Changes = {}
            if path.exists():
                shown = {layout.canvas: views.past(path, str(entry["settings"]["prompt"])), **self._downloads(path)}
            settings = Settings.make(**entry["settings"])
            return {
                **self._fill(settings),
                **shown,
                layout.facts: "",
                layout.pasted: json.dumps(entry["settings"], indent=2, ensure_ascii=False),
            }
        except Exception as error:
            raise alert(self.service, error) from None

    def _settings(self, values: Changes) -> Settings:
        fields = self.layout.fields
        model, guidance, seed = str(values[fields.model] or ""), values[fields.guidance], values[fields.seed]
        is_video = self.service.sources[model].family.media == "video"
        return Settings.make(
            prompt=values[fields.prompt] or "",
            negative_prompt=values[fields.negative] or "",
            model=model,
            engine=values[fields.engine],
            steps=_whole(values[fields.steps]),
            guidance=float(guidance) if isinstance(guidance, int) else guidance,
            seed=None if values[fields.fresh] or seed is None else _whole(seed),
            width=_whole(values[fields.width]),
            height=_whole(values[fields.height]),
            pictures=_whole(values[fields.pictures]) or 1,
            frames=_whole(values[fields.frames]) if is_video else None,
        )

    def _result(self, made: Made, past: list[PastPicture]) -> Changes:
        import gradio as gr

        layout = self.layout
        new: list[PastPicture] = []
        for path, one in zip(made.paths, made.each(), strict=True):
            file = path.with_suffix(".json")
            file.write_text(json.dumps(one.facts(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            new.append({"path": str(path), "settings": one.settings.to_json()})
        past = [entry for entry in [*new, *past] if Path(entry["path"]).exists()][:_HISTORY]
        return {
            layout.canvas: views.made(made),
            layout.facts: views.facts(made),
            **self._downloads(made.paths[0]),
            layout.pasted: json.dumps(made.settings.to_json(), indent=2, ensure_ascii=False),
            layout.fields.seed: made.settings.seed,
            layout.history: past,
            layout.gallery: gr.Gallery(value=[entry["path"] for entry in past], visible=True),
            layout.visit: gr.HTML(visible=True),
        }

    def _downloads(self, path: Path) -> Changes:
        import gradio as gr

        label = "Clip (MP4)" if file_of(path) != path else "Picture (PNG)"
        return {
            self.layout.png: gr.DownloadButton(label, value=str(file_of(path)), interactive=True),
            self.layout.settings_file: gr.DownloadButton(value=str(path.with_suffix(".json")), interactive=True),
        }

    def _fill(self, settings: Settings) -> Changes:
        import gradio as gr

        fields, service = self.layout.fields, self.service
        source = service.sources[settings.model]
        own, name = service.defaults(source), source.engine(settings.engine)
        service.limits.check(settings, source.family.size_divisor, source.family.media)
        return {
            fields.prompt: settings.prompt,
            fields.negative: settings.negative_prompt,
            fields.model: gr.Dropdown(_names(service), value=source.name),
            fields.engine: gr.Dropdown(_engines(source), value=name),
            fields.steps: settings.steps or own.steps,
            fields.guidance: own.guidance if settings.guidance is None else settings.guidance,
            fields.seed: settings.seed,
            fields.fresh: settings.seed is None,
            fields.width: settings.width or own.width,
            fields.height: settings.height or own.height,
            fields.pictures: settings.pictures,
            fields.frames: _length(own, settings.frames or own.frames),
        }


def _length(own: Defaults, value: int | None) -> "gr.Slider":
    """Return the slider of frames; it is hidden where the model makes pictures."""
    import gradio as gr

    step = own.frames_step
    return gr.Slider(1 + step, value=value or 1 + step, step=step, visible=own.frames is not None)
