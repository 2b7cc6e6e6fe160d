"""The command line: exit codes, and one clear error for every bad input, without a traceback or a loss."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qdiff import files

VERBS = (
    "models",
    "calibrate",
    "quantize",
    "export",
    "build",
    "generate",
    "compare",
    "report",
    "run",
    "inspect",
    "doctor",
)
TINY = ["--weights", "random:pixart-tiny", "--steps", "4", "--batch", "3"]  # as tests/conftest.py
CALIBRATE = ["calibrate", "--weights", "random:pixart-tiny", "--samples", "2", "--steps", "2"]


def child(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qdiff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("verb", VERBS)
def test_help(cli, verb):
    for option in ("--help", "-h"):
        result = cli(verb, option)
        assert result.code == 0 and verb in result.out and "--json" in result.out and not result.err
    assert f"qdiff {verb}" in cli(verb, "-h").out.replace("\n", " ")


def test_a_real_process(tmp_path):
    """Codes and streams as a shell sees them."""
    done = child("--version")
    assert done.returncode == 0 and "torch=" in done.stdout
    done = child("models", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[0]["name"] == "cogvideox" and not done.stderr
    done = child("inspect", tmp_path)
    assert done.returncode == 3 and not done.stdout and "error: " in done.stderr and "fix: " in done.stderr
    read, write = os.pipe()
    os.close(read)  # `qdiff models | head -0`
    done = subprocess.run([sys.executable, "-m", "qdiff", "models"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


USAGE = {
    "unknown option": (["calibrate", "--stepz", "3"], ["--stepz", "--steps"]),
    "unknown verb": (["calibrat"], ["calibrat"]),
    "no verb's argument": (["quantize"], ["RUN"]),
    "not a number": (["calibrate", "--steps", "many"], ["--steps"]),
    "model": (["calibrate", "--model", "pixrt"], ["unknown model 'pixrt'", "did you mean pixart"]),
    "model of run": (["run", "--model", "pixrt"], ["did you mean pixart"]),
    "height": ([*CALIBRATE, "--height", "50"], ["height 50 does not divide by 16", "use 48"]),
    "frames": ([*CALIBRATE, "--frames", "5"], ["--frames 5", "makes pictures"]),
    "strategy": ([*CALIBRATE, "--timesteps", "unifrom"], ["'unifrom'", "did you mean uniform"]),
    "scheduler": ([*CALIBRATE, "--scheduler", "dpmsolver+"], ["'dpmsolver+'", "dpmsolver++"]),
    "steps": ([*CALIBRATE[:3], "--samples", "2", "--steps", "0"], ["--steps 0"]),
    "samples": ([*CALIBRATE[:3], "--samples", "-1"], ["--samples -1"]),
    "huge samples": ([*CALIBRATE[:3], "--samples", "999999999"], ["--samples 999999999"]),
    "batch": ([*CALIBRATE, "--batch", "0"], ["--batch 0"]),
    "guidance": ([*CALIBRATE, "--guidance", "nan"], ["--guidance nan"]),
    "seed": ([*CALIBRATE, "--seed", "-1"], ["--seed -1"]),
    "huge seed": ([*CALIBRATE, "--seed", "99999999999999999999"], ["--seed 99999999999999999999"]),
}


@pytest.mark.parametrize("name", sorted(USAGE))
def test_usage_errors(fails, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, parts = USAGE[name]
    fails(2, parts, *arguments)
    assert not list(tmp_path.rglob("*.*")), "nothing is written before the input is checked"


RUN_USAGE = {
    "engine": (["build", "--engine", "openvno"], 2, "did you mean openvino"),
    "engine of generate": (["generate", "--prompt", "x", "--engine", "tensorrt_rt"], 2, "did you mean tensorrt_rtx"),
    "engine of compare": (["compare", "--engine", "egaer"], 2, "did you mean eager"),
    "target": (["export", "--target", "tensorr"], 2, "did you mean tensorrt"),
    "profile": (["build", "--engine", "openvino", "--profile", "huge"], 2, "huge"),
    "profile axis": (["build", "--engine", "openvino", "--profile", "batsch=1"], 2, "did you mean batch"),
    "flag": (["build", "--engine", "openvino", "--flag", "precission=f32"], 2, "did you mean precision"),
    "flag form": (["build", "--engine", "openvino", "--flag", "precision"], 2, "not of the form"),
    "capability": (["build", "--engine", "tensorrt_rtx", "--compute-capability", "big"], 2, "big"),
    "recipe": (["quantize", "--recipe", "int88"], 3, "did you mean int8"),
    "recipe file": (["quantize", "--recipe", "none.yaml"], 3, "none.yaml"),
    "set": (["quantize", "--set", "kept"], 2, "--set 'kept'"),
    "format": (["quantize", "--set", "scheme.weights=int7"], 3, "unknown format 'int7'"),
    "method": (["quantize", "--set", "methods={smoth: {}}"], 3, "did you mean smooth"),
    "generate's batch": (["generate", "--prompt", "x", "--batch", "0"], 2, "--batch 0"),
    "generate's steps": (["generate", "--prompt", "x", "--steps", "0"], 2, "--steps 0"),
    "generate's seed": (["generate", "--prompt", "x", "--seed", "-1"], 2, "--seed -1"),
    "generate's size": (["generate", "--prompt", "x", "--height", "100"], 2, "does not divide by 16"),
    "generate's scheduler": (["generate", "--prompt", "x", "--scheduler", "eulr"], 2, "euler"),
    "not a png": (["generate", "--prompt", "x", "-o", "out.jpg"], 2, ".png"),
    "no folder": (["generate", "--prompt", "x", "-o", "none/out.png"], 2, "none"),
    "nothing can be written": (["generate", "--prompt", "x", "-o", "/proc/out.png"], 2, "nothing can be written into"),
    "no prompt": (["generate"], 2, "--prompt"),
    "long prompt": (["generate", "--prompt", "x" * 100_000], 2, "100,000 characters"),
    "pictures": (["compare", "--pictures", "0"], 2, ""),
    "float with itself": (["compare", "--engine", "float"], 2, "float is what engines are compared with"),
    "no prompts file": (["compare", "--prompts", "none.txt"], 3, "none.txt"),
}


@pytest.mark.parametrize("name", sorted(RUN_USAGE))
def test_usage_errors_on_a_run(fails, finished, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (verb, *rest), code, part = RUN_USAGE[name]
    before = (finished.path / "run.json").read_bytes()
    fails(code, part, verb, finished.path, *rest)
    assert (finished.path / "run.json").read_bytes() == before


def test_a_wrong_layer_pattern_names_the_nearest_layers(fails, spoilt, cli):
    wrong = ["--set", 'ignore.pixart=["transformer_blocks.0.attn1.to_qq"]', "--force"]
    err = fails(3, "nearest layers:", "quantize", spoilt, *wrong)
    assert "transformer_blocks.0.attn1.to_q" in err
    assert cli("quantize", spoilt, "--dry-run", "--json").json["layers"]


def test_another_recipe_says_what_changed_and_what_force_costs(fails, finished):
    """Also what somebody reads whose run was made by an older version of a built-in recipe."""
    changed = ["--set", "methods.smooth.strengths=[0.5]"]
    said = ["recipe.methods.smooth.strengths was [0.3, 0.4, 0.5] and is now [0.5]",
            "forgets what was made from it: export:onnxruntime, export:tensorrt, build:onnxruntime, build:openvino",
            "… --force` keeps the stages before it, `qdiff run … --force` none"]  # fmt: skip
    fails(3, said, "quantize", finished.path, *changed)
    fails(3, said, "run", *TINY, "--prompts", finished.prompts, *changed, "-o", finished.path)
    fails(3, ["seed was 0 and is now 1", "choose another folder with -o"],
          "run", *TINY, "--prompts", finished.prompts, "--seed", 1, "-o", finished.path)  # fmt: skip


def test_weights_that_are_not_there(fails, tmp_path):
    for weights, part in {
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "from the Hub",
        "random:pixart-tine": "did you mean pixart-tiny",
        str(tmp_path): "not a diffusers folder",
    }.items():
        fails(3, part, "calibrate", "--weights", weights, "--samples", "1", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_in_the_weights(fails, tiny, tmp_path):
    import torch

    model = tiny()
    with torch.no_grad():
        model.backbone.transformer_blocks[0].attn1.to_q.weight[0, 0] = float("nan")
    model.pipeline.save_pretrained(tmp_path / "weights")
    fails(3, "to_q.weight", "calibrate", "--weights", tmp_path / "weights", "--samples", "1", "-o", tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no prompt"),
        (b"\x00\xff\x80", "not a text file"),
        (b"x" * 100_000, "100,000 characters"),
        (None, "cannot"),
    ],
)
def test_prompts_files(fails, finished, tmp_path, content, part):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    fails(3, part, *CALIBRATE[:3], "--prompts", path, "-o", tmp_path / "run")
    fails(3, part, "compare", finished.path, "--prompts", path)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_run_folders_place(fails, tmp_path):
    (tmp_path / "run").write_text("")
    fails(2, "is a file", *CALIBRATE, "-o", tmp_path / "run")
    for verb in ("quantize", "export", "build", "compare", "report", "inspect"):
        fails(3, "not a run folder", verb, tmp_path / "none")


def test_the_stages_before_have_to_be_done(fails, cli, tmp_path):
    run = tmp_path / "run"
    assert cli(*CALIBRATE, "-o", run).code == 0
    for verb, part in {
        "export": "qdiff quantize", "compare": "qdiff quantize", "report": "qdiff quantize",
    }.items():  # fmt: skip
        fails(3, part, verb, run)
    fails(3, "qdiff export", "build", run, "--engine", "openvino")
    fails(3, "qdiff build", "generate", run, "--prompt", "x", "--engine", "openvino", "-o", tmp_path / "x.png")
    fails(3, "quantize", "generate", run, "--prompt", "x", "--engine", "eager", "-o", tmp_path / "x.png")
    assert cli("inspect", run, "--json").json["missing"] == ["quantize", "export", "build", "compare", "report"]


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "foreign":
            path.write_bytes(b"something else")
        case "edited":
            path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


def engine_file(run: Path, engine: str, name: str) -> Path:
    return next(run.glob(f"engines/{engine}-*/{name}"))


def without_copy(run: Path) -> Path:
    """The manifest of a run whose copy is gone, too."""
    (run / "run.copy.json").unlink()
    return run / "run.json"


# What is spoilt, and the commands that then must not go on.
SPOILT = {
    "run.json": (without_copy, [["inspect"], ["quantize"], ["report"]]),
    "plan.json": (
        lambda run: run / "plan.json", [["export", "--force"], ["report"], ["generate", "--prompt", "x", "--engine", "eager"]],
    ),
    "model.safetensors": (
        lambda run: run / "model.safetensors", [["export", "--force"], ["generate", "--prompt", "x", "--engine", "eager"]],
    ),
    "shard": (lambda run: run / "calibration/trajectory-00000.safetensors", [["quantize", "--force"], ["export", "--force"]]),
    "statistics": (lambda run: run / "calibration/statistics.safetensors", [["quantize", "--force"]]),
    "onnx": (lambda run: run / "onnx/onnxruntime/model.onnx", [["build", "--engine", "openvino", "--force"]]),
    "onnx data": (
        lambda run: run / "onnx/onnxruntime/model.onnx.data",
        [["build", "--engine", "openvino", "--force"], ["generate", "--prompt", "x", "--engine", "onnxruntime"]],
    ),
    "engine": (
        lambda run: engine_file(run, "openvino", "model.bin"), [["generate", "--prompt", "x", "--engine", "openvino"]],
    ),
    "engine manifest": (
        lambda run: engine_file(run, "openvino", "manifest.json"), [["generate", "--prompt", "x", "--engine", "openvino"]],
    ),
    "comparison": (lambda run: run / "compare.json", [["report"]]),
}  # fmt: skip


@pytest.mark.parametrize("how", ["missing", "truncated", "foreign", "edited"])
@pytest.mark.parametrize("what", sorted(SPOILT))
def test_spoilt_files_in_a_run_folder(fails, spoilt, monkeypatch, tmp_path, what, how):
    monkeypatch.chdir(tmp_path)
    where, commands = SPOILT[what]
    spoil(where(spoilt), how)
    kept = {path: path.stat().st_mtime_ns for path in spoilt.rglob("*") if path.is_file() and path.name != ".lock"}
    for verb, *rest in commands:
        if "--force" in rest and kept.keys() != {p for p in spoilt.rglob("*") if p.is_file() and p.name != ".lock"}:
            break  # the command before this one has begun anew, as it was told to
        whole = what != "engine"  # an engine is one thing: without one of its files it is a changed engine
        err = fails(3 if how == "missing" and whole else 5, "error: ", verb, spoilt, *rest)
        assert "fix: " in err
    if not any("--force" in command for command in commands):
        assert kept == {p: p.stat().st_mtime_ns for p in spoilt.rglob("*") if p.is_file() and p.name != ".lock"}


def test_no_disk_left(fails, cli, tmp_path, monkeypatch):
    """Exit code 6 at whichever file it happens, and the same command goes on from there when there is room again."""
    real, count = os.replace, 0

    def full(source, target, *rest):
        nonlocal count
        count += 1
        if count > 4:  # the manifest twice, the prompts, the first shard
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target, *rest)

    run = tmp_path / "run"
    command = [*CALIBRATE, "--batch", "1", "-o", run]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        fails(6, ["no space left on the disk", "finished parts are kept"], *command)
    assert (run / "calibration" / "trajectory-00000.safetensors").is_file()
    assert not list(run.rglob("*.tmp"))
    result = cli(*command)
    assert result.code == 0 and "less what an earlier try has done" in result.err


def test_the_quality_gate(fails, finished, spoilt):
    err = fails(7, ["the gate is 200 dB"], "compare", spoilt, "--engine", "openvino", "--engine", "onnxruntime",
                "--pictures", 2, "--min-psnr", 200)  # fmt: skip
    assert str(spoilt / "images") in err and list(spoilt.glob("images/openvino/*.png"))


def test_running_tensorrt_rtx_without_a_gpu(fails, finished, tmp_path):
    from qdiff.engines import choose_engine

    if choose_engine("tensorrt_rtx").missing() is None:
        pytest.skip("there is a GPU here")
    out = tmp_path / "x.png"
    fails(
        4, ["tensorrt_rtx", "fix: "], "generate", finished.path, "--prompt", "x", "--engine", "tensorrt_rtx", "-o", out
    )


def test_an_engine_that_is_not_installed(fails, finished):
    from qdiff.engines import choose_engine

    if choose_engine("tensorrt").missing_for_build() is None:
        pytest.skip("TensorRT is installed here")
    fails(4, "cannot be built here", "build", finished.path, "--engine", "tensorrt")


# Report on a pipe when a module is imported for the first time, then do what ``python -m qdiff`` does.
WATCH_IMPORTS = """
import os, runpy, sys
pipe, module = int(sys.argv.pop(1)), sys.argv.pop(1)
def watch(event, arguments):
    if event == "import" and arguments[0] == module:
        os.write(pipe, b".")
sys.addaudithook(watch)
runpy.run_module("qdiff", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["qdiff.cli.commands", "torch", "diffusers"])
def test_ctrl_c_while_it_starts(tmp_path, module):
    """The signal comes while ``module`` is imported, so the work cannot be done: a command that ends well has missed it."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH_IMPORTS, str(writing), module, *CALIBRATE, "-o", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, pass_fds=[writing],
    )  # fmt: skip
    os.close(writing)
    assert os.read(reading, 1) == b".", f"{module} is not imported: {process.communicate()[1]}"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    os.close(reading)
    # A shell makes 130 of both: where the signal meets the exec() of an import, Python ends by the signal itself.
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err, (process.returncode, err)
    assert not out and not (tmp_path / "run" / "calibration").exists()


def test_the_help_names_every_engine_and_recipe():
    from qdiff.cli.options import ENGINES as ENGINE_NAMES
    from qdiff.cli.options import RECIPES
    from qdiff.engines import ENGINES
    from qdiff.recipes import built_in

    assert set(ENGINE_NAMES) == set(ENGINES)
    assert list(RECIPES) == built_in()
