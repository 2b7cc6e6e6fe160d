"""Walks through ONNX graphs as protobufs, nested graphs (the branches of an ``If``) included. ONNX itself is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, NodeProto, TensorProto

G = TypeVar("G", bound="GraphProto | FunctionProto")


def graphs(graph: G) -> Iterator[G | GraphProto]:
    """Yield a graph or function and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            nested = [attribute.g] if attribute.HasField("g") else []
            for inner in [*nested, *attribute.graphs]:
                yield from graphs(inner)


def nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield their nodes."""
    for each in graphs(graph):
        yield from each.node


def initializers(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Yield their initializers."""
    for each in graphs(graph):
        yield from getattr(each, "initializer", ())
        for sparse in getattr(each, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)


def tensors(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Yield their initializers and the tensors in their nodes' attributes."""
    yield from initializers(graph)
    for node in nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
