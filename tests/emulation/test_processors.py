"""The bundled PixArt's engines on processors that this machine is not: emulated by ``qemu-x86_64`` (Debian: qemu-user).

An emulated process sees another processor by its ``cpuid`` instruction, while ``/proc/cpuinfo`` is still the host's; so what is
looked up instead of tried goes wrong here. One process a processor denoises the same picture by each engine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff.evaluation.metrics import psnr
from qdiff.runs.run import Run
from qdiff.stages.calibrated_model import reload_model

QEMU = shutil.which("qemu-x86_64")
BUILT = ("onnxruntime", "openvino")
STEPS = 2
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


def denoise(run: Path, folder: Path, *engines: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts denoise.py; ``before`` is the emulator's command."""
    folder.mkdir()
    script = Path(__file__).with_name("denoise.py")
    return subprocess.Popen(
        [*before, sys.executable, str(script), str(run), str(folder), *engines],
        env={**os.environ, "QEMU_LD_PREFIX": "/"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def denoised(built, tmp_path_factory) -> dict[str, Path]:
    """Folders of latents: ``native`` by float and both engines, and one for each processor."""
    root = tmp_path_factory.mktemp("denoised")
    started = {
        "native": denoise(built, root / "native", "float", *BUILT),
        **{name: denoise(built, root / name, *BUILT, before=(str(QEMU), "-cpu", name)) for name in PROCESSORS},
    }
    try:
        for name, process in started.items():
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, (name, output[-3000:])
    finally:
        for process in started.values():
            process.kill()
    return {name: root / name for name in started}


@pytest.fixture(scope="module")
def distance(built, denoised) -> Callable[[str, str], float]:
    """PSNR in dB of a processor's picture by an engine against float's, decoded here: ``distance("Haswell", "openvino")``."""
    model = reload_model(Run.existing(built))
    vae = model.pipeline.vae
    latents = {name: load_file(folder / "latents.safetensors") for name, folder in denoised.items()}

    def picture(processor: str, engine: str) -> torch.Tensor:
        with torch.inference_mode():
            decoded = vae.decode(latents[processor][engine] / vae.config.scaling_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    return lambda processor, engine: float(psnr(picture("native", "float"), picture(processor, engine))[0])


@pytest.mark.parametrize("engine", BUILT)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_pictures_are_as_near_to_float_as_here(distance, processor, engine):
    here, there = distance("native", engine), distance(processor, engine)
    assert here > 35 and there > here - 1, (processor, engine, here, there)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_library_was_asked_on_that_processor(denoised, processor):
    facts = json.loads((denoised[processor] / "facts.json").read_text())
    exact = {name: "exact" in said for name, said in facts["integers"].items()}
    assert exact == PROCESSORS[processor]
    assert facts["default"] == ("openvino" if exact["openvino"] else "onnxruntime")
