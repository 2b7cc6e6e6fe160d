"""Codes of 6 bits, unpacked to INT8 before a runtime reads the graph.

No runtime has a type for them, so a graph unpacks their bytes in nodes (``qdiff.Unpack_int6``). ONNX Runtime folds those when it
loads the graph, through integers of 32 bits that it keeps: 37 bytes a weight at the peak and 25 afterwards, where INT8 takes one
or two (docs/log).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.graphs.walk import graphs, initializers

if TYPE_CHECKING:
    import numpy
    import onnx

_PREFIX = "Unpack_"


def take_out_unpacking(model: onnx.ModelProto, folder: Path) -> dict[str, numpy.ndarray]:
    """Replace what unpacks constants by initializers that the caller has to give to the session.

    Args:
        model: the graph as a protobuf, its weights in their files; changed in place.
        folder: where those files lie.

    Returns:
        int8 arrays by the names of those initializers, in the layout in which the graph wants them.
    """
    import numpy
    import onnx
    import torch

    from qdiff.attention.nodes import DOMAIN
    from qdiff.formats.packing import unpack
    from qdiff.formats.table import format_named

    packed = {tensor.name: tensor for tensor in initializers(model.graph)}
    found: dict[str, numpy.ndarray] = {}
    for graph in graphs(model.graph):
        unpacking = [
            node
            for node in graph.node
            if node.domain == DOMAIN and node.op_type.startswith(_PREFIX) and node.input[0] in packed
        ]
        for node in unpacking:
            tensor = packed[node.input[0]]
            readers = [other for other in graph.node if node.output[0] in other.input]
            turned = len(readers) == 1 and readers[0].op_type == "Transpose"
            name = f"{tensor.name}.{'turned' if turned else 'unpacked'}"
            if name not in found:
                data = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
                format = format_named(node.op_type.removeprefix(_PREFIX))
                codes = unpack(torch.from_numpy(numpy.array(data)), format).numpy()
                found[name] = numpy.ascontiguousarray(codes.T) if turned else codes
                stand_in = onnx.TensorProto(
                    name=name,
                    data_type=onnx.TensorProto.INT8,
                    dims=found[name].shape,
                    data_location=onnx.TensorProto.EXTERNAL,
                )
                stand_in.external_data.add(key="location", value="given")
                model.graph.initializer.append(stand_in)
            last = readers[0] if turned else node
            for other in (other for inner in graphs(graph) for other in inner.node):
                other.input[:] = [name if read == last.output[0] else read for read in other.input]
            graph.node.remove(node)
            if turned:
                graph.node.remove(readers[0])
    read = {name for graph in graphs(model.graph) for node in graph.node for name in node.input}
    for graph in graphs(model.graph):
        kept = [tensor for tensor in graph.initializer if tensor.name in read or not tensor.name.endswith(".codes")]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return found
