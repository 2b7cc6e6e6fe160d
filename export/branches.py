"""Makes an ``If`` of every choice in a graph, so that a runtime computes only the branch that it takes.

A choice is traced with all its alternatives computed (``qdiff::choose``), in one flat graph: tracing, translating and storing
codes need to know nothing about branches. Here every node, and every weight, that only one alternative needs moves into that
alternative's graph; what several need stays outside, where the inner graphs see it. It is lazy evaluation: nothing is computed
twice and no value changes. (``torch.cond`` would trace each branch as a graph of its own, whose weights are then the outer
graph's inputs to it: no runtime packs those.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.export.function_text import DOMAIN

if TYPE_CHECKING:
    import onnx_ir

CHOOSE = "Choose"


def sink_branches(model: onnx_ir.Model) -> int:
    """Replace the choices of a model of ``onnx_ir``, in place, the last first.

    Returns:
        how many there were.
    """
    graph = model.graph
    choices = [node for node in graph if is_choice(node)]
    for number, choice in enumerate(reversed(choices)):
        _replace(graph, choice, len(choices) - 1 - number)
    return len(choices)


def is_choice(node: onnx_ir.Node) -> bool:
    """Return whether a node is one."""
    return node.domain == DOMAIN and node.op_type.startswith(CHOOSE)


def _replace(graph: onnx_ir.Graph, choice: onnx_ir.Node, number: int) -> None:
    import onnx_ir

    which, *values = choice.inputs
    alternatives = [value for value in values if value is not None]
    needed = [_only_for(choice, place) for place in range(1, len(choice.inputs))]
    # The branch that is tried first holds the next choice in its other branch, and so on.
    inner: onnx_ir.Graph | None = None
    for place in reversed(range(len(alternatives))):
        made = _branch(graph, alternatives[place], needed[place], f"choice_{number}_{place}")
        if inner is None:
            inner = made
            continue
        index = onnx_ir.Value(
            name=f"choice_{number}_{place}_index", const_value=onnx_ir.tensor(place, dtype=onnx_ir.DataType.INT64)
        )
        index.shape, index.type = onnx_ir.Shape([]), onnx_ir.TensorType(onnx_ir.DataType.INT64)
        equal = onnx_ir.node("Equal", [which, index], name=f"choice_{number}_{place}_taken")
        equal.outputs[0].name = f"choice_{number}_{place}_is"
        out = choice.outputs[0]
        both = onnx_ir.node(
            "If",
            [equal.outputs[0]],
            {"then_branch": made, "else_branch": inner},
            name=f"choice_{number}_{place}_if",
        )
        both.outputs[0].name = f"{out.name}_{place}"
        both.outputs[0].shape, both.outputs[0].type = out.shape, out.type
        if place:
            inner = onnx_ir.Graph(
                [], [both.outputs[0]], nodes=[equal, both], initializers=[index], name=f"choice_{number}_{place}_rest"
            )
        else:
            graph.register_initializer(index)
            graph.insert_before(choice, [equal, both])
            out.replace_all_uses_with(both.outputs[0], replace_graph_outputs=True)
    graph.remove(choice, safe=True)


def _only_for(choice: onnx_ir.Node, place: int) -> list[onnx_ir.Node]:
    """Return the nodes that nothing but input ``place`` of a choice needs, in the graph's order."""
    found: set[onnx_ir.Node] = set()
    ordered: list[onnx_ir.Node] = []
    alternative = choice.inputs[place]
    assert alternative is not None and choice.graph is not None
    waiting = [alternative.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in found or not all(_inside(value, found, choice, place) for value in node.outputs):
            continue
        found.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    position = {node: index for index, node in enumerate(choice.graph)}
    ordered = sorted(found, key=lambda node: position[node])
    return ordered


def _inside(value: onnx_ir.Value, found: set[onnx_ir.Node], choice: onnx_ir.Node, place: int) -> bool:
    uses = value.uses()
    return not value.is_graph_output() and all(
        use.node in found or (use.node is choice and use.idx == place) for use in uses
    )


def _branch(graph: onnx_ir.Graph, result: onnx_ir.Value, nodes: list[onnx_ir.Node], name: str) -> onnx_ir.Graph:
    """Return a graph that computes ``result`` by these nodes of ``graph``, which leave it, with the weights that only
    they use.
    """
    import onnx_ir

    inside = set(nodes)
    own = []
    for value in list(graph.initializers.values()):
        uses = value.uses()
        if uses and all(use.node in inside for use in uses):
            own.append(value)
    for value in own:
        assert value.name is not None
        del graph.initializers[value.name]
    graph.remove(nodes)
    if result.producer() not in inside:
        same = onnx_ir.node("Identity", [result], name=f"{name}_same")
        same.outputs[0].name = f"{name}_same_out"
        same.outputs[0].shape, same.outputs[0].type = result.shape, result.type
        nodes, result = [*nodes, same], same.outputs[0]
    return onnx_ir.Graph([], [result], nodes=nodes, initializers=own, name=name)
