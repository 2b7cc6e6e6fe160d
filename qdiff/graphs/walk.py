"""Walks through ONNX graphs as protobufs, nested graphs (the branches of an ``If``) included. ONNX itself is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph or function and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            nested = [attribute.g] if attribute.HasField("g") else []
            for inner in [*nested, *attribute.graphs]:
                yield from graphs(inner)


def nodes(graph: Any) -> Iterator[Any]:
    """Yield their nodes."""
    for each in graphs(graph):
        yield from each.node


def initializers(graph: Any) -> Iterator[Any]:
    """Yield their initializers."""
    for each in graphs(graph):
        yield from getattr(each, "initializer", ())
        for sparse in getattr(each, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)


def tensors(graph: Any) -> Iterator[Any]:
    """Yield their initializers and the tensors in their nodes' attributes."""
    yield from initializers(graph)
    for node in nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
