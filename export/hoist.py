"""Takes out of the sampler's loop what does not change in it (loop-invariant code motion, on the finished graph).

A backbone is called at every step, but keys and values of its cross-attentions follow from the prompt alone, and the embedding of
the timestep from the timestep alone. So the graph is cut: ``step.onnx`` is called at every step, ``prompt.onnx`` once for a
prompt, ``timestep.onnx`` once for a timestep, and what they return are further inputs of ``step.onnx``. Nodes move, none is
changed, and all files read the weights of the one ``model.onnx`` that they were cut from, which stays as it is.

Only what leads to a matrix product or a convolution is worth a cut, and cheap nodes after it go along while one tensor goes in
and one comes out; the rest would cost more inputs than it saves. Computing with *shapes* is free: it is repeated wherever it is
needed, from whatever input has the axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.files import write_atomically
from qdiff.graphs.parts import PARTS, STEP, axes_of
from qdiff.graphs.walk import graphs, nodes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

    from qdiff.models.base import Family
    from qdiff.models.config import Config

HEAVY = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


def write_parts(onnx: Path, sources: Mapping[str, Set[str]]) -> list[Path]:
    """Write ``step.onnx`` and the parts beside a graph; nothing where there is nothing to take out.

    Args:
        onnx: the whole graph.
        sources: for each part the inputs that it may read.

    Returns:
        the files, the step's first.
    """
    import onnx as library

    model = library.load(onnx, load_external_data=False)
    found: dict[str, ModelProto] = {}
    for part, inputs in sources.items():
        made = hoist(model, inputs)
        if made is not None:
            found[part], model = made
    if not found:
        return []
    files = []
    for name, graph in ((STEP, model), *found.items()):
        path = onnx.with_name(f"{name}.onnx")
        write_atomically(path, partial(Path.write_bytes, data=graph.SerializeToString()))
        files.append(path)
    return files


def sources_of(family: Family, config: Config) -> dict[str, frozenset[str]]:
    """Return inputs that each part may read: those that stay the same for a picture, and the timestep."""
    specs = family.inputs(config)
    prompt = frozenset(spec.name for spec in specs if not spec.varies)
    timestep = frozenset(spec.name for spec in specs if spec.varies and spec.exact)
    return dict(zip(PARTS, (prompt, timestep), strict=True))


def hoist(model: ModelProto, inputs: Set[str]) -> tuple[ModelProto, ModelProto] | None:
    """Return what a model computes from ``inputs`` alone.

    Returns:
        a model of that, and one of the rest, which has the first one's outputs among its inputs; ``None`` where it is not
        worth it.
    """
    view = _View(model.graph)
    inputs = inputs & view.inputs.keys()
    moved = view.worth(view.able(inputs))
    while moved:
        carried = view.carried(moved)
        unfit = [name for name in carried if not view.is_float(name)]
        if not unfit:
            break
        moved -= {view.producer[name] for name in unfit}
    if not moved:
        return None
    return view.part(model, moved, carried, inputs), view.rest(model, moved, carried)


class _View:
    """A graph with its links: who makes a value and who reads it.

    ``data`` holds the names of values that depend on the data of an input: not those that follow from shapes and constants alone.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.types = {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}
        self.inputs = {value.name: value for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.producer: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        self.reads: list[list[str]] = []
        self.data = set(self.inputs)
        for index, node in enumerate(graph.node):
            names = list(_read_by(node))
            self.reads.append(names)
            of_shape = node.op_type in ("Shape", "Size")
            if not of_shape and not self.data.isdisjoint(names):
                self.data.update(node.output)
            for name in names:
                self.readers.setdefault(name, []).append(index)
            for name in node.output:
                self.producer[name] = index

    def able(self, inputs: Set[str]) -> set[int]:
        """Return nodes that can be computed from ``inputs``."""
        found: set[int] = set()
        for index, node in enumerate(self.graph.node):
            nested = any(attribute.HasField("g") for attribute in node.attribute)
            if node.output[0] in self.data and not nested:
                if all(self._there(name, inputs, found) for name in self.reads[index]):
                    found.add(index)
        return found

    def _there(self, name: str, inputs: Set[str], able: set[int]) -> bool:
        """Return whether a value can be had in a graph with these inputs and nodes."""
        if name in self.data:
            return name in inputs or self.producer.get(name) in able
        index = self.producer.get(name)
        if index is None:  # a constant
            return True
        node = self.graph.node[index]
        if node.op_type in ("Shape", "Size") and node.input[0] in self.data:
            return self._there(node.input[0], inputs, able) or self._sources(node, inputs) is not None
        return all(self._there(each, inputs, able) for each in self.reads[index])

    def _sources(self, node: NodeProto, inputs: Set[str]) -> list[tuple[str, int]] | None:
        """Return inputs and axes of them that have the sizes that a ``Shape`` of another input gives."""
        if node.op_type != "Shape" or node.input[0] not in self.inputs:
            return None
        axes = axes_of(self.inputs[node.input[0]])
        known = {
            axis: (name, place)
            for name in sorted(inputs)
            for place, axis in enumerate(axes_of(self.inputs[name]))
            if isinstance(axis, str)
        }
        options = {attribute.name: attribute.i for attribute in node.attribute}
        wanted = axes[options.get("start", 0) : options.get("end", len(axes))]
        found = [known.get(axis) for axis in wanted if isinstance(axis, str)]
        sources = [source for source in found if source is not None]
        return sources if len(sources) == len(wanted) else None

    def worth(self, able: set[int]) -> set[int]:
        """Return those of the nodes that could move that should; see the module's docstring."""
        found: set[int] = set()
        waiting = [index for index in able if self.graph.node[index].op_type in HEAVY]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += [self.producer[name] for name in self.reads[index] if self.producer.get(name) in able]
        for index in sorted(able - found):
            before = [name for name in self.reads[index] if name in self.data]
            moved = [name for name in before if self.producer.get(name) in found]
            alone = all(self.readers[name] == [index] and name not in self.outputs for name in moved)
            if moved and len(moved) == len(before) and alone and len(self.graph.node[index].output) == 1:
                found.add(index)
        return found

    def carried(self, moved: set[int]) -> list[str]:
        """Return values that moved nodes make and others read, in order."""
        return [
            name
            for index in sorted(moved)
            for name in self.graph.node[index].output
            if name in self.outputs or any(reader not in moved for reader in self.readers.get(name, ()))
        ]

    def is_float(self, name: str) -> bool:
        """Return whether a value is of real numbers, with known axes: what runners pass on."""
        import onnx

        value = self.types.get(name)
        kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        return value is not None and value.type.tensor_type.elem_type in kinds and None not in axes_of(value)

    def part(self, model: ModelProto, moved: set[int], carried: list[str], inputs: Set[str]) -> ModelProto:
        """Return the model of the moved nodes."""
        needed: set[int] = set()
        waiting = list(moved)
        while waiting:
            index = waiting.pop()
            node = self.graph.node[index]
            if index in needed:
                continue
            needed.add(index)
            if node.op_type not in ("Shape", "Size") or self._there(node.input[0], inputs, moved):
                waiting += [self.producer[name] for name in self.reads[index] if name in self.producer]
        made: list[NodeProto] = []
        for index in sorted(needed):
            node = self.graph.node[index]
            if node.op_type == "Shape" and not self._there(node.input[0], inputs, moved):
                made += _shapes(node, self._sources(node, inputs) or [])
            else:
                made.append(node)
        outputs = [self.types[name] for name in carried]
        read = {name for node in made for name in _read_by(node)}
        given = [self.inputs[name] for name in self.inputs if name in read]
        return _model(model, made, given, outputs)

    def rest(self, model: ModelProto, moved: set[int], carried: list[str]) -> ModelProto:
        """Return the model without the moved nodes, and without what only they needed."""
        alive: set[int] = set()
        waiting = [self.producer[name] for name in self.outputs if name in self.producer]
        while waiting:
            index = waiting.pop()
            if index not in alive and index not in moved:
                alive.add(index)
                waiting += [self.producer[name] for name in self.reads[index] if name in self.producer]
        nodes_left = [self.graph.node[index] for index in sorted(alive)]
        # an input of which only sizes are asked is not needed where another one has them
        data = {name for node in nodes_left if node.op_type != "Shape" for name in _read_by(node)} & self.inputs.keys()
        kept: list[NodeProto] = []
        for node in nodes_left:
            sources = None if node.op_type != "Shape" or node.input[0] in data else self._sources(node, data)
            kept += [node] if sources is None else _shapes(node, sources)
        read = {name for node in kept for name in _read_by(node)} | self.outputs
        given = [value for name, value in self.inputs.items() if name in read]
        return _model(model, kept, [*given, *(self.types[name] for name in carried)], list(self.graph.output))


def _read_by(node: NodeProto) -> Iterator[str]:
    """Yield names that a node reads, those that graphs inside it take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = list(graphs(attribute.g))
            made = {name for graph in inner for each in graph.node for name in each.output}
            made |= {value.name for graph in inner for value in [*graph.input, *graph.initializer]}
            asked = {name for each in nodes(attribute.g) for name in each.input if name}
            asked |= {value.name for graph in inner for value in graph.output}
            yield from sorted(asked - made)


def _shapes(node: NodeProto, sources: list[tuple[str, int]]) -> list[NodeProto]:
    """Return the ``Shape`` nodes of other inputs that give what ``node`` gives."""
    import onnx

    pieces = [f"{node.output[0]}_{place}" for place in range(len(sources))]
    if len(sources) == 1:
        pieces = [node.output[0]]
    made = [
        onnx.helper.make_node("Shape", [name], [piece], start=axis, end=axis + 1)
        for piece, (name, axis) in zip(pieces, sources, strict=True)
    ]
    return made if len(sources) == 1 else [*made, onnx.helper.make_node("Concat", pieces, [node.output[0]], axis=0)]


def _model(
    model: ModelProto, kept: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]
) -> ModelProto:
    """Return a model of these nodes, with the initializers, value descriptions and functions of ``model`` that they
    use.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:], made.graph.input[:]
    del made.graph.output[:], made.functions[:]
    made.graph.node.extend(kept)
    made.graph.input.extend(inputs)
    made.graph.output.extend(outputs)
    known = {value.name for value in [*inputs, *outputs]}
    read = {name for node in kept for name in _read_by(node)} | {value.name for value in outputs}
    written = {name for node in nodes(made.graph) for name in node.output}
    made.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    made.graph.value_info.extend(
        value for value in model.graph.value_info if value.name in written and value.name not in known
    )
    called = {(node.domain, node.op_type) for node in nodes(made.graph)}
    before: set[tuple[str, str]] = set()
    while called != before:  # functions call functions
        before = set(called)
        wanted = [each for each in model.functions if (each.domain, each.name) in called]
        called |= {(node.domain, node.op_type) for each in wanted for node in nodes(each)}
    made.functions.extend(wanted)
    return made
