"""The bundled PixArt's engines on processors that this machine is not: emulated by ``qemu-x86_64`` (Debian: qemu-user).

An emulated process sees another processor by its ``cpuid`` instruction, while ``/proc/cpuinfo`` is still the host's; so what is
looked up instead of tried goes wrong here. On each processor one process holds the engines (engine_process.py), and the pipeline
of this process denoises the same picture with each of them.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from qdiff.engines import Runner
from qdiff.engines.pipeline import insert
from qdiff.evaluation.images import to_pixels
from qdiff.evaluation.metrics import psnr
from qdiff.runs.run import Run
from qdiff.stages.build import load_runner
from qdiff.stages.calibrated_model import reload_model
from qdiff.stages.generate import make_request

QEMU = shutil.which("qemu-x86_64")
BUILT = ("onnxruntime", "openvino")
STEPS = 2
PROMPT, SEED = "a rocket on a blue background", 7
PROCESSORS = {
    "Haswell": {"onnxruntime": False, "openvino": False},  # AVX2 without VNNI: both libraries add in 16 bits
    "Nehalem": {"onnxruntime": True, "openvino": False},  # no AVX: ONNX Runtime's kernels add in 32 bits
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        QEMU is None or platform.machine() != "x86_64",
        reason="needs qemu-x86_64 (Debian: apt-get install qemu-user) on an x86-64 processor",
    ),
]


@pytest.fixture(scope="module")
def built(cli, tmp_path_factory) -> Path:
    """A run of the bundled PixArt with both engines, calibrated with few steps and one branch of guidance."""
    run = tmp_path_factory.mktemp("built") / "run"
    calibrated = cli("calibrate", "--model", "pixart", "--samples", 2, "--steps", STEPS, "--guidance", 1, "-o", run)
    assert calibrated.code == 0, calibrated.err
    for command in (
        ("quantize", run),
        ("export", run, "--target", "onnxruntime"),
        *(("build", run, "--engine", name) for name in BUILT),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return run


class EmulatedRunner(Runner):
    """One engine of an engine_process.py, as a runner."""

    def __init__(self, process: subprocess.Popen[bytes], engine: str) -> None:
        self.process, self.engine = process, engine

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        data = save({name: value.contiguous() for name, value in inputs.items()})
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.engine} {len(data)}\n".encode() + data)
        self.process.stdin.flush()
        return load(read(self.process, int(read_line(self.process))))["sample"]


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    """Return the next line that an engine_process.py answers."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the emulated process has ended with {process.wait(60)}: its messages stand above"
    return line


def read(process: subprocess.Popen[bytes], size: int) -> bytes:
    """Return the next bytes that it answers."""
    assert process.stdout is not None
    return process.stdout.read(size)


@pytest.fixture(scope="module")
def emulated(built) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A process with both engines for each processor."""
    script = Path(__file__).with_name("engine_process.py")
    started = {
        name: subprocess.Popen(
            [str(QEMU), "-cpu", name, sys.executable, str(script), str(built), *BUILT],
            env={**os.environ, "QEMU_LD_PREFIX": "/"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in PROCESSORS
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def facts(emulated) -> dict[str, Any]:
    """What the engines said of each processor."""
    return {name: json.loads(read_line(process)) for name, process in emulated.items()}


@pytest.fixture(scope="module")
def distance(built, emulated, facts) -> Callable[[str, str], float]:
    """PSNR in dB of a processor's picture by an engine against float's: ``distance("Haswell", "openvino")``."""
    run = Run.existing(built)
    model = reload_model(run)
    request, specs = make_request(run, [PROMPT], seed=SEED), model.family.inputs(model.backbone.config)

    def picture(runner: Runner) -> torch.Tensor:
        with insert(model.pipeline, model.family.backbone_attribute, runner, specs):
            return to_pixels(model.generate(request))

    expected = picture(load_runner(run, "float", model))

    def measured(processor: str, engine: str) -> float:
        here = processor == "native"
        runner = load_runner(run, engine, model, threads=1) if here else EmulatedRunner(emulated[processor], engine)
        return float(psnr(expected, picture(runner))[0])

    return functools.cache(measured)


@pytest.mark.parametrize("engine", BUILT)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_pictures_are_as_near_to_float_as_here(distance, processor, engine):
    here, there = distance("native", engine), distance(processor, engine)
    assert here > 35 and there > here - 1, (processor, engine, here, there)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_library_was_asked_on_that_processor(facts, processor):
    exact = {name: "exact" in said for name, said in facts[processor]["integers"].items()}
    assert exact == PROCESSORS[processor]
    assert facts[processor]["default"] == ("openvino" if exact["openvino"] else "onnxruntime")
