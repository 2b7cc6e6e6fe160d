"""The report's plots as inline SVG that follows the page's light and dark style.

Drawn by matplotlib in placeholder colours that become CSS variables; each is drawn twice, wide and narrow, and the style
sheet shows the one that fits, so that no text shrinks on a phone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qdiff.report.data import AllocationResult, LayerResult, ReportData, db, megabytes, seconds, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Figure, bool], None]

UNQUANTIZED = frozenset({"float", "fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "none"})

# Placeholder colours of the plots: each becomes a CSS variable, so that a plot follows light and dark.
_INK, _MUTED, _RULE, _PAPER, _ACCENT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
_SERIES, _MARKERS = [f"#0a0c0{index}" for index in range(8)], "osD^vPXo"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _PAPER: "paper", _ACCENT: "accent"}
_VARIABLES |= {colour: f"s{index}" for index, colour in enumerate(_SERIES)}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.titlesize": 12,
}
_SETTINGS |= {f"axes.spines.{side}": False for side in ("top", "right", "left")} | {"axes.edgecolor": _RULE}
_SETTINGS |= {name: _MUTED for name in ("axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")}
_SETTINGS |= {"xtick.major.size": 0, "ytick.major.size": 0, "axes.titlelocation": "left"}
_WIDTHS = {"wide": 1000, "narrow": 340}  # CSS pixels
_BLOCK = re.compile(r"^(?:\w*(?:blocks|layers|resnets|attentions|samplers)\.\d+\.){1,2}")


def format_colours(layers: list[LayerResult]) -> dict[str, int]:
    """Return the index of the series colour of each format, by first appearance; unquantized layers are grey (7)."""
    formats = dict.fromkeys(layer.requested for layer in layers)
    coloured = [name for name in formats if name.lower() not in UNQUANTIZED]
    return {name: coloured.index(name) % 7 if name in coloured else 7 for name in formats}


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group(0).rstrip(".") if found else name.partition(".")[0]


def layer_plot(layers: list[LayerResult], colours: dict[str, int]) -> str | None:
    """Return a dot for each layer by its SQNR, a row for each block."""
    shown = [(one, _block(one.name), one.sqnr_db) for one in layers if one.sqnr_db is not None]
    if not shown:
        return None
    blocks = list(dict.fromkeys(block for _, block, _ in shown))
    titles = {
        f"layer-{index}": f"{one.name}: {db(one.sqnr_db)}, {one.requested}" for index, (one, *_) in enumerate(shown)
    }

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for row, block in enumerate(blocks):
            values = [value for _, home, value in shown if home == block]
            axes.plot([min(values), max(values)], [row, row], color=_RULE, linewidth=3, zorder=1)
        used = set()
        for index, (layer, block, value) in enumerate(shown):
            number = colours[layer.requested]
            label = None if layer.requested in used else layer.requested[:24]
            used.add(layer.requested)
            (dot,) = axes.plot(value, blocks.index(block), _MARKERS[number], color=_SERIES[number], ms=7.5, label=label)
            dot.set(gid=f"layer-{index}", markeredgecolor=_PAPER, markeredgewidth=0.6)
        _legend(axes, 2 if narrow else 6)
        longest = 22 if narrow else 40
        labels = [block if len(block) <= longest else "…" + block[1 - longest :] for block in blocks]
        axes.set_yticks(range(len(blocks)), labels)
        axes.set(ylim=(len(blocks) - 0.4, -0.6), xlabel="SQNR in dB" if narrow else "SQNR in dB (right is better)")
        axes.grid(axis="x", color=_RULE, linewidth=0.7)

    height = 90 + len(blocks) * (22 if len(blocks) <= 40 else 17)
    return _svg("layers", draw, (height, height), f"SQNR of {len(shown)} layers by block", titles)


def timestep_plot(data: ReportData) -> str | None:
    """Return a plot of the SQNR of the whole backbone over the timestep, in the order of denoising."""
    worst: dict[float, float] = {}  # of the calls at one timestep
    for one in data.timesteps:
        if one.sqnr_db is not None:
            worst[one.timestep] = min(one.sqnr_db, worst.get(one.timestep, one.sqnr_db))
    points = sorted(worst.items())
    if not points:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        size = 4 if len(points) <= 60 else 0
        axes.plot(*zip(*points, strict=True), color=_ACCENT, linewidth=2, marker="o", markersize=size)
        axes.set(title="SQNR in dB", xlabel="timestep (denoising runs to the right)")
        axes.invert_xaxis()
        axes.grid(axis="y", color=_RULE, linewidth=0.7)

    return _svg("time", draw, (280, 240), f"SQNR of the model’s output at {len(points)} timesteps")


def allocation_plot(allocation: AllocationResult | None) -> str | None:
    """Return a plot of the PSNR of plans over what they cost: the solver's at several budgets, uniform ones, those
    within the budget.
    """
    shown = [(plan, plan.psnr_db) for plan in allocation.plans if plan.psnr_db is not None] if allocation else []
    if allocation is None or not shown:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        line = sorted((plan.cost, value) for plan, value in shown if plan.kind in ("solver", "chosen"))
        axes.plot(*zip(*line, strict=True), color=_RULE, linewidth=2, zorder=1)
        looks = {
            "solver": ("o", _MUTED, 6, "the solver's"),
            "candidate": ("o", _SERIES[5], 6, "looked at"),
            "uniform": ("D", _SERIES[1], 8, "one recipe for all"),
            "chosen": ("o", _ACCENT, 10, "taken"),
        }
        for kind, (marker, colour, size, label) in looks.items():
            points = [(plan, value) for plan, value in shown if plan.kind == kind]
            for index, (plan, value) in enumerate(points):
                (dot,) = axes.plot(plan.cost, value, marker, color=colour, ms=size, label=None if index else label)
                dot.set(markeredgecolor=_PAPER, markeredgewidth=0.6, linestyle="none")
                if kind == "uniform":
                    axes.annotate(f" {plan.name[:16]} ", (plan.cost, value), color=_INK, va="top", ha="center",
                                  xytext=(0, -8), textcoords="offset points")  # fmt: skip
        axes.axvline(allocation.budget, color=_MUTED, linestyle=(0, (2, 3)), linewidth=1)
        _legend(axes, 2 if narrow else 4)
        axes.margins(x=0.08, y=0.18)
        axes.set(ylabel="PSNR in dB", xlabel=allocation.unit if narrow else f"{allocation.unit} (dashed: the budget)")
        axes.grid(axis="y", color=_RULE, linewidth=0.7)

    return _svg("allocation", draw, (320, 280), f"PSNR of {len(shown)} plans by cost")


def engine_plot(data: ReportData) -> str | None:
    """Return seconds per step and peak memory of each engine that ran; a dashed line marks the baseline."""
    ran = [one for one in data.engines if one.available and one.seconds_per_step is not None]
    if not ran:
        return None
    panels: list[tuple[str, list[float | None], Callable[..., str]]] = []
    panels.append(("Time of a step (median)", [one.seconds_per_step for one in ran], seconds))
    if any(one.peak_memory_bytes for one in ran):
        panels.append(("Peak memory", [one.peak_memory_bytes for one in ran], megabytes))
    colours = {data.baseline: _SERIES[7], data.engine: _ACCENT}

    def draw(figure: Figure, narrow: bool) -> None:
        shape = (len(panels), 1) if narrow else (1, len(panels))
        for axes, (title, values, form) in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=True):
            top = max(value or 0.0 for value in values) or 1.0
            for row, (engine, value) in enumerate(zip(ran, values, strict=True)):
                axes.barh(row, value or 0.0, height=0.55, color=colours.get(engine.name, _SERIES[5]))
                gain = engine.reliable_speedup if form is seconds and engine.name != data.baseline else None
                text = f"{form(value)} · {times(gain)}" if gain else form(value)
                back = {"facecolor": _PAPER, "edgecolor": "none", "pad": 1.5}
                axes.text((value or 0.0) + 0.03 * top, row, text, va="center", color=_INK, bbox=back)
                if value is not None and engine.name == data.baseline:
                    axes.axvline(value, color=_MUTED, linestyle=(0, (2, 3)), linewidth=1)
            axes.set_title(title, color=_INK, fontweight="bold")
            labels = [one.title if len(one.title) <= 26 else one.title[:25] + "…" for one in ran]
            axes.set_yticks(range(len(ran)), labels)
            axes.set(xlim=(0, top * (1.6 if narrow else 1.4)), ylim=(len(ran) - 0.5, -0.5), xticks=[])

    height = 34 * len(ran) + 44
    return _svg("engines", draw, (height, (height + 12) * len(panels)), f"time and memory of {len(ran)} engines")


def _legend(axes: Axes, columns: int) -> None:
    """Put the legend above a plot."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=_INK, borderpad=0)


def _svg(name: str, draw: Draw, heights: tuple[int, int], label: str, titles: dict[str, str] | None = None) -> str:
    """Return two drawings of one plot, wide and narrow, as inline SVG whose colours are CSS variables. Every text in it
    is escaped.

    Args:
        name: of the plot.
        draw: fills a figure, a narrow one where it is told so.
        heights: of the wide and the narrow drawing, in CSS pixels.
        label: that screen readers say.
        titles: tooltip by the ``gid`` of an artist.
    """
    import matplotlib
    from markupsafe import escape
    from matplotlib.figure import Figure

    def restyle(tag: re.Match[str]) -> str:  # only inside tags: text of others stays as it was escaped
        text = re.sub(r"font-family: [^;\"]*;? ?", "", tag.group()).replace("xlink:href", "href")
        text = re.sub(r"#0a0[bc]0\d", lambda colour: f"var(--{_VARIABLES[colour.group()]})", text)
        title = (titles or {}).get(text[7:-2]) if text.startswith('<g id="layer-') else None
        text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-{kind}-", text)
        return text if title is None else f"{text}<title>{escape(title)}</title>"

    drawings = []
    for (kind, width), height in zip(_WIDTHS.items(), heights, strict=True):
        with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has other fonts
            figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
            draw(figure, kind == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
        body = drawing[drawing.index(">", drawing.index("<svg ")) + 1 :]
        head = f'<svg class="plot {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        drawings.append(head + re.sub(r"<[^>]*>", restyle, body))
    return "\n".join(drawings)
