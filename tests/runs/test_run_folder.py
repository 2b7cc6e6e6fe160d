"""What happens to a run folder from outside: a manifest that is cut, files of others in it, another process, hard links."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from qdiff.errors import InputError, IntegrityError, UsageError
from qdiff.files import write_text
from qdiff.runs.lock import RunLockedError
from qdiff.runs.run import Run
from tests.stage_of_one_file import make_stage


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "", None])
def test_a_cut_manifest_costs_nothing(tmp_path, damage, caplog):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {"seed": 0})
    whole = run.file("run.json").read_bytes()
    run.file("run.json").unlink() if damage is None else run.file("run.json").write_text(damage(whole.decode()))
    again = Run.existing(run.path)
    assert again.done("calibrate") and "its copy run.copy.json is taken" in caplog.text
    assert run.file("run.json").read_bytes() == whole
    assert make_stage(again, "calibrate", {"seed": 0}) == "skipped"


def test_the_copy_of_a_manifest_is_sealed_too(tmp_path):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {"seed": 0})
    manifest = json.loads(run.file("run.json").read_text())
    manifest["stages"]["calibrate"]["inputs"]["seed"] = 5
    run.file("run.copy.json").write_text(json.dumps(manifest))
    run.file("run.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"run\.json at|run\.json"):
        Run(run.path)


def test_force_deletes_what_qdiff_wrote_and_nothing_else(tmp_path, caplog):
    run = Run(tmp_path / "run")
    folder = run.file("calibration")
    with run.stage("calibrate", {"seed": 0}) as stage:
        write_text(stage.output(folder / "prompts.txt"), "a")
        write_text(stage.output(folder / "trajectory-00001.safetensors"), "b")
    for name in ("holiday.png", "deep/letter.txt"):
        write_text(folder / name, "mine")
    with run.stage("calibrate", {"seed": 1}, force=True, leftovers=["calibration"]) as stage:
        assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["holiday.png", "letter.txt"]
        write_text(stage.output(folder / "prompts.txt"), "c")
    assert "2 files that qdiff did not write" in caplog.text


def test_what_a_forgotten_stage_wrote_is_still_known(tmp_path):
    run = Run(tmp_path / "run")
    make_stage(run, "calibrate", {})
    with run.stage("quantize", {}) as stage:
        write_text(stage.output(run.file("quantization", "a.json")), "a")
    make_stage(run, "calibrate", {"other": 1}, replace=True)  # forgets quantize, whose file stays
    assert run.file("quantization", "a.json").is_file() and not run.done("quantize")
    with run.stage("quantize", {}, force=True, leftovers=["quantization"]):
        assert not run.file("quantization").exists()


def test_a_stage_that_another_process_works_at_is_not_called_cut_off(tmp_path):
    run = Run(tmp_path / "run")
    with run.stage("calibrate", {}):
        with pytest.raises(RunLockedError, match="another qdiff works in .*'calibrate' is not finished"):
            Run(run.path).entry("calibrate")
    assert Run(run.path).entry("calibrate")
    with pytest.raises(ValueError), run.stage("quantize", {}):
        raise ValueError
    with pytest.raises(InputError, match="was cut off"):
        Run(run.path).entry("quantize")


def test_a_hard_linked_copy_is_a_run_of_its_own(tmp_path):
    """``cp -al``: both folders work, one at work does not lock the other, and nothing that is written shows in both."""
    run = Run(tmp_path / "run")
    with run.stage("calibrate", {}) as stage:
        write_text(stage.output(run.file("onnx", "model.onnx.data")), "weights")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy, copy_function=os.link)
    other = Run(copy)
    other.verify("calibrate")
    assert os.stat(copy / "onnx/model.onnx.data").st_nlink == 1 == os.stat(run.file("onnx/model.onnx.data")).st_nlink
    with run.stage("quantize", {}):
        assert make_stage(other, "quantize", {"other": 1}) == "made"
    assert not Run(run.path).done("export") and Run(run.path).entry("quantize")["inputs"] == {}


@pytest.mark.parametrize("folder", ["images", "images/eager"])
def test_a_place_that_cannot_be_written_is_seen_before_the_work(tmp_path, monkeypatch, folder):
    from qdiff import files
    from qdiff.runs import run as artifacts

    run = Run(tmp_path / "run")
    run.path.mkdir()
    if folder == "images":
        run.file(folder).write_text("a file")
    else:
        run.file(folder).mkdir(parents=True)

    def require(place, **options):  # as for a user who may not write there; root may everywhere
        if folder == "images/eager" and place == run.file(folder):
            raise UsageError(f"nothing can be written into the folder {place}")
        files.require_writable(place, **options)

    monkeypatch.setattr(artifacts, "require_writable", require)
    began = []
    with pytest.raises(UsageError, match=f"nothing can be written into the folder .*{folder}"):
        with run.stage("compare", {}, leftovers=["images"]):
            began.append(1)
    assert not began
