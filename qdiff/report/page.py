"""The report of a run: one HTML page that stands alone, and the same facts as JSON.

A report is mailed, attached to a ticket and opened years later, so the page has everything inside: pictures as data
URIs (lossless WebP: an error of one grey level must survive), plots as inline SVG, one small script for the slider.
It loads nothing, and its Content-Security-Policy forbids it to: the only script that runs is the one whose hash the
policy names. Prompts are text that others wrote; the template engine escapes every value.

What was not measured is ``None`` and the page says so. NaN is refused, because a page with a hole in it looks finished.
dB values are clamped to 100 dB (equal signals), see :mod:`qdiff.evaluation.metrics`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.errors import InputError
from qdiff.evaluation.images import difference
from qdiff.evaluation.metrics import DB_CAP, decibels
from qdiff.events import track
from qdiff.files import safe_child, write_json, write_text
from qdiff.report.data import (
    NOT_MEASURED,
    AllocationResult,
    AttentionResult,
    EngineResult,
    HeadResult,
    LayerResult,
    ModelInfo,
    PlanResult,
    PromptResult,
    Quality,
    ReportData,
    Sizes,
    StageResult,
    TimestepError,
    count,
    db,
    megabytes,
    percent,
    seconds,
    times,
)
from qdiff.report.plots import allocation_plot, engine_plot, format_colours, layer_plot, timestep_plot

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "AllocationResult",
    "AttentionResult",
    "EngineResult",
    "HeadResult",
    "LayerResult",
    "ModelInfo",
    "PlanResult",
    "PromptResult",
    "Quality",
    "ReportData",
    "Sizes",
    "StageResult",
    "TimestepError",
    "checked",
    "headline",
    "summary_lines",
    "write_report",
]

MAX_PICTURE_PAIRS = 24
INLINE_BYTES = 32_000_000
"""What the pictures of a page may weigh, roughly (two bytes a pixel): more pairs are shown smaller."""
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_path: Path | str, data: ReportData) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the run folder, each whole or not at all.

    Pictures that are missing or damaged become a warning in both files.

    Returns:
        the paths of the page and of the JSON.

    Raises:
        InputError: a number is NaN or (other than a dB value) infinite, or a field has the wrong type; names the field.
        IntegrityError: a picture's path leads out of the run folder.
    """
    import jinja2

    run = Path(run_path)
    data = checked(data)
    pictures = _pictures(run, data)
    colours = format_colours(data.layers)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({form.__name__: form for form in (megabytes, seconds, db, times, percent, count)})
    script = (_TEMPLATES / "report.js.j2").read_text(encoding="utf-8")
    page = environment.get_template("report.html.j2").render(
        data=data,
        headline=headline(data),
        pictures=pictures,
        pictures_left_out=len(data.prompts) - len(pictures),
        colours=colours,
        masks=_masks(run, data),
        plots={
            "layers": layer_plot(data.layers, colours),
            "time": timestep_plot(data),
            "allocation": allocation_plot(data.allocation),
            "engines": engine_plot(data),
        },
        weakest=sorted((one for one in data.layers if one.sqnr_db is not None), key=lambda one: one.sqnr_db or 0.0)[:5],
        db_cap=DB_CAP,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    html_path, json_path = run / "report.html", run / "report.json"
    write_text(html_path, page)
    write_json(json_path, asdict(data))
    return html_path, json_path


def checked(data: ReportData) -> ReportData:
    """Return a copy whose numbers are finite (dB values clamped), whose fields have their types and whose text has a
    UTF-8 form.

    Raises:
        InputError: naming the field.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ReportData).validate_python(_clean(asdict(data), "report"))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"report.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _clean(value: object, place: str) -> object:
    if isinstance(value, dict):
        return {_clean(key, place): _clean(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        clamped = decibels(value) if "_db" in place.rpartition(".")[2] and not math.isnan(value) else value
        if not math.isfinite(clamped):
            raise InputError(
                f"{place} is {value}", "a report takes finite numbers; leave out what was not measured (None)"
            )
        return clamped
    return value


def headline(data: ReportData) -> str:
    """Return the result in one sentence, made of what was measured."""
    engine, quality, gains = data.chosen, data.quality, []
    if data.size_ratio:
        gains.append(f"{times(data.size_ratio)} smaller")
    if engine and engine.reliable_speedup:
        gains.append(f"{times(engine.reliable_speedup)} as fast per step on {engine.title}")
    first = " and ".join(gains) + "." if gains else "Size and speed were not measured."
    if engine and engine.speed_reason:
        first += " The machine was too busy to tell the speed."
    if quality.psnr_db_mean is None:
        return f"{first} Pictures were not compared."
    if quality.psnr_db_min is not None and quality.psnr_db_min >= DB_CAP:
        return f"{first} Pictures are identical to the float model’s."
    return f"{first} Pictures stay at {db(quality.psnr_db_mean)} PSNR against the float model’s."


def summary_lines(data: ReportData) -> list[str]:
    """Return the summary for a terminal, one aligned line a fact, without control characters.

    Raises:
        InputError: as :func:`write_report`.
    """
    data = checked(data)
    quality, sizes, engine = data.quality, data.sizes, data.chosen
    pictures, speed = NOT_MEASURED, NOT_MEASURED
    if quality.psnr_db_mean is not None:
        pairs = f"{len(data.prompts)} pair{'s' * (len(data.prompts) != 1)}"
        similarity = NOT_MEASURED if quality.ssim_mean is None else f"{quality.ssim_mean:.4f}"
        pictures = f"PSNR {db(quality.psnr_db_mean)} (lowest {db(quality.psnr_db_min)}), SSIM {similarity}, {pairs}"
    if engine and engine.seconds_per_step is not None:
        gain = f", {engine.speed_words} the float engine’s speed" if engine.reliable_speedup else ""
        gain = f", speed-up: {engine.speed_words}" if engine.speed_reason else gain
        speed = f"{seconds(engine.seconds_per_step)} a step on {engine.title}{gain}"
    size = NOT_MEASURED
    if data.size_ratio:
        size = f"{megabytes(sizes.weights_float)} to {megabytes(sizes.weights_quantized)}, {times(data.size_ratio)} smaller"
    accuracy = NOT_MEASURED
    if quality.accuracy_float is not None or quality.accuracy_quantized is not None:
        accuracy = f"float {percent(quality.accuracy_float)}, quantized {percent(quality.accuracy_quantized)}"
    facts = [
        (
            "model",
            f"{data.model.family}, weights {data.model.weights}" + (f" ({data.model.note})" if data.model.note else ""),
        ),
        ("recipe", f"{data.recipe}, run {data.run_id}"),
        ("pictures", pictures),
        ("prompts", accuracy),
        ("size", size),
        ("speed", speed),
    ]
    if data.mismatches:
        facts.append(("layers", f"{len(data.mismatches)} of {len(data.layers)} run in another precision than asked"))
    facts += [("skipped", warning) for warning in data.warnings]
    return ["".join(mark if mark.isprintable() else " " for mark in f"{name:<9} {text}") for name, text in facts]


@dataclass(frozen=True)
class _Picture:
    """One pair as data URIs; ``shown``/``measured`` are ``width x height`` in pixels."""

    result: PromptResult
    uris: tuple[str, str, str] | None = None
    shown: tuple[int, int] = (0, 0)
    measured: tuple[int, int] = (0, 0)


def _pictures(run: Path, data: ReportData) -> list[_Picture]:
    results = data.prompts
    if len(results) > MAX_PICTURE_PAIRS:  # the worst are what a reader looks for
        ranked = sorted(results, key=lambda one: DB_CAP if one.psnr_db is None else one.psnr_db)[:MAX_PICTURE_PAIRS]
        results = [one for one in results if any(one is kept for kept in ranked)]
    side = min(1024, math.isqrt(INLINE_BYTES // (6 * max(len(results), 1))))
    pictures = []
    for result in track(results, "report: pictures"):
        if result.float_image is None or result.quantized_image is None:
            pictures.append(_Picture(result))
            continue
        try:
            pair = [_open(safe_child(run, name)) for name in (result.float_image, result.quantized_image)]
            pair.append(difference(pair[0], pair[1]))
        except (OSError, ValueError, SyntaxError, InputError) as error:
            data.warnings.append(f"pictures of seed {result.seed} are not shown: {' '.join(str(error).split())}")
            pictures.append(_Picture(result))
            continue
        measured = pair[0].size
        for image in pair:
            image.thumbnail((side, side))
        first, second, third = (_data_uri(image) for image in pair)
        pictures.append(_Picture(result, (first, second, third), pair[0].size, measured))
    return pictures


def _masks(run: Path, data: ReportData) -> str | None:
    """Return the picture of attention's masks as a data URI."""
    if data.attention is None or data.attention.picture is None:
        return None
    try:
        return _data_uri(_open(safe_child(run, data.attention.picture)))
    except (OSError, ValueError, SyntaxError, InputError) as error:
        data.warnings.append(f"the picture of attention's masks is not shown: {' '.join(str(error).split())}")
        return None


def _open(path: Path) -> Image.Image:
    from PIL import Image

    with Image.open(path, formats=["PNG", "WEBP", "JPEG"]) as image:
        return image.convert("RGB")


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, quality=50, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
