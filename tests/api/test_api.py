"""The Python API: what the README shows, and that it is what the command line calls."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import qdiff
from qdiff.api.source import SAVED, source_of
from qdiff.errors import InputError, UsageError
from qdiff.events import Event, listening
from qdiff.models import FAMILIES
from qdiff.models.loading import bundled_folder

TINY = {"weights": "random:pixart-tiny", "samples": 3, "batch": 3, "steps": 4}


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, qdiff; qdiff.Recipe, qdiff.quantize, qdiff.export, dir(qdiff);"
        "print([name for name in ('torch', 'onnx', 'diffusers', 'gradio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qdiff.quantise  # noqa: B018


def test_every_name_is_there_and_documented():
    for name in qdiff.__all__:
        assert (getattr(qdiff, name).__doc__ or "").strip(), name
    assert callable(qdiff.export) and qdiff.export.__name__ == "qdiff.export"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    prompts = ["a red apple", "a rocket on a blue background", "cheese"]
    events: list[Event] = []
    made = qdiff.quantize(
        "pixart", prompts=prompts, output=tmp_path_factory.mktemp("api") / "run", progress=events.append, **TINY
    )
    assert {"record", "collect", "quantize"} <= {event.task for event in events}
    return made


def test_a_run_is_quantized_exported_built_and_used(run, cli):
    assert run.results["quantize"]["packed_bytes"] < run.results["quantize"]["float32_bytes"]
    assert run.results["calibrate"]["prompts"] == 3
    qdiff.build(run, "openvino", progress=False)  # exports the graph that it needs
    assert run.done("export:onnxruntime") and not run.done("export:tensorrt")
    qdiff.build(run, "onnxruntime", progress=False)
    assert run.results["build"]["bytes"] > run.results["quantize"]["packed_bytes"], "with the graph that it reads"
    again = qdiff.export(str(run.path), "onnxruntime", progress=False)
    assert [result["target"] for result in again.results["export"]] == ["onnxruntime"]
    (picture,) = qdiff.generate(
        run, "a red apple", output=run.path / "apple.png", engine="openvino", steps=2, progress=False
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    compared = qdiff.compare(run, ["openvino"], pictures=1, accept_quality=True, progress=False).results["compare"]
    assert [row["name"] for row in compared["engines"]] == ["openvino"]
    assert qdiff.write_report(run).is_file()
    shown = cli("inspect", run.path, "--json")
    assert json.loads(shown.out) == qdiff.inspect(run.path)


@pytest.mark.parametrize("engine", ["float", "eager"])
def test_the_pipeline_is_that_of_diffusers_with_the_engine_in_it(run, engine, cli, tmp_path):
    import diffusers
    import numpy as np
    from PIL import Image

    pipe = qdiff.load_pipeline(run, engine)
    assert isinstance(pipe, diffusers.PixArtSigmaPipeline) and type(pipe).__name__ == "PixArtSigmaPipeline"
    seen: list[int] = []
    made = pipe(
        "a red apple",
        negative_prompt="",
        generator=torch.Generator().manual_seed(5),
        callback=lambda step, *_: seen.append(step),
        callback_steps=1,
    ).images[0]
    assert seen == [0, 1, 2, 3], "the steps of the calibration"
    written = tmp_path / "apple.png"
    assert (
        cli("generate", run.path, "--prompt", "a red apple", "--seed", "5", "--engine", engine, "-o", written).code == 0
    )
    assert np.array_equal(np.asarray(made), np.asarray(Image.open(written).convert("RGB")))


def test_a_pipeline_object_is_saved_once_and_taken(tmp_path, caplog):
    pipe = FAMILIES["stable-diffusion"].load("random:sd-tiny").pipeline
    run = qdiff.calibrate(
        pipe, prompts=["one", "two"], output=tmp_path / "run", batch=1, steps=2, guidance=(2, 5), keep=2, progress=False,
    )  # fmt: skip
    inputs = run.entry("calibrate")["inputs"]
    assert inputs["model"] == "stable-diffusion" and inputs["weights"] == str(tmp_path / "run" / SAVED)
    assert (inputs["guidance"], inputs["other_guidance"]) == (2, [5])
    again = qdiff.calibrate(
        pipe, prompts=["one", "two"], output=tmp_path / "run", batch=1, steps=2, guidance=(2, 5), keep=2, progress=False,
    )  # fmt: skip
    assert again.entry("calibrate") == run.entry("calibrate"), "done already"
    weights = tmp_path / "run" / SAVED / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_ino  # a file that is saved anew is another one
    with caplog.at_level("INFO", "qdiff"):
        source_of(type(pipe).from_pretrained(weights.parents[1]), tmp_path / "run")
    assert weights.stat().st_ino == before and "not saved again" in caplog.text
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    with pytest.raises(InputError, match="another pipeline"):
        source_of(pipe, tmp_path / "run")
    assert weights.stat().st_ino == before
    source_of(pipe, tmp_path / "run", force=True)
    assert weights.stat().st_ino != before
    with pytest.raises(UsageError, match="calibrated already"):
        qdiff.quantize(run, samples=3)


def test_what_names_a_model(tmp_path):
    folder = bundled_folder("wan")
    assert source_of(str(folder), tmp_path) == source_of(folder, tmp_path)
    assert source_of(folder, tmp_path).model == "wan"
    assert (source_of("pixart", tmp_path).weights, source_of("pixart", tmp_path, weights="x").weights) == (
        "bundled",
        "x",
    )
    for wrong, words in (
        ("nothing here", "no such folder"),
        (nn.Linear(2, 2), "Linear"),
        ("pixrt", "did you mean pixart"),
    ):
        with pytest.raises(UsageError, match=words):
            source_of(wrong, tmp_path)
    with pytest.raises(UsageError, match="pixrat"):
        qdiff.calibrate("pixrat", weights="bundled", output=tmp_path / "run")
    with pytest.raises(UsageError, match="no argument 'step'"):
        qdiff.calibrate("pixart", output=tmp_path / "run", step=3)
    with pytest.raises(InputError, match="prompt 1"):
        qdiff.calibrate("pixart", output=tmp_path / "run", prompts=["a", " "], progress=False)
    with pytest.raises(UsageError, match="list of texts"):
        qdiff.quantize("pixart", output=tmp_path / "run", prompts="prompts.txt", progress=False)
    with pytest.raises(InputError, match="int9"):
        qdiff.quantize("pixart", recipe="int9", output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_lora_that_is_not_fused_is_refused(tmp_path):
    pipe = FAMILIES["pixart"].load("random:pixart-tiny").pipeline
    pipe.transformer.lora_A = nn.Linear(2, 2)
    with pytest.raises(InputError, match="LoRA"):
        source_of(pipe, tmp_path)


def test_progress_is_a_bar_a_function_or_nothing(capfd):
    from qdiff.api.progress import reporting
    from qdiff.events import track

    heard: list[Event] = []
    with reporting(True):
        list(track(range(3), "counted"))
    assert "counted" in capfd.readouterr().err
    with listening(heard.append), reporting(None):
        list(track(range(3), "heard"))
    with listening(heard.append), reporting(False):
        list(track(range(3), "silent"))
    assert {event.task for event in heard} == {"heard"} and "heard" not in capfd.readouterr().err


def test_errors_advise_python_in_python_and_flags_on_the_command_line(tmp_path, fails):
    for code, call, words, command, flags in (
        (3, lambda: qdiff.export(tmp_path), 'qdiff.calibrate("pixart", output="RUN")', ["export", tmp_path], "-o RUN"),
        (
            2,
            lambda: qdiff.calibrate("pixart", output=tmp_path / "run", samples=0, progress=False),
            "samples=0 is not",
            ["calibrate", "-o", tmp_path / "run", "--samples", "0"],
            "--samples 0 is not",
        ),
    ):
        with pytest.raises((InputError, UsageError)) as caught:
            call()
        assert words in str(caught.value) and "--" not in str(caught.value)
        fails(code, flags, *command)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qdiff.generate("RUN", "cheese", step=3), "no argument 'step'.*did you mean steps"),
        (lambda: qdiff.generate("RUN", "cheese", steps="x"), "steps='x'.*a whole number or None"),
        (lambda: qdiff.generate("RUN", [1]), "prompt=.1..*a text or a list of texts"),
        (lambda: qdiff.quantize("pixart", progress="x"), "progress='x'.*True or False, a function or None"),
        (lambda: qdiff.quantize("pixart", guidance=[2, "x"]), "guidance=.*a number, a list of numbers or None"),
        (lambda: qdiff.quantize("pixart", settings="a.b=1"), "settings='a.b=1'.*a list of texts"),
        (lambda: qdiff.quantize("pixart", smaples=3), "no argument 'smaples'.*did you mean samples"),
        (lambda: qdiff.build("RUN", flags={"a": 1}), "flags=.*a dict of texts"),
        (lambda: qdiff.compare("RUN", pictures=True), "pictures=True.*a whole number"),
        (lambda: qdiff.correct("RUN", goal="flat"), "goal='flat'.*'float' or 'prompt'"),
        (lambda: qdiff.load_pipeline(3), "run=3.*a Run, a path or a text"),
        (lambda: qdiff.generate(), "missing a required argument: 'run'"),
        (lambda: qdiff.load_pipeline("RUN", engine=None, thread=2), "no argument 'thread'.*threads"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_with_what_is_taken(call, words):
    with pytest.raises(UsageError) as caught:
        call()
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_every_function_takes_its_own_defaults():
    from qdiff.api.arguments import _fits, _hints

    functions = [getattr(qdiff, name) for name in qdiff.__all__ if name != "export"] + [qdiff.api.export]
    checked = [function.__wrapped__ for function in functions if hasattr(function, "__wrapped__")]
    assert len(checked) == 13
    for function in checked:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in _hints(function) and parameter.default is not parameter.empty:
                assert _fits(parameter.default, _hints(function)[name]), (function, name)


def test_an_unknown_engine_is_answered_with_the_one_that_is_meant(run, fails):
    with pytest.raises(UsageError, match="did you mean eager"):
        qdiff.load_pipeline(run, engine="torch")
    fails(2, "did you mean pixart", "calibrate", "--model", "pixrat")


def test_the_pipeline_refuses_what_diffusers_would_drop(run):
    pipe = qdiff.load_pipeline(run, "eager")
    for arguments, words in (
        ({"callback_on_step_end": print}, "no argument 'callback_on_step_end'.*callback"),
        ({"steps": 2}, "no argument 'steps'.*num_inference_steps"),
        ({"num_inference_steps": "x"}, "num_inference_steps='x'.*a whole number"),
        ({"guidance_scale": "x"}, "guidance_scale='x'.*a number"),
    ):
        with pytest.raises(UsageError) as caught:
            pipe("cheese", **arguments)
        assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_a_pipeline_with_an_engine_is_not_saved(run, tmp_path):
    with pytest.raises(UsageError, match="a diffusers folder cannot hold"):
        qdiff.load_pipeline(run, "eager").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_step_callbacks_of_diffusers_work_with_an_engine(tmp_path):
    run = qdiff.quantize(
        "stable-diffusion", prompts=["one", "two"], output=tmp_path / "run", weights="random:sd-tiny", samples=2, batch=2,
        steps=2, progress=False,
    )  # fmt: skip
    seen: list[int] = []

    def after(pipe, step, timestep, values):
        seen.append(step)
        return values

    qdiff.load_pipeline(run, "eager")("one", callback_on_step_end=after)
    assert seen == [0, 1]


def test_a_run_says_what_it_holds(run):
    assert re.fullmatch(r"Run\('.*', model pixart, done: calibrate, quantize.*\)", repr(run))
    assert repr(qdiff.Run("nowhere")).endswith("nowhere', done: nothing)")


def test_a_step_of_a_scheduler_of_second_order_has_two_calls(run):
    from qdiff.models.base import Request
    from qdiff.stages.generate import Session

    session = Session(run, "float")
    made = session.pictures(Request(["a cat", "cheese"], [0, 1], steps=3, scheduler="heun"), batch=1)
    assert len(made.step_seconds) == 2 * 3, "five calls each"
    assert session.model.calls_of_a_step(scheduler="heun") == 2 * session.model.calls_of_a_step()


def test_an_empty_prompt_is_warned_about_and_made(run, tmp_path, caplog):
    made = qdiff.generate(
        run, ["", "cheese", " "], output=tmp_path / "x.png", engine="float", steps=1, batch=4, progress=False
    )
    assert len(made) == 3
    assert [record.message for record in caplog.records if "empty" in record.message] == [
        "2 of 3 prompts are empty: nothing says what such a picture shows"
    ]


def test_a_quiet_command_shows_no_bar(run, cli, tmp_path):
    done = cli(
        "-q", "generate", run.path, "--prompt", "a cat", "--engine", "float", "--steps", "1", "-o", tmp_path / "x.png"
    )
    assert done.code == 0 and done.err == ""
