"""Files are whole or absent; a stage is skipped, resumed or refused; nothing that was changed is taken for ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdiff import files
from qdiff.errors import InputError, IntegrityError, MemoryExhaustedError, UsageError, command_line
from qdiff.files import open_tensors, read_json, safe_child, save_tensors, write_json, write_text
from qdiff.runs import manifest
from qdiff.runs.lock import RunLockedError
from qdiff.runs.run import Run
from tests.stage_of_one_file import make_stage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    monkeypatch.setattr(files.os, call, no_space)
    for write in (lambda: write_json(path, {"new": True}), lambda: save_tensors(path, {"x": torch.ones(9)})):
        with pytest.raises(MemoryExhaustedError, match="no space left") as caught:
            write()
        assert caught.value.exit_code == 6 and "finished parts are kept" in str(caught.value)
    monkeypatch.undo()
    assert read_json(path, "it") == {"old": True} and names(tmp_path) == ["a.json"]


def test_a_full_disk_inside_safetensors_is_the_same_error(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(MemoryExhaustedError):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(9)})
    assert names(tmp_path) == []


def test_a_write_that_breaks_off_leaves_nothing(tmp_path):
    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "a", broken)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "//etc/passwd",
        "a\x00b",
        "./..",
        "link/x",
        "link",
        "a/../../run2/x",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    root = tmp_path / "run"
    root.mkdir()
    (tmp_path / "run2").mkdir()
    (root / "link").symlink_to(tmp_path / "run2")
    with pytest.raises(IntegrityError, match="path"):
        safe_child(root, name)


def test_names_inside_the_folder_are_taken(tmp_path):
    for name in ("a", "a/b", "a/../b", "..a", "ö/…"):
        assert safe_child(tmp_path, name).is_relative_to(tmp_path.resolve())


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not at all")
        case "header":
            path.write_bytes(b"\xff" * 8 + data[8:])
        case "longer":
            path.write_bytes(data + b"\0" * 8)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "header", "longer"])
def test_damaged_tensors_and_json(tmp_path, how):
    tensors, text = tmp_path / "x.safetensors", tmp_path / "x.json"
    save_tensors(tensors, {"x": torch.arange(1000.0)}, {"qdiff": "{}"})
    write_json(text, {"a": [1, 2, 3]})
    damage(tensors, how)
    damage(text, how)
    with pytest.raises(IntegrityError, match="damaged"), open_tensors(tensors, "the tensors") as file:
        file.get_tensor("x")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        read_json(text, "the file")


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="there is no"), open_tensors(tmp_path / "x", "file"):
        pass
    with pytest.raises(InputError, match="there is no"):
        read_json(tmp_path / "x", "file")


def test_made_skipped_refused_forced(tmp_path):
    run = Run(tmp_path / "run")
    assert make_stage(run, "calibrate", {"seed": 0, "model": {"name": "a"}}) == "made"
    assert make_stage(Run(run.path), "calibrate", {"model": {"name": "a"}, "seed": 0}) == "skipped"
    with pytest.raises(InputError, match="seed was 0 and is now 1") as caught:
        make_stage(run, "calibrate", {"seed": 1, "model": {"name": "b"}})
    assert "model.name" in caught.value.message and caught.value.exit_code == 3
    assert make_stage(run, "calibrate", {"seed": 1, "model": {"name": "b"}}, force=True) == "made"
    assert make_stage(run, "calibrate", {"seed": 2}, replace=True) == "made"
    entry = Run(run.path).entry("calibrate")
    assert entry["outputs"].keys() == {"calibrate.txt"} and entry["seconds"] >= 0 and entry["peak_memory_bytes"] > 1e6
    assert entry["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_making_a_stage_anew_forgets_what_was_made_from_it(tmp_path):
    run = Run(tmp_path / "run")
    stages = ("calibrate", "quantize", "export:tensorrt", "export:onnxruntime", "build:openvino", "compare", "report")
    for name in stages:
        make_stage(run, name, {})
    assert all(run.done(name) for name in stages)
    make_stage(run, "build:openvino", {"other": 1}, replace=True)
    assert not run.done("compare") and not run.done("report") and run.done("export:tensorrt")
    make_stage(run, "quantize", {}, force=True)
    assert [name for name in stages if Run(run.path).done(name)] == ["calibrate", "quantize"]
    with pytest.raises(InputError, match="has not been done") as caught:
        run.entry("export:tensorrt")
    assert f'qdiff.export("{run.path}", target="tensorrt")' in str(caught.value)


@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_deleted_for_a_stage_whose_sources_were_changed(tmp_path, force):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    make_stage(run, "quantize", {})
    (tmp_path / "run" / "old").write_text("kept")
    run.file("calibrate.txt").write_text("changed")
    with (
        pytest.raises(IntegrityError, match="calibrate.txt"),
        run.stage(
            "quantize", {"other": 1} if force else {}, force=force, leftovers=["old"], needs=["calibrate"]
        ) as stage,
    ):
        assert stage is None, "a finished stage reads nothing"
        raise IntegrityError("calibrate.txt")
    assert Run(run.path).done("quantize") and run.file("old").exists()


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (["quantize", "RUN", "--force", "--set", "a=[1, 2]"], "qdiff quantize RUN --set 'a=[1, 2]'"),
        (["run", "--model", "pixart"], "qdiff run --model pixart"),
        (["demo"], "qdiff quantize {path}"),
    ],
)
def test_the_way_on_is_the_command_that_was_cut_off(tmp_path, monkeypatch, given, again):
    run = Run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["/bin/qdiff", *given])
    with command_line():
        with pytest.raises(KeyboardInterrupt), run.stage("quantize", {}):
            raise KeyboardInterrupt
        with pytest.raises(InputError) as caught:
            Run(run.path).entry("quantize")
    assert caught.value.fix == f"run: {again.format(path=run.path)}"
    with pytest.raises(InputError) as caught:
        Run(run.path).entry("quantize")
    assert caught.value.fix == f'run: qdiff.quantize("{run.path}")'


def test_the_manifest_says_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--fast"])
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    assert run.entry("calibrate")["command"] == "python mine.py --fast"
    with command_line():
        make_stage(run, "quantize", {})
    assert run.entry("quantize")["command"] == "qdiff --fast"


def test_a_stage_that_was_cut_off_goes_on_and_refuses_others(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.stage("calibrate", {"seed": 0}) as stage:
        assert stage is not None and not stage.resumed
        raise KeyboardInterrupt
    assert not run.done("calibrate")
    with pytest.raises(InputError, match="was cut off"):
        run.entry("calibrate")
    with pytest.raises(InputError, match="seed"):
        make_stage(Run(run.path), "calibrate", {"seed": 1})
    assert make_stage(Run(run.path), "calibrate", {"seed": 0}) == "resumed"


def test_a_stage_that_failed_before_it_wrote_anything_does_not_block_other_inputs(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match="bad"), run.stage("quantize", {"recipe": "wrong"}):
        raise InputError("bad recipe")
    assert make_stage(run, "quantize", {"recipe": "right"}) == "made"
    for options in ({"replace": True}, {"force": True}):  # and loses nothing that was finished
        with pytest.raises(InputError, match="bad"), run.stage("quantize", {"recipe": "worse"}, **options):
            raise InputError("bad recipe")
        assert make_stage(Run(run.path), "quantize", {"recipe": "right"}) == "skipped"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_exit_code_6(tmp_path, error):
    with pytest.raises(MemoryExhaustedError, match="ran out of memory"), Run(tmp_path / "run").stage("calibrate", {}):
        raise error


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    other = ("notes/.a.abcdefgh.tmp", "engines/.git/config", ".mine.tmp", "onnx/.keep")  # of the folder's owner
    for name in (".run.json.abcdefgh.tmp", ".tmpaB3dE6", "calibration/.tmpuPeWiT",
                 "calibration/.trajectory-00000.safetensors.x_123456.tmp",
                 "onnx/.tensorrt.abcdefgh/model.onnx", ".parity-abcdefgh/engine.json",
                 "engines/.openvino-0123456789abcdef.abcdefgh/model.bin", *other):  # fmt: skip
        path = run.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    make_stage(run, "quantize", {})
    assert all(run.file(name).read_text() == "half" for name in other)
    for name in other:
        run.file(name).unlink()
    assert names(run.path) == ["calibrate.txt", "quantize.txt", "run.copy.json", "run.json"]


@pytest.mark.parametrize(("change", "error"), [("other", IntegrityError), (None, InputError)])
def test_changed_and_missing_outputs(tmp_path, change, error):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    path = run.file("calibrate.txt")
    path.write_text(change) if change else path.unlink()
    with pytest.raises(error, match="calibrate.txt") as caught:
        make_stage(run, "calibrate", {})
    assert f'qdiff.calibrate(…, output="{run.path}", force=True)' in str(caught.value)
    assert make_stage(run, "calibrate", {}, force=True) == "made"


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["stages"]["calibrate"].pop("inputs"),
        lambda m: m["stages"]["calibrate"].update(status="finished"),
        lambda m: m["stages"]["calibrate"]["outputs"].update({"../../../etc/passwd": "0" * 64}),
        lambda m: m["stages"]["calibrate"]["inputs"].update(seed=5),
        lambda m: m["stages"].update(calibrate=[]),
        lambda m: m["stages"].update(unknown={}),
        lambda m: m.update(stages=[]),
        lambda m: m.update(version=99),
        lambda m: m.pop("sha256"),
        lambda m: m.clear(),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(tmp_path, edit):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {"seed": 0})
    content = json.loads(run.file("run.json").read_text())
    edit(content)
    run.file("run.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="run.json"):
        Run(run.path)


def test_the_manifest_of_another_run_is_refused(tmp_path):
    """Also of another state of this run; a kill between the manifest and its copy is neither."""
    run, other = Run(tmp_path / "run"), Run(tmp_path / "other")
    make_stage(run, "calibrate", {"seed": 0})
    early = run.file("run.copy.json").read_bytes()
    make_stage(other, "calibrate", {"seed": 1})
    shutil.copy(other.file("run.json"), run.file("run.json"))
    with pytest.raises(IntegrityError, match="of another run") as caught:
        Run(run.path)
    assert caught.value.fix is not None and "cp" in caught.value.fix
    shutil.copy(run.file("run.copy.json"), run.file("run.json"))
    assert Run(run.path).entry("calibrate")["inputs"] == {"seed": 0}
    make_stage(run, "quantize", {})
    assert early != run.file("run.copy.json").read_bytes()
    run.file("run.copy.json").write_bytes(early)
    with pytest.raises(IntegrityError, match="another state"):
        Run(run.path)


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_the_copy_is_not_waited_for(tmp_path):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    run.file("run.copy.json").unlink()
    os.mkfifo(run.file("run.copy.json"))
    assert Run(run.path).done("calibrate") and not manifest.has_copy(run.path)


def test_a_kill_between_the_manifest_and_its_copy(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    copy, write_json = run.file("run.copy.json").read_bytes(), manifest.write_json

    def killed(path: Path, value: dict) -> None:
        write_json(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make_stage(run, "quantize", {})
    monkeypatch.undo()
    assert run.file("run.copy.json").read_bytes() == copy != run.file("run.json").read_bytes()
    assert not manifest.has_copy(run.path)
    assert make_stage(Run(run.path), "quantize", {}) == "resumed"
    assert manifest.has_copy(run.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"run"', b"null"])
def test_what_is_no_manifest(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="run.json"):
        Run(tmp_path)


def test_what_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Run(tmp_path / "file")
    with pytest.raises(InputError, match="not a run folder") as caught:
        Run.existing(tmp_path)
    assert "qdiff.calibrate" in str(caught.value)


def test_one_process_at_a_time(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    lock = str(run.path / ".lock")
    code = f"import fcntl; f = open({lock!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(RunLockedError, match="another qdiff works in") as caught:
            make_stage(run, "calibrate", {})
        assert caught.value.exit_code == 3
    finally:
        other.kill()
        other.wait()
    assert make_stage(run, "calibrate", {}) == "made"  # the lock dies with its process


def test_the_folder_keeps_its_files_readable(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "ä")
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "ä"
    assert os.stat(tmp_path / "deep" / "a.txt").st_mode & 0o777 == 0o644
