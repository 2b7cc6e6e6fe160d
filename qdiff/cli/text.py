"""Results as text for people: what the command line prints when ``--json`` is not given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdiff.events import duration
from qdiff.resources import size


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return columns padded to their widest cell."""
    cells = [[str(cell) if cell is not None else "-" for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _used(result: dict[str, Any]) -> str:
    return f"{duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}"


def models(result: list[dict[str, Any]]) -> str:
    """Return the text of ``qdiff models``."""
    rows = [
        (row["name"], row["title"], size(row["bundled_bytes"]), ", ".join(row["random_configurations"]))
        for row in result
    ]
    return table(rows, ("MODEL", "FAMILY", "BUNDLED", "FULL SIZE, RANDOM WEIGHTS"))


def calibrate(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff calibrate``."""
    if result.get("dry_run"):
        return (
            f"would calibrate {result['model']} ({result['note']})\n"
            f"{result['prompts']['count']} prompts, {result['steps']} steps: about {duration(result['seconds'])}, "
            f"{size(result['bytes'])} on disk, into {result['run']}"
        )
    return (
        f"calibrated {result['layers']} layers in {result['groups']} groups "
        f"on {result['prompts']} prompts at {result['timesteps']} timesteps\n"
        f"weights: {result['note']}\n{result['run']}  ({_used(result)})"
        + (f"\n{_looked(result['attention'])}" if "attention" in result else "")
    )


def _looked(result: dict[str, Any]) -> str:
    return (
        f"looked at {result['heads']} heads of {result['layers']} self-attentions over {result['tokens']:,} tokens "
        f"({duration(result['seconds'])}): quantize with --density"
    )


def _reads(result: dict[str, Any]) -> str:
    if result["density"] is None:
        return ""
    overall = result.get("overall_density")  # runs of an earlier version have none
    return f", sparse attention reads {100 * result['density']:.0f} % of its blocks" + (
        "" if overall is None else f", all attention {100 * overall:.0f} %"
    )


def quantize(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff quantize``."""
    if result.get("dry_run"):
        layers = result["layers"]
        rows = [
            (row["name"], row["weights"], row["activations"], size(row["bytes_float"]), size(row["bytes"]), row["why"])
            for row in layers
        ]
        before, after = (sum(row[key] for row in layers) for key in ("bytes_float", "bytes"))
        head = ("LAYER", "WEIGHTS", "ACTIVATIONS", "FLOAT", "PACKED", "WHY")
        return f"{table(rows, head)}\n{len(layers)} layers, {size(before)} -> {size(after)}{_reads(result)}"
    budget = ""
    if result["budget"]:
        (measure, allowed), *_ = result["budget"].items()
        unit = {"bits": "bits a weight", "bytes": "bytes", "latency": "ms a step"}[measure]
        seen = f", pictures of the plan {result['plan_psnr_db']:.1f} dB" if result["plan_psnr_db"] else ""
        budget = f"\nbudget: {result['cost']:.6g} of {allowed:.6g} {unit}{seen}"
    by_hand = f", {result['layers_by_hand']} set by hand" if result["layers_by_hand"] else ""
    return (
        f"recipe {result['recipe']}: {result['quantized_layers']} layers quantized, {result['kept_layers']} kept"
        f"{by_hand}{budget}\n"
        f"{size(result['float32_bytes'])} -> {size(result['packed_bytes'])} "
        f"({result['float32_bytes'] / result['packed_bytes']:.2f}x smaller), "
        f"worst step {result['worst_sqnr_db']:.1f} dB{_reads(result)}\n{result['plan']}  ({_used(result)})"
    )


def export(results: list[dict[str, Any]]) -> str:
    """Return the text of ``qdiff export``."""
    lines = []
    for result in results:
        if result.get("dry_run"):
            lines.append(f"would write {result['layers']} layers for {result['target']} (opset {result['opset']})")
            continue
        parity = result["parity"]
        lines.append(
            f"{result['target']}: {size(result['bytes'])} ({result['ratio']:.3f} of float32), "
            f"every layer has the precision asked for\n"
            f"  parity over {parity['steps']} steps: cosine >= {parity['worst_cosine']:.6f}; "
            f"against the float model at most {parity['worst_loss_db']:+.2f} dB worse than torch\n"
            f"  {result['onnx']}  ({_used(result)})"
        )
    return "\n".join(lines)


def build(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff build``."""
    if result.get("dry_run"):
        once = f", {' and '.join(result['parts'])} computed once" if result["parts"] else ", as one engine"
        return f"would build {result['engine']} for {result['device']}{once}"
    if "note" in result:
        return f"{result['engine']}: {result['note']}"
    state = "found in the cache" if result["cached"] else "built"
    here = "" if result["runs_here"] else f"\n  cannot run here: {result['why_not']}"
    once = f", {' and '.join(result['parts'])} computed once" if result["parts"] else ""
    what = f"{result['engine']}: {state} for {result['device']}, {size(result['bytes'])}{once}{here}"
    return f"{what}\n{result['folder']}  ({_used(result)})"


def generate(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff generate``: the paths, one a line."""
    return "\n".join(result["images"])


def correct(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff correct``: what every method gains, and what is applied from now on."""
    unit = result["unit"]
    rows = [
        (
            row["method"],
            f"{row['score']:.2f}",
            f"{row['gain']:+.2f}",
            f"{row['gain_of_float']:+.2f}",
            f"{row['counts']:+.2f}",
        )
        for row in result["tried"]
    ]
    text = table(rows, ("METHOD", f"PICTURES, {unit}", "GAIN", "GAIN OF FLOAT", "COUNTS"))
    kept = result["method"]
    applied = f"{kept} is applied from now on" if kept else "nothing is applied: no method gains enough"
    return f"{text}\n{applied}, judged on {result['engine']}"


def compare(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff compare``."""
    rows = []
    for row in [result["float"], *result["engines"]]:
        share = row["accuracy"]["emoji"] if row.get("accuracy") else None
        rows.append(
            (
                row["name"],
                f"{row['psnr_db_mean']:.2f}" if "psnr_db_mean" in row else "-",
                f"{row['psnr_db_min']:.2f}" if "psnr_db_min" in row else "-",
                f"{row['ssim_mean']:.4f}" if "ssim_mean" in row else "-",
                f"{100 * share:.1f} %" if share is not None else "-",
                f"{1000 * row['seconds_per_step']:.1f} ms",
                _speed(row),
            )
        )
    head = ("ENGINE", "PSNR dB", "WORST", "SSIM", "RIGHT EMOJI", "STEP", "SPEED")
    lines = [table(rows, head)]
    lines += [
        f"{row['name']}: machine busy, speed not reliable: {row['speed_reason']}"
        for row in result["engines"]
        if row.get("speed_reason")
    ]
    return "\n".join([*lines, f"{result['pictures']} pictures in {result['images']}"])


def _speed(row: dict[str, Any]) -> str:
    """Return ``3.52x (3.4 to 3.7)``: over float, and the middle half of the pairs; no single number where they cannot
    be believed.
    """
    if row["name"] == "float":
        return "1.00x"
    if "speedup_range" not in row:  # of an earlier version, which timed one engine after the other
        return f"{row['speedup']:.2f}x"
    low, high = row["speedup_range"]
    between = f"{low:.2f} to {high:.2f}"
    return f"{row['speedup']:.2f}x ({between})" if row["speed_reliable"] else f"not reliable ({between}x)"


def report(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff report``: the paths."""
    return f"{result['html']}\n{result['json']}"


def run(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff run``."""
    lines = [
        f"weights: {result['weights']}",
        f"{size(result['float32_bytes'])} -> {size(result['packed_bytes'])} "
        f"({result['float32_bytes'] / result['packed_bytes']:.2f}x smaller)",
        compare({**result, "pictures": result["stages"]["compare"]["pictures"]}),
    ]
    for name, stage in result["stages"].items():
        if name.startswith("build:") and not stage.get("runs_here", True):
            lines.append(f"{name.partition(':')[2]}: built for {stage['device']}; {stage['why_not']}")
    lines += [f"{name}: left out, {why}" for name, why in result["skipped"].items()]
    lines.append(f"report: {result['report']}")
    return "\n".join(lines)


def inspect(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff inspect``."""
    lines = [f"run {result['id']}  {result['run']}"]
    if "model" in result:
        lines.append(f"model {result['model']['model']}: {result['model']['note']}")
    rows = [
        (
            name,
            row["status"],
            duration(row.get("seconds") or 0),
            size(row.get("peak_memory_bytes")),
            row.get("files", "-"),
        )
        for name, row in result["stages"].items()
    ]
    lines.append(table(rows, ("STAGE", "STATE", "TIME", "PEAK MEMORY", "FILES")))
    lines += [f"{name}: fix: {row['fix']}" for name, row in result["stages"].items() if row.get("fix")]
    if result["missing"]:
        lines.append(f"not done: {', '.join(result['missing'])}")
    if "plan" in result:
        plan = result["plan"]
        lines.append(
            f"plan {plan['recipe']}: {plan['quantized']} layers quantized, {plan['kept']} kept, "
            f"{plan['smoothed']} smoothed, {plan['timestep_scales']} with scales by timestep"
        )
        if plan["attention"]:
            seen = plan["attention"]
            lines.append(
                f"attention {seen['numerics']}: {seen['layers']} layers follow block lists over {seen['tokens']:,} tokens, "
                f"which read {100 * seen['density']:.0f} % of their blocks, all attention {100 * seen['overall']:.0f} %"
            )
    for engine in result.get("engines", []):
        state = engine["problem"] or "trusted"
        role = engine["role"] or "not in use"
        lines.append(f"engine {engine['folder']}: {role}, {engine['device']}, {size(engine['bytes'])}, {state}")
    if "layers" in result:
        columns = [
            (layer["name"], layer["weights"], layer["activations"], layer["smoothing"], layer["sqnr_db"], layer["why"])
            for layer in result["layers"]
        ]
        lines.append(table(columns, ("LAYER", "WEIGHTS", "ACTIVATIONS", "SMOOTHING", "SQNR dB", "WHY")))
    return "\n".join(lines)


def doctor(result: dict[str, Any]) -> str:
    """Return the text of ``qdiff doctor``."""
    cpu = result["cpu"]
    lines = [
        "  ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"CPU: {cpu['cores']} cores, {cpu['capability']}",
        f"GPU: {', '.join(result['gpu']) or 'none'}",
        f"memory: {size(result['memory_bytes']['available'])} free of {size(result['memory_bytes']['total'])}; "
        f"disk: {size(result['disk_free_bytes'])} free",
        *(f"{engine['name']}: {engine['integers']}" for engine in result["engines"] if engine["integers"]),
    ]
    rows = [
        (
            engine["name"],
            "yes" if engine["runs"] else "no",
            "yes" if engine["builds"] else "no",
            engine["version"],
            engine["why_not"] or "",
        )
        for engine in result["engines"]
    ]
    lines.append(table(rows, ("ENGINE", "RUNS", "BUILDS", "VERSION", "WHY NOT")))
    return "\n".join(lines)
