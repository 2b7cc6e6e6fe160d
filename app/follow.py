"""From jobs to Gradio's events: a job is followed without a thread, and what goes wrong arrives as words.

A generator that blocks holds one of Gradio's forty threads for as long as somebody waits; sixteen waiting visitors would leave
few for the page itself. Looking at the job's state twelve times a second costs nothing and holds none.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

from qdiff.app import views
from qdiff.app.jobs import Job, Update
from qdiff.app.service import Service

if TYPE_CHECKING:
    import gradio as gr
    from gradio.blocks import Block

    Changes = dict[Block, object]
else:
    Changes = dict  # Gradio evaluates the annotations of handlers
"""Maps components of the page to what they show from now on: a value or an update."""

_POLL_SECONDS = 0.08
T = TypeVar("T")


class EventOptions(TypedDict, total=False):
    """Holds how Gradio treats an event of the page; each field is an argument of its listeners."""

    show_progress: Literal["full", "minimal", "hidden"]
    queue: bool
    concurrency_limit: int | None
    concurrency_id: str
    api_visibility: Literal["public", "private", "undocumented"]


async def follow(service: Service, job: Job[T]) -> AsyncGenerator[Update[T], None]:
    """Yield the job's states, newest only, to the final one. Who stops listening (a closed page) cancels the job."""
    seen = None
    try:
        while True:
            update = job.update
            if update is not seen:
                yield update
                seen = update
            if update.final:
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        if not job.update.final:
            service.cancel(job.client)


async def drawn(
    service: Service, job: Job[T], idle: Changes, canvas: "gr.HTML", result: Callable[[T], Changes]
) -> AsyncGenerator[Changes, None]:
    """Yield what a page shows of a job, update by update, on its ``canvas``.

    Args:
        service: that runs the job.
        job: whose progress is shown.
        idle: what is shown again when the job has ended, however it did.
        canvas: the element of the page that is updated.
        result: what is shown of the job's result.
    """
    async for update in follow(service, job):
        if update.state == "done":
            assert update.result is not None  # drawings return what they made
            yield {**idle, **result(update.result)}
        elif update.state == "failed":
            yield {**idle, canvas: views.failed(update.error)}
        elif update.state == "cancelled":
            yield {**idle, canvas: views.cancelled()}
        else:
            yield {canvas: views.progress(update)}


def alert(service: Service, error: BaseException) -> "gr.Error":
    """Return a :class:`gradio.Error` with words of ours. Gradio shows its message as HTML, so it is escaped here."""
    import gradio as gr

    shown = service.shown(error)
    return gr.Error(
        views.text(f"{shown.message} {shown.fix or ''}".strip()),
        title="That did not work",
        duration=8,
        print_exception=False,
    )


def client_of(request: "gr.Request | None") -> str:
    """Return who asks: Gradio's session, one for each open page and for each API client."""
    return str(getattr(request, "session_hash", None) or "unknown")
