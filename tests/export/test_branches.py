"""Choices become ``If`` nodes: the values stay, what one branch alone needs is inside it, and the other is not computed."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qdiff.export.branches import sink_branches
from qdiff.export.onnx_graph import write_graph
from qdiff.export.translations import TARGETS
from qdiff.graphs.walk import graphs, nodes
from qdiff.routing import ops


class Chain(nn.Module):
    """Two blocks in a row: one of two branches and one of three, the last of which is what a caller kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(40, 40) for _ in range(5))
        self.shared = nn.Linear(40, 40)

    def forward(self, x, kept, routes):
        shift = self.shared(x).mean(dim=1, keepdim=True)
        first = ops.choose(routes[0], [self.linears[0](x) + shift, torch.relu(self.linears[1](x)) + shift])
        second = ops.choose(routes[1], [self.linears[2](first), self.linears[3](first) * shift, first + kept])
        return self.linears[4](second), first


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    module, target = Chain().eval(), TARGETS["onnxruntime"]
    values = (torch.randn(2, 6, 40), torch.randn(2, 6, 40), torch.zeros(2, dtype=torch.int64))
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, None)
    program = write_graph(module, values, axes, target, ["x", "kept", "routes"], ["y", "first"])
    assert sink_branches(program.model) == 2
    path = tmp_path_factory.mktemp("branches") / "model.onnx"
    program.save(str(path), external_data=True)
    return module, path


@pytest.mark.parametrize("routes", [(a, b) for a in (0, 1) for b in (0, 1, 2, -1)])
def test_every_route_computes_what_torch_computes(written, routes):
    module, path = written
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, kept, chosen = torch.randn(3, 5, 40), torch.randn(3, 5, 40), torch.tensor(routes)
    got = session.run(None, {"x": x.numpy(), "kept": kept.numpy(), "routes": chosen.numpy()})
    for mine, theirs in zip(module(x, kept, chosen), got, strict=True):
        assert torch.allclose(mine, torch.from_numpy(theirs), atol=1e-5)


def test_what_one_branch_needs_is_inside_it(written):
    _, path = written
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    inner = list(graphs(model.graph))[1:]
    ifs = sum(node.op_type == "If" for node in nodes(model.graph))
    assert ifs == 3 and len(inner) == 2 * ifs, "three alternatives are an If inside an If"

    def weights(graph) -> int:
        return sum(list(tensor.dims) == [40, 40] for tensor in graph.initializer)

    assert weights(model.graph) == 2, "the one that both branches need, and the one behind them"
    assert sorted(weights(graph) for graph in inner) == [0, 0, 1, 1, 1, 1]
    assert not any(node.op_type.startswith("Choose") for node in nodes(model.graph))
