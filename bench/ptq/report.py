"""The table as Markdown."""

from __future__ import annotations

from typing import Any

from qdiff.cli.text import size

Result = dict[str, Any]


def markdown(results: list[Result], facts: dict[str, Any]) -> str:
    """Return all rows, those of one format together, and the notes that the numbers need."""
    formats = list(dict.fromkeys(result["format"] for result in results))
    results = sorted(results, key=lambda result: formats.index(result["format"]))  # stable: rows keep their order
    done = [result for result in results if "error" not in result]
    spans = done[0]["sqnr"] if done else []
    head = ["format", "who", "method", "bits"]
    head += [f"SQNR t {span['first']:.0f}-{span['last']:.0f}" for span in spans]
    head += ["PSNR", "worst", "SSIM", "right emoji", "s", "CPU s", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in done]
    failed = [result for result in results if "error" in result]
    if failed:
        lines += ["", "Did not run:", ""]
        lines += [f"- {row['library']} {row['format']}, {row['method']}: {row['error']}" for row in failed]
    return "\n".join([*lines, "", *_best(done), "", *_notes(facts)])


def _best(done: list[Result]) -> list[str]:
    """Return, of each format and library, the row with the best pictures."""
    lines = ["| format | best of | method | bits | PSNR |", "| --- | --- | --- | --- | --- |"]
    best: dict[tuple[str, str], Result] = {}
    for result in done:
        key = (result["format"], result["library"])
        if key not in best or result["psnr_db_mean"] > best[key]["psnr_db_mean"]:
            best[key] = result
    for (format, library), row in best.items():
        lines.append(f"| {format} | {library} | {row['method']} | {row['bits']:.3f} | {row['psnr_db_mean']:.2f} |")
    return lines


def _cells(result: Result) -> list[str]:
    right = result["accuracy"]
    return [
        result["format"],
        result["library"],
        result["method"],
        f"{result['bits']:.3f}",
        *(f"{span['sqnr_db']:.1f}" for span in result["sqnr"]),
        f"{result['psnr_db_mean']:.2f}",
        f"{result['psnr_db_min']:.2f}",
        f"{result['ssim_mean']:.4f}",
        "-" if right is None else f"{100 * right['emoji']:.1f} %",
        f"{result['seconds']:.0f}",
        f"{result['cpu_seconds']:.0f}",
        size(result["peak_memory_bytes"]),
    ]


def _notes(facts: dict[str, Any]) -> list[str]:
    settings, right = facts["settings"], facts["accuracy"]
    kept = ", ".join(facts["kept_layers"])
    accuracy = "" if right is None else f" Float: {100 * right['emoji']:.1f} % right emoji."
    return [
        f"{facts['note'][:1].upper()}{facts['note'][1:]}: {settings['pictures']} pictures of held-out prompts; SQNR in dB on "
        f"held-out calls of {settings['held_out']} other prompts; calibrated on {settings['samples']} prompts.{accuracy}",
        "",
        "Bits are of the quantized layers' weights with scales and low-rank factors; biases and vectors that scale an input by "
        f"channel are left out. Not quantized: {kept}; norms, modulation tables and the patch embedding. qdiff's rows hold what "
        "is not quantized in float16, the others in float32.",
        "",
        f"Seconds and memory are of the row's own process with {facts['threads']} threads: loading and scoring are not in the "
        "seconds, the libraries' own pages are in the memory. qdiff's seconds include "
        f"{facts['statistics_seconds']:.0f} s ({facts['statistics_cpu_seconds']:.0f} CPU s) for the statistics of `qdiff "
        "calibrate`; the recording is shared.",
    ]
