"""A ``tensorrt`` graph in operators that a CPU has, for checking it where no GPU is.

TensorRT's FP4 quantizer and ONNX's FLOAT4E2M1 have no kernel in ONNX Runtime. Here the quantizer becomes a function with
the meaning that NVIDIA documents (:mod:`.functions`), FP4 initializers become the same bits as UINT4, and a DequantizeLinear of
FP4 becomes a product. Everything else, above all which scale goes where, stays the file's own: it is the file that is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.export.function_text import DOMAIN
from qdiff.export.functions import function
from qdiff.files import temporary_beside
from qdiff.graphs.walk import graphs, initializers, nodes

if TYPE_CHECKING:
    from onnx import NodeProto


@contextlib.contextmanager
def emulated(path: Path) -> Iterator[Path]:
    """Yield a graph that ONNX Runtime's CPU runs, beside ``path`` (whose weights it reads) until the context ends;
    ``path`` itself if it holds no FP4.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    fp4 = {tensor.name for tensor in initializers(model.graph) if tensor.data_type == onnx.TensorProto.FLOAT4E2M1}
    values = {node.output[0] for node in nodes(model.graph) if node.op_type == "TRT_FP4DynamicQuantize"}
    if not fp4 and not values:
        yield path
        return
    for tensor in initializers(model.graph):
        if tensor.name in fp4:
            tensor.data_type = onnx.TensorProto.UINT4
    for node in nodes(model.graph):
        if node.output[0] in values:
            _become(node, "BlockQuantize_nvfp4")
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            _become(node, "ScaleBlocks_nvfp4")
        elif node.op_type == "DequantizeLinear" and node.input[0] in fp4:
            _become(node, "Dequantize_nvfp4")
    for graph in graphs(model.graph):
        del graph.value_info[:]  # some are of FP4
    there = {each.name for each in model.functions}
    calls = {node.op_type for node in nodes(model.graph) if node.domain == DOMAIN}
    model.functions.extend(function(name) for name in sorted(calls - there))
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    with temporary_beside(path, model.SerializeToString()) as made:
        yield made


def _become(node: NodeProto, name: str) -> None:
    node.domain, node.op_type = DOMAIN, name
    del node.attribute[:]  # block and axis are constants of the function
