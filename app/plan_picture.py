"""A run as pictures: the plan as a map of layers, its errors by layer and by timestep, what was asked for against what is in
the graphs, and the engines. Data and plots are the report's own; only the map is drawn here.

The map has a row for each block and a cell for each layer in it: colour is the weight's format, depth of colour the error.
"""

from __future__ import annotations

import base64
import re

from qdiff.app.sources import Source
from qdiff.app.views import empty, table, text
from qdiff.plan.routing_plan import REUSE
from qdiff.report.data import (
    AttentionResult,
    EngineResult,
    LayerResult,
    ReportData,
    RoutingResult,
    db,
    megabytes,
    percent,
    seconds,
    times,
)
from qdiff.runs.run import Run

_BLOCK = re.compile(r"^((?:\w*(?:blocks|layers)\.\d+\.)+)(.+)$")


def inspect(source: Source) -> str:
    """Return the whole tab for one source."""
    if source.run is None or not source.quantized:
        return empty(
            f"{source.title} has no plan",
            "Only the float model is there. Build an engine on the Build tab, and its plan is shown here.",
        )
    from qdiff.plan.plan import Plan
    from qdiff.report.plots import engine_plot, format_colours, layer_plot, timestep_plot
    from qdiff.stages.report import gather

    data = gather(source.run, Plan.load(source.run.file("plan.json")))
    colours = format_colours(data.layers)
    stages = [[one.name, seconds(one.seconds), megabytes(one.peak_memory_bytes)] for one in data.stages]
    engines = (engine_plot(data) or "") + _engines(data)
    sections = (
        (
            "The plan",
            "A row for each block, a cell for each layer. Stronger is nearer to float.",
            plan_map(data.layers, colours),
        ),
        ("Error of each layer", "Signal to quantization noise of its output.", layer_plot(data.layers, colours)),
        ("Error over the timesteps", "Of the whole backbone, from the first step to the last.", timestep_plot(data)),
        *([("Precision by step", _route_words(data.routing), route_map(data.routing))] if data.routing else []),
        *(
            [("Sparse attention", _mask_words(data.attention), _masks(source.run, data.attention))]
            if data.attention
            else []
        ),
        ("Asked for and realised", _realised_words(data), _realised(data)),
        ("Engines", "", engines),
        ("Stages", "", table(["stage", "time", "peak memory"], stages, "stages")),
    )
    parts = [_summary(data), *(_section(*section) for section in sections)]
    return f'<div class="qd-inspect">{"".join(parts)}</div>'


def _section(title: str, words: str, inside: str | None) -> str:
    if not inside:
        inside = '<p class="qd-note">Not measured in this run.</p>'
    return f"<section><h2>{text(title)}</h2>{f'<p>{text(words)}</p>' if words else ''}{inside}</section>"


def _fast(engine: EngineResult) -> str:
    words = engine.speed_words if engine.speed_reason else f"{engine.speed_words} as fast"
    return f"{words}, {engine.name}"


def _summary(data: ReportData) -> str:
    chosen = data.chosen
    rows = [
        ("Weights", f"{megabytes(data.sizes.weights_quantized)}", f"{times(data.size_ratio)} smaller than float"),
        ("One step", seconds(chosen.seconds_per_step) if chosen else "not measured",
         _fast(chosen) if chosen and chosen.speedup else ""),
        ("PSNR", db(data.quality.psnr_db_mean), f"worst {db(data.quality.psnr_db_min)}"),
        ("Right emoji", percent(data.quality.accuracy_quantized), f"float {percent(data.quality.accuracy_float)}"),
    ]  # fmt: skip
    cells = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in rows)
    return f'<dl class="qd-summary">{cells}</dl>'


def plan_map(layers: list[LayerResult], colours: dict[str, int]) -> str:
    """Return the plan as a grid of coloured cells."""
    rows: dict[str, dict[str, LayerResult]] = {}
    for layer in layers:
        found = _BLOCK.match(layer.name)
        block, name = (found.group(1).rstrip("."), found.group(2)) if found else ("around the blocks", layer.name)
        rows.setdefault(block, {})[name] = layer
    errors = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None] or [0.0]
    low, high = min(errors), max(errors)
    legend = "".join(
        f'<span><i style="--format:var(--s{number})"></i>{text(name)}</span>' for name, number in colours.items()
    )
    body = []
    for block, members in rows.items():
        cells = "".join(_cell(name, layer, colours, low, high) for name, layer in members.items())
        body.append(f'<div class="qd-map-row"><h4>{text(block)}</h4><div>{cells}</div></div>')
    columns = max(map(len, rows.values()))
    return f'<div class="qd-legend">{legend}</div><div class="qd-map" style="--columns:{columns}">{"".join(body)}</div>'


def _cell(name: str, layer: LayerResult, colours: dict[str, int], low: float, high: float) -> str:
    share = 30.0 if layer.sqnr_db is None or high <= low else 12 + 48 * (layer.sqnr_db - low) / (high - low)
    extras = [f"smoothing {layer.smoothing:g}" if layer.smoothing is not None else "", layer.why]
    extras += ["scales by timestep" if layer.timestep_scales else ""]
    title = f"{layer.name}: {layer.requested}, {db(layer.sqnr_db)}. " + "; ".join(part for part in extras if part)
    style = f"--format:var(--s{colours[layer.requested]});--share:{share:.0f}%"
    value = f"{layer.sqnr_db:.0f}" if layer.sqnr_db is not None else "·"
    return f'<span style="{style}" title="{text(title)}"><b>{text(name)}</b>{value}</span>'


def route_map(routing: RoutingResult) -> str:
    """Return routes as a grid: a row for each block, a cell for each step of a picture."""
    colours = {**{index: f"s{index}" for index in range(len(routing.recipes))}, REUSE: "panel"}
    names = {**dict(enumerate(routing.recipes)), REUSE: "left out"}
    used = sorted({route for step in routing.routes for route in step}, reverse=True)
    legend = "".join(f'<span><i style="--format:var(--{colours[n]})"></i>{text(names[n])}</span>' for n in used)
    rows = []
    for number, block in enumerate(routing.blocks):
        cells = "".join(
            _route(f"{block} at timestep {timestep:.0f}: {names[step[number]]}", colours[step[number]])
            for timestep, step in zip(routing.timesteps, routing.routes, strict=True)
        )
        rows.append(f'<div class="qd-map-row"><h4>{text(block)}</h4><div>{cells}</div></div>')
    columns = max(1, len(routing.routes))
    return f'<div class="qd-legend">{legend}</div><div class="qd-map" style="--columns:{columns}">{"".join(rows)}</div>'


def _route(title: str, colour: str) -> str:
    return f'<span style="--format:var(--{colour});--share:100%" title="{text(title)}">&#8203;</span>'


def _route_words(routing: RoutingResult) -> str:
    words = f"A cell for each step, the first on the left. {routing.used_bits:.2f} bits a weight are computed with"
    words += f", {routing.resident_bits:.2f} are in memory" if routing.resident_bits else ""
    return words + (f"; {percent(routing.skipped)} of the evaluations are left out." if routing.skipped else ".")


def _mask_words(attention: AttentionResult) -> str:
    read = f"{percent(attention.density)} of the blocks are read."
    return f"{read} Dark is read: a column for each head, a row for each group of steps."


def _masks(run: Run, attention: AttentionResult) -> str | None:
    path = run.file(attention.picture or "")
    if attention.picture is None or not path.is_file():
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="qd-masks" alt="masks of the heads" src="data:image/png;base64,{data}">'


def _realised_words(data: ReportData) -> str:
    targets = sorted({target for layer in data.layers for target in layer.realised})
    if not targets:
        return "Nothing was exported in this run: the plan runs in torch, in exactly the formats above."
    if not data.mismatches:
        return f"All {len(data.layers)} layers have the precision that was asked for, in {' and in '.join(targets)}."
    return f"{len(data.mismatches)} of {len(data.layers)} layers run in another precision than was asked for."


def _realised(data: ReportData) -> str:
    shown = data.mismatches or data.layers
    targets = sorted({target for layer in data.layers for target in layer.realised})
    rows = [
        [
            layer.name,
            layer.requested,
            *(layer.realised.get(target, "–") for target in targets),
            db(layer.sqnr_db),
            layer.why,
        ]
        for layer in shown
    ]
    inside = table(["layer", "asked for", *targets, "error", "why"], rows, "precision of every layer")
    return f"<details {'open' if data.mismatches else ''}><summary>{len(shown)} layers</summary>{inside}</details>"


def _engines(data: ReportData) -> str:
    rows = [
        [
            engine.name, engine.title, "yes" if engine.available else f"no: {engine.why_not}", seconds(engine.seconds_per_step),
            db(engine.psnr_db_mean), megabytes(engine.file_bytes), engine.note,
        ]
        for engine in data.engines
    ]  # fmt: skip
    return table(["engine", "", "runs here", "one step", "PSNR", "file", ""], rows, "engines")
