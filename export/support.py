"""Print which format runs where, read from the targets themselves: the tables of docs/reference/support-matrix.md.

    python -m qdiff.export.support

The tables say what :data:`qdiff.export.translations.TARGETS` takes, and tests build or run every cell of it, so the page, the
refusals at export and what was seen to work are one thing.
"""

from __future__ import annotations

from qdiff.export.translations import TARGETS, Target
from qdiff.formats.table import FORMATS, Format

NO = "–"
TITLES = {"onnxruntime": "ONNX Runtime, OpenVINO", "tensorrt": "TensorRT-RTX"}


def tables() -> str:
    """Return both tables in Markdown: weights, and activations."""
    rows = [row for row in FORMATS.values() if row.quantized]
    targets = [TARGETS[name] for name in TARGETS]
    names = [TITLES[name] for name in TARGETS]
    weights = [[f"`{row.name}`", "yes", *(_weights(row, target) for target in targets)] for row in rows]
    activations = [
        [f"`{row.name}`", _scales(row), "yes", *(_activations(row, target) for target in targets)] for row in rows
    ]
    return "\n\n".join(
        [
            _markdown(["weights", "torch", *names], weights),
            _markdown(["activations", "scale", "torch", *names], activations),
        ]
    )


def _weights(row: Format, target: Target) -> str:
    partners = sorted({activations or "" for weights, activations in target.runs if weights == row.name})
    if not partners:
        return NO
    if target.compute == "float32":
        return "with any activations"
    names = [f"`{name}`" if name else "" for name in partners]
    quantized = ", ".join(name for name in names if name)
    return "; ".join(part for part in (f"with {quantized}" if quantized else "", "alone" * ("" in names)) if part)


def _activations(row: Format, target: Target) -> str:
    ways = []
    if any(activations == row.name for _, activations in target.runs):
        ways.append("at run time" if row.block else "static")
    if any(activations == row.name for _, activations in target.tokens):
        ways.append("per token")
    if not ways:
        return NO
    weights = sorted({weights for weights, activations in target.runs if activations == row.name})
    if target.compute == "float32":
        return ", ".join(ways)
    return f"{', '.join(ways)}; under {', '.join(f'`{name}`' for name in weights)}"


def _scales(row: Format) -> str:
    return f"block of {row.block}" if row.block else "tensor, or token"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(tables())
