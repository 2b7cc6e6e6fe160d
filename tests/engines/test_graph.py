"""Names inside an ONNX file cannot make a reader open another file."""

from __future__ import annotations

import os

import pytest

from qdiff.engines import ENGINES, BuildOptions, choose_engine
from qdiff.engines.graph import external_files, graph_bytes, graph_digest
from qdiff.errors import InputError, IntegrityError


def test_digest_covers_names_and_bytes(graph, tmp_path, write_graph):
    assert [path.name for path in external_files(graph.path)] == ["model.onnx.data"]
    first = graph_digest(graph.path)
    assert first == graph_digest(write_graph(tmp_path / "same").path)
    assert first != graph_digest(write_graph(tmp_path / "seed", seed=3).path)
    assert first != graph_digest(write_graph(tmp_path / "name", external="other.data").path)
    assert graph_bytes(graph.path) == sum(path.stat().st_size for path in graph.path.parent.iterdir())


def _rename(path, location):
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret", "a/../../secret", "", "sub/../model.onnx.data", "a\\b", "x\0y", "."]
)
def test_names_that_leave_the_folder(location, graph):
    (graph.path.parent.parent / "secret").write_text("secret")
    _rename(graph.path, location)
    with pytest.raises(IntegrityError):
        external_files(graph.path)


@pytest.mark.parametrize("attack", ["symbolic link", "hard link", "link in the way", "folder", "pipe"])
def test_links(attack, graph, tmp_path):
    data = graph.path.with_name("model.onnx.data")
    away = tmp_path / "away"
    away.mkdir()
    if attack == "hard link":
        os.link(data, away / "other")
    elif attack == "link in the way":
        inside = graph.path.with_name("inside")
        inside.mkdir()
        data.rename(inside / data.name)
        graph.path.with_name("sub").symlink_to(inside)
        _rename(graph.path, f"sub/{data.name}")
    else:
        data.rename(away / data.name)
        if attack == "symbolic link":
            data.symlink_to(away / data.name)
        elif attack == "folder":
            data.mkdir()
        else:
            os.mkfifo(data)
    for name in ENGINES:
        engine = choose_engine(name)
        if engine.target and engine.missing_for_build() is None:
            with pytest.raises(IntegrityError):
                engine.build(graph.path, tmp_path, BuildOptions(compute_capability="12.0"))


def test_missing_files(graph, tmp_path):
    with pytest.raises(InputError, match="qdiff.export"):
        graph_digest(tmp_path / "model.onnx")
    graph.path.with_name("model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"'model\.onnx\.data', which is missing"):
        graph_digest(graph.path)


def test_weights_in_nested_graphs_count(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    inner = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    del inner.float_data[:]
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="branch.data")
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["o"], value=inner)
    branch = helper.make_graph([constant], "branch", [], [out])
    node = helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("c", TensorProto.BOOL, [])], [out])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert isinstance(onnx.load(path, load_external_data=False), onnx.ModelProto)
    (tmp_path / "branch.data").write_bytes(b"\0\0\x80\x3f")
    assert [file.name for file in external_files(path)] == ["branch.data"]
