"""What lies in a file's place: folders, pipes, links, and parts of a stage that were changed. Each is refused at once, with a way
out, and nothing outside the run folder is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qdiff.errors import InputError, IntegrityError
from qdiff.files import open_tensors, read_json, temporary_beside, write_text
from qdiff.runs.partial import Scratch
from qdiff.runs.run import Run

pytestmark = pytest.mark.timeout(60, func_only=True)  # ends a test that waits for somebody to write into a pipe


def put(path: Path, kind: str) -> None:
    """Puts a folder, a pipe or a link to a file outside at ``path``."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        outside = path.parent.parent / "outside"
        outside.write_text("somebody's")
        path.symlink_to(outside)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_readers_of_ours_refuse_what_is_no_file(tmp_path, kind):
    put(tmp_path / "x", kind)
    with pytest.raises(IntegrityError, match="the thing at .* is") as caught:
        read_json(tmp_path / "x", "the thing")
    assert caught.value.fix
    with pytest.raises(IntegrityError, match="the thing at .* is"), open_tensors(tmp_path / "x", "the thing"):
        pass


def test_a_folder_in_the_place_of_a_file_that_is_written_is_refused(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match="is a folder") as caught:
        write_text(tmp_path / "report.html", "a page")
    assert caught.value.fix and list(tmp_path.iterdir()) == [tmp_path / "report.html"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_the_lock_is_a_plain_file_and_nothing_else_is_written(tmp_path, kind):
    run = Run(tmp_path / "run")
    with run.stage("calibrate", {}) as work:
        assert work is not None
    put(run.file(".lock"), kind)
    with pytest.raises(IntegrityError, match=r"\.lock") as caught, run.stage("calibrate", {"other": 1}, force=True):
        pass
    assert caught.value.fix and (kind != "link" or (tmp_path / "outside").read_text() == "somebody's")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("command", [["inspect"], ["calibrate", "-o"]])
def test_a_manifest_that_is_no_file_is_refused(cli, tmp_path, kind, command):
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / "run.json", kind)
    result = cli(*command, tmp_path / "run")
    assert result.code in (3, 5) and "run.json" in result.err and "fix: " in result.err


def test_a_part_that_was_changed_is_refused(tmp_path):
    """A flipped bit of a tensor is no error of safetensors."""
    scratch = Scratch(tmp_path / "parts", "mine")
    tensors = {
        "a": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
        "b": torch.tensor(True),
        "c": torch.zeros(0),
        "d": torch.ones(4).to(torch.float8_e4m3fn),
    }
    scratch.save("one", tensors, {"facts": [1]})
    loaded = scratch.load("one")
    assert loaded is not None and loaded[1] == {"facts": [1]}
    assert all(torch.equal(loaded[0][name].float(), tensor.float()) for name, tensor in tensors.items())
    path = tmp_path / "parts" / "one.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed after it was written"):
        scratch.load("one")


def test_a_graph_that_a_killed_build_left_beside_another_is_removed(tmp_path):
    run = Run(tmp_path / "run")
    graph = run.file("onnx", "onnxruntime", "model.onnx")
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"a graph")
    with temporary_beside(graph, b"another") as left:
        os.link(left, tmp_path / "kept")
    os.link(tmp_path / "kept", left)  # as after a kill inside the context
    with run.stage("calibrate", {}) as work:
        assert work is not None
    assert [path.name for path in graph.parent.iterdir()] == ["model.onnx"]


def test_a_copy_that_a_kill_left_behind_is_written_again(tmp_path):
    """The manifest is written first: a kill between the two leaves an older copy."""
    run = Run(tmp_path / "run")
    with run.stage("calibrate", {}) as work:
        assert work is not None
        older = run.file("run.copy.json").read_bytes()
    run.file("run.copy.json").write_bytes(older)
    with run.stage("calibrate", {}) as work:
        assert work is None
    assert run.file("run.copy.json").read_bytes() == run.file("run.json").read_bytes() != older


@pytest.mark.slow
def test_a_stage_that_was_begun_anew_and_killed_leaves_no_summary_of_the_old_one(tmp_path):
    def make(stage: str, **more: bool) -> None:
        with run.stage(stage, {}, **more) as work:
            assert work is not None
            work.output(run.file(f"{stage}.json")).write_text("{}")

    run = Run(tmp_path / "run")
    for stage in ("calibrate", "quantize", "compare", "report"):
        make(stage)
    with pytest.raises(KeyboardInterrupt), run.stage("quantize", {}, force=True):
        raise KeyboardInterrupt  # as a kill: the manifest on disk stays as it is
    run = Run(tmp_path / "run")
    make("quantize")
    assert sorted(path.stem for path in run.path.glob("*.json")) == ["calibrate", "quantize", "run", "run.copy"]
