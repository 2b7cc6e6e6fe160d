"""The files that an exported graph was cut into (:mod:`qdiff.export.hoist`): what is computed at every step, and what once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ValueInfoProto

STEP = "step"
PARTS = ("prompt", "timestep")

Axes = Sequence[int | str | None]


@dataclass(frozen=True)
class GraphFile:
    """One file.

    Args:
        name: :data:`STEP` or one of :data:`PARTS`.
        inputs: axes of each, by name.
        outputs: names, in order.
    """

    name: str
    path: Path
    inputs: Mapping[str, Axes]
    outputs: Sequence[str]


def parts_of(onnx: Path) -> list[GraphFile]:
    """Return the files that lie beside a whole graph, the step's first; empty where it was not cut."""
    names = [name for name in (STEP, *PARTS) if onnx.with_name(f"{name}.onnx").is_file()]
    return [read(onnx.with_name(f"{name}.onnx")) for name in names] if STEP in names else []


def read(onnx: Path) -> GraphFile:
    """Return what goes into a graph and comes out of it."""
    import onnx as library

    graph = library.load(onnx, load_external_data=False).graph
    made_of = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: axes_of(value) for value in graph.input if value.name not in made_of}
    return GraphFile(onnx.stem, onnx, inputs, [value.name for value in graph.output])


def axes_of(value: ValueInfoProto) -> list[int | str | None]:
    """Return the sizes and names of the axes of a value in a graph; ``None`` where one has neither."""
    return [
        dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else None)
        for dim in value.type.tensor_type.shape.dim
    ]
