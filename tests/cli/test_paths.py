"""Paths and numbers that nobody meant: each is refused at once, by what is wrong with it, and no file of a user is touched."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

LONG, DEEP = "x" * 300, "/".join(["folder"] * 700)


@pytest.mark.parametrize("path", [LONG, DEEP, "a\x00b"])
def test_paths_that_no_file_system_takes(fails, finished, path):
    what = "NUL" if "\x00" in path else "is too long"
    for command in (
        ("inspect", path),
        ("calibrate", "-o", path),
        ("calibrate", "--prompts", path),
        ("calibrate", "--weights", path),
        ("run", "-o", path),
        ("quantize", finished.path, "--plan", path),
        ("quantize", finished.path, "--recipe", f"{path}.yaml"),
        ("generate", finished.path, "--prompt", "x", "-o", f"{path}.png"),
        ("compare", finished.path, "--prompts", path),
        ("demo", path),
        ("demo", "--auth", path),
    ):
        fails(2, what, *command)


def test_the_longest_name_leaves_no_room_for_a_temporary_one(cli, finished, tmp_path):
    picture = tmp_path / f"{'n' * 250}.png"
    assert cli("generate", finished.path, "--prompt", "x", "--engine", "eager", "-o", picture).code == 0
    assert picture.stat().st_size > 100 and [path.name for path in tmp_path.iterdir()] == [picture.name]


def test_arguments_that_are_not_utf_8(fails, finished):
    fails(2, "is not UTF-8", "inspect", "\udcff")
    fails(2, "is not UTF-8", "generate", finished.path, "--prompt", "a \udcff")


def test_an_empty_path_is_not_the_current_folder(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "mine.txt").write_text("mine")
    for command in ("calibrate", "run"):
        fails(2, "an empty path was given", command, "--weights", "random:pixart-tiny", "-o", "", "--force")
    fails(2, "an empty path", "inspect", "")
    tiny = ("--weights", "random:pixart-tiny", "--samples", 1, "--steps", 1)
    for force in ((), ("--force",)):
        fails(3, "holds files that this run did not make", "calibrate", *tiny, "-o", ".", *force)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]


@pytest.mark.parametrize("gate", ["nan", "inf", "-1"])
def test_a_gate_is_a_number_of_decibels(fails, finished, tmp_path, gate):
    fails(2, "is no number of dB", "compare", finished.path, "--min-psnr", gate)
    fails(2, "is no number of dB", "run", "-o", tmp_path / "new", "--min-psnr", gate)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("count", [0, -1, 257, 5_000_000, 2**31, 2**70])
def test_numbers_of_pictures_are_checked_before_any_work(fails, finished, tmp_path, count):
    start = time.perf_counter()
    fails(2, f"--pictures {count} is not between 1 and 256", "compare", finished.path, "--pictures", count)
    fails(2, f"--pictures {count} is not between", "correct", finished.path, "--pictures", count)
    fails(2, f"--pictures {count} is not between", "run", "-o", tmp_path / "new", "--pictures", count)
    assert time.perf_counter() - start < 5 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/mem"])
def test_devices_are_not_read(cli, finished, path):
    start = time.perf_counter()
    for command in (
        ("calibrate", "--prompts", path),
        ("compare", finished.path, "--prompts", path),
        ("quantize", finished.path, "--plan", path),
    ):
        result = cli(*command)
        assert result.code == 3 and "error: " in result.err and "bug" not in result.err, result.err
    assert time.perf_counter() - start < 5


def test_files_of_any_size_are_not_read(fails, finished, tmp_path):
    for name, command in {
        "plan.json": ("quantize", finished.path, "--plan"),
        "recipe.yaml": ("quantize", finished.path, "--recipe"),
        "prompts.txt": ("calibrate", "--prompts"),
    }.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(10**9)  # sparse
        fails(3, "are read", *command, tmp_path / name)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    fails(3, "not valid JSON", "quantize", finished.path, "--plan", tmp_path / "deep.json")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    fails(3, "no regular file", "quantize", finished.path, "--recipe", tmp_path / "link.yaml")


def test_inspect_fails_after_it_has_shown_a_changed_file(cli, spoilt):
    assert cli("inspect", spoilt).code == 0
    shutil.copy(spoilt / "compare.json", spoilt / "quantization.json")
    text, told = cli("inspect", spoilt), cli("inspect", spoilt, "--json")
    assert text.code == told.code == 5
    assert "STAGE" in text.out and "quantization.json is not the file" in text.out and '"changed": [' in told.out
    assert "error: " in text.err and "quantization.json" in text.err and "--force" in text.err
    (spoilt / "plan.json").write_text("{")
    assert cli("inspect", spoilt).code == 5


@pytest.mark.slow
def test_a_hard_linked_copy_of_a_run(cli, finished, tmp_path):
    """``cp -al``: both folders still build, export and are whole."""
    first, second = finished.copy(tmp_path / "first"), tmp_path / "second"
    shutil.copytree(first, second, copy_function=os.link)
    for run in (second, first):
        assert cli("inspect", run).code == 0
        for command in (
            ("build", run, "--engine", "openvino", "--force"),
            ("generate", run, "--prompt", "x", "--engine", "openvino", "-o", tmp_path / "x.png"),
        ):
            result = cli(*command)
            assert result.code == 0, result.err
    assert cli("quantize", second, "--force").code == 0
    assert cli("inspect", first).code == 0, "what was written there is not seen here"


def test_files_beside_ours_outlive_force(cli, spoilt):
    mine = [spoilt / "calibration" / "mine.txt", spoilt / "images" / "holiday.png", spoilt / "onnx" / "mine.txt"]
    for path in mine:
        path.write_text("mine")
    tiny = ("--weights", "random:pixart-tiny", "--samples", 2, "--steps", 2, "-o", spoilt, "--force")
    assert cli("calibrate", *tiny).code == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert not Path(spoilt / "calibration" / "trajectory-00001.safetensors").exists(), "of five prompts"
