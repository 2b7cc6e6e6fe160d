"""What an exported graph really holds: read from the file, not from what we meant to write.

- the file is valid ONNX (checker, with its external data);
- every layer of the plan has the precision that was asked (:mod:`.reading` tells which it has);
- no float copy of a quantized weight is left anywhere.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qdiff.errors import IntegrityError, option
from qdiff.export.reading import Graph, Realised
from qdiff.formats.table import format_named
from qdiff.graphs.walk import nodes
from qdiff.plan.plan import Plan
from qdiff.routing.blocks import in_branches


def check_file(path: Path) -> None:
    """Run the ONNX checker on the file and its external data.

    Raises:
        IntegrityError: with the checker's first line.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise IntegrityError(
            f"{path} is not valid ONNX: {str(error).splitlines()[0]}", f"export again with {option('force', True)}"
        ) from None


def file_bytes(path: Path) -> int:
    """Return bytes of the graph and of the external data beside it."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(path.name))


def realised_precision(path: Path, plan: Plan) -> dict[str, Realised]:
    """Return the precision of every layer of the plan as the graph has it.

    Raises:
        IntegrityError: a layer is not in the graph, or a float copy of a quantized weight is.
    """
    graph = Graph(path)
    found: dict[str, Realised] = {}
    for layer in plan.layers:
        if layer.quantized:
            found[layer.name] = graph.quantized_layer(layer.name)
        else:
            found[layer.name] = Realised(layer.weights)
    _no_float_copies(graph, plan)
    return found


def downgraded(plan: Plan, realised: dict[str, Realised], outputs: frozenset[str]) -> list[str]:
    """Return layers whose realised precision is not the one that was asked, as sentences.

    Args:
        plan: what was asked.
        realised: what each layer has in the graph, by name.
        outputs: formats of outputs that the target runs; others are expected to be float.
    """
    lost = []
    for layer in plan.layers:
        activations = layer.activations if format_named(layer.activations).quantized else None
        output = layer.output if layer.output in outputs else None
        asked = Realised(layer.weights, activations, layer.per_token, output)
        got = realised[layer.name]
        if got != asked:
            lost.append(f"{layer.name}: asked {asked}, the graph has {got}")
    return lost


def require_sparse(path: Path, plan: Plan) -> None:
    """Refuse a graph in which another number of attentions follows lists than the plan says.

    Raises:
        IntegrityError: attention that was to be sparse is dense, or the other way round.
    """
    import onnx

    from qdiff.attention.nodes import DOMAIN, WHOLE

    graph = onnx.load(str(path), load_external_data=False).graph
    found = sum(node.domain == DOMAIN and node.op_type.startswith(WHOLE) for node in nodes(graph))
    layers = [] if plan.attention is None else [layer.name for layer in plan.attention.layers]
    wanted = sum(len(in_branches(name, plan.structure.branches)) for name in layers)
    if found != wanted:
        raise IntegrityError(
            f"{wanted} attentions of the plan follow block lists, {found} of the graph do", "please report this"
        )


def _parameter_outside(name: str, plan: Plan) -> bool:
    """Return whether an initializer is called like a parameter of a layer that no plan is for (Wan's timestep
    embedding).
    """
    wrapped, _, own = name.partition("backbone.")
    layer = own.removesuffix(".weight")
    parameter = bool(wrapped) and own == f"{layer}.weight"
    return parameter and all(layer != planned.name for planned in plan.layers)


def _no_float_copies(graph: Graph, plan: Plan) -> None:
    import onnx

    # By shape, because a copy has no telling name: as many float weights of a shape as kept layers have it, none more.
    allowed = Counter(tuple(sorted(layer.shape)) for layer in plan.layers if not layer.quantized)
    suspicious = {tuple(sorted(shape)) for layer in plan.quantized for shape in (layer.shape, layer.matrix)}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    found: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in {**graph.initializers, **graph.constants}.items():
        shape = tuple(sorted(tensor.dims))
        if tensor.data_type in floats and shape in suspicious and not _parameter_outside(name, plan):
            found.setdefault(shape, []).append(name)
    for shape, names in found.items():
        if len(names) > allowed[shape]:
            raise IntegrityError(
                f"the graph holds {len(names)} float weights of the shape {list(shape)}, the plan keeps {allowed[shape]}: "
                f"a float copy of a quantized weight is among {', '.join(names[:5])}"
            )
