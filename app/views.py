"""Pieces of HTML that the page shows. Everything that somebody typed or a file said passes :func:`text` here, so a prompt is
text wherever it appears; the page puts no string of its own together.

Pictures are put in as ``data:`` addresses: nothing on disk has to be reachable for a picture to be seen.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.app.drawing import file_of
from qdiff.events import duration
from qdiff.report.data import db, megabytes, seconds, times

if TYPE_CHECKING:
    from PIL.Image import Image

    from qdiff.app.builds import BuildState
    from qdiff.app.drawing import Made
    from qdiff.app.jobs import Update
    from qdiff.errors import QdiffError


def text(value: object) -> str:
    """Return any value as escaped text for a page."""
    return html.escape(str(value), quote=True)


def picture(path: Path, alt: str, kind: str = "") -> str:
    """Return a finished picture, or the clip that it is a strip of. Small ones are enlarged without smoothing: what is
    judged are the pixels.
    """
    file = file_of(path)
    data = base64.b64encode(file.read_bytes()).decode()
    if file.suffix == ".mp4":
        return (
            f'<video class="qd-picture {kind}" src="data:video/mp4;base64,{data}" aria-label="{text(alt)}" '
            "autoplay loop muted playsinline controls></video>"
        )
    return f'<img class="qd-picture {kind}" src="data:image/png;base64,{data}" alt="{text(alt)}">'


def preview(image: Image) -> str:
    """Return a latent preview, as many pixels large as the latent; the style sheet enlarges it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="qd-preview" src="data:image/png;base64,{data}" alt="preview of the picture while it forms">'


def _canvas(kind: str, inside: str) -> str:
    live = 'role="alert"' if kind == "error" else 'role="status" aria-live="polite"'
    return f'<div class="qd-canvas {kind}" {live}>{inside}</div>'


def _words(title: str, below: str = "") -> str:
    return f"<div class='qd-words'><strong>{title}</strong>{f'<span>{below}</span>' if below else ''}</div>"


def empty(title: str, below: str) -> str:
    """Return the view of a page on which nothing was asked for yet."""
    return _canvas("empty", '<div class="qd-mark" aria-hidden="true"></div>' + _words(text(title), text(below)))


def failed(error: QdiffError | None) -> str:
    """Return what went wrong, and what to do about it."""
    if error is None:
        return _canvas("error", _words("It failed."))
    return _canvas("error", _words(text(error.message), text(error.fix or "")))


def cancelled() -> str:
    """Return the visitor stopped it."""
    return _canvas("empty", _words("Cancelled", "Nothing was kept. The settings are as they were."))


def progress(update: Update[object]) -> str:
    """Return the view of a job that is queued or running, with the newest preview."""
    if update.state == "queued":
        ahead = update.place - 1
        title = "You are next" if ahead <= 0 else f"{ahead} ahead of you in the queue"
        left = (
            f"about {duration(update.seconds_left)} until it begins"
            if update.seconds_left
            else "it begins as soon as it can"
        )
        return _canvas("busy", '<div class="qd-pulse" aria-hidden="true"></div>' + _words(title, left))
    image = preview(update.preview) if update.preview is not None else '<div class="qd-pulse" aria-hidden="true"></div>'
    if not update.step:
        return _canvas("busy", image + _words(text(update.task.capitalize() or "Starting"), "a moment"))
    share = 100 * update.step / max(update.steps, 1)
    left = f"about {duration(update.seconds_left)} left" if update.seconds_left is not None else ""
    bar = f'<div class="qd-bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></div>'
    return _canvas(
        "busy", image + bar + _words(f"Step {update.step} of {update.steps}", f"{text(update.task)}, {left}")
    )


def made(result: Made) -> str:
    """Return a finished request."""
    images = "".join(picture(path, result.settings.prompt) for path in result.paths)
    return _canvas("done" if len(result.paths) == 1 else "done many", images)


def past(path: Path, prompt: str) -> str:
    """Return a picture of this visit, shown again."""
    return _canvas("done", picture(path, prompt))


def facts(result: Made) -> str:
    """Return the line below a picture."""
    settings = result.settings
    parts = [
        f"{seconds(result.seconds)}",
        f"{seconds(result.seconds_per_step)} a step",
        f"{settings.steps} steps",
        f"guidance {settings.guidance:g}",
        f"seed {settings.seed}",
        f"{settings.width} × {settings.height}",
        *([f"{settings.frames} frames"] if settings.frames else []),
        result.engine,
        result.note,
        *result.warnings,
    ]
    return _chips(parts)


def _chips(parts: Iterable[object]) -> str:
    return '<p class="qd-facts">' + "".join(f"<span>{text(part)}</span>" for part in parts) + "</p>"


def comparison(rows: Sequence[Made], titles: dict[str, str]) -> str:
    """Return a card for each engine: step latency, distance to float, memory, size."""
    base = rows[0]
    cards = []
    for row in rows:
        quick = base.seconds_per_step / row.seconds_per_step if row is not base and row.seconds_per_step else None
        measured: list[tuple[str, str, str]] = [
            (
                "One step",
                seconds(row.seconds_per_step),
                times(quick) + " as fast as float" if quick else "the reference",
            ),
            (
                "PSNR",
                db(row.psnr_db) if row is not base else "–",
                f"SSIM {row.ssim:.4f}" if row.ssim is not None else "",
            ),
            ("Memory", megabytes(row.memory_bytes), "weights and work"),
            ("On disk", megabytes(row.size_bytes), ""),
        ]
        rows_html = "".join(
            f"<div><dt>{name}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>"
            for name, value, note in measured
        )
        cards.append(
            f'<section class="qd-card"><h3>{text(row.engine)}</h3><p>{text(titles.get(row.engine, ""))}</p>'
            f"<dl>{rows_html}</dl></section>"
        )
    note = ""
    if any(row.disturbed for row in rows):
        note = '<p class="qd-note">Other work ran beside this: the times are longer than the engines are.</p>'
    return f'<div class="qd-cards">{"".join(cards)}</div>{note}'


def in_step(path: Path, engine: str) -> str:
    """Return two clips in one file, the float model's on the left."""
    data = base64.b64encode(path.read_bytes()).decode()
    label = text(f"float (left) and {engine} (right)")
    return _canvas(
        "done pair",
        f'<figure><video class="qd-pair" src="data:video/mp4;base64,{data}" aria-label="{label}" autoplay loop muted playsinline '
        f"controls></video><figcaption><span>float</span><span>{text(engine)}</span></figcaption></figure>",
    )


def blind(left: Path, right: Path, answer: str = "") -> str:
    """Return two pictures without names; ``answer`` is shown once there is one."""
    sides = zip("AB", (left, right), strict=True)
    figures = "".join(
        f"<figure>{picture(path, f'picture {name}')}<figcaption>{name}</figcaption></figure>" for name, path in sides
    )
    return f'<div class="qd-blind">{figures}</div>' + (
        f'<p class="qd-answer" role="status">{answer}</p>' if answer else ""
    )


def header(machine: str, gpu: bool, waiting: int, busy: bool, building: str) -> str:
    """Return name, machine, and what the service does now."""
    state = f"{waiting} waiting" if waiting else "drawing" if busy else "idle"
    chips = [f'<span class="qd-chip">{text(machine)}</span>']
    if not gpu:
        chips.append(
            '<span class="qd-chip quiet" title="Engines for NVIDIA GPUs can be built here, not run">no GPU</span>'
        )
    chips.append(f'<span class="qd-chip {"on" if busy else "quiet"}">{state}</span>')
    if building:
        chips.append(f'<span class="qd-chip on">building {text(building)}</span>')
    return (
        '<header class="qd-head"><div><h1>qdiff</h1><p>The same pictures from the float model and from its quantized engines.'
        f'</p></div><div class="qd-chips">{"".join(chips)}</div></header>'
    )


def build(state: BuildState | None) -> str:
    """Return the build that runs or ran last."""
    if state is None:
        return empty(
            "No build yet", "Choose a recipe on the left. A build runs beside the pictures and survives a reload."
        )
    if state.state == "failed":
        return failed_build(state)
    steps = "".join(
        f'<li class="{kind}"><b></b>{text(_stage_title(name))}</li>' for name, kind in state.stages if name != "start"
    )
    left = f"about {duration(state.seconds_left)} left" if state.seconds_left is not None else ""
    titles = {
        "running": (f"Building {text(state.run)}", f"{duration(state.seconds)} so far, {left}"),
        "done": (
            f"{text(state.run)} is ready",
            f"It took {duration(state.seconds)} and is in the lists of models now.",
        ),
        "cancelled": (f"{text(state.run)} was stopped", "What it finished is kept: the same choices go on from there."),
    }
    title, below = titles[state.state]
    bar = f'<div class="qd-bar"><i style="width:{100 * state.share:.1f}%"></i></div>'
    return (
        f'<div class="qd-build {state.state}" role="status" aria-live="polite">{_words(title, below)}{bar}'
        f"<ol>{steps}</ol>{_log(state)}</div>"
    )


def failed_build(state: BuildState) -> str:
    """Return a build that ended with an error."""
    words = _words(f"{text(state.run)} was not built", f"{text(state.error)} {text(state.fix)}")
    return f'<div class="qd-build failed" role="alert">{words}{_log(state)}</div>'


def _log(state: BuildState) -> str:
    lines = "\n".join(text(line) for line in state.log[-12:])
    return f"<details><summary>Log</summary><pre>{lines}</pre></details>" if lines else ""


def _stage_title(name: str) -> str:
    verb, _, choice = name.partition(":")
    verbs = {
        "calibrate": "Calibrate: record the model's own trajectory",
        "quantize": "Quantize: decide every layer",
        "export": "Export and check the graph",
        "build": "Build",
        "compare": "Compare with float",
        "report": "Report",
    }
    return f"{verbs.get(verb, verb)} ({choice})" if choice else verbs.get(verb, verb)


def table(header_row: Sequence[str], rows: Sequence[Sequence[object]], label: str) -> str:
    """Return a table that scrolls inside itself on a narrow screen."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header_row)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="qd-scroll" tabindex="0" role="region" aria-label="{text(label)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
