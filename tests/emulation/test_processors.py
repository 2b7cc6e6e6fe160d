"""The bundled PixArt's engines on processors that this machine is not: emulated by ``qemu-x86_64`` (Debian: qemu-user).

An emulated process sees another processor by its ``cpuid`` instruction, while ``/proc/cpuinfo`` is still the host's; so what is
looked up instead of tried goes wrong here. One process a processor draws the same picture by each engine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QEMU = shutil.which("qemu-x86_64")
BUILT = ("onnxruntime", "openvino")
STEPS = 3
PROCESSORS = {
    "Haswell": {"onnxruntime": False, "openvino": False},  # AVX2 without VNNI: both libraries add in 16 bits
    "Nehalem": {"onnxruntime": True, "openvino": False},  # no AVX: ONNX Runtime's kernels add in 32 bits
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        QEMU is None or platform.machine() != "x86_64",
        reason="needs qemu-x86_64 (Debian: apt-get install qemu-user) on an x86-64 processor",
    ),
]


@pytest.fixture(scope="module")
def built(cli, tmp_path_factory) -> Path:
    """A run of the bundled PixArt with both engines, calibrated with few steps."""
    run = tmp_path_factory.mktemp("built") / "run"
    calibrated = cli("calibrate", "--model", "pixart", "--samples", 2, "--steps", STEPS, "-o", run)
    assert calibrated.code == 0, calibrated.err
    for command in (
        ("quantize", run),
        ("export", run, "--target", "onnxruntime"),
        *(("build", run, "--engine", name) for name in BUILT),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return run


def draw(run: Path, folder: Path, *engines: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts draw.py; ``before`` is the emulator's command."""
    folder.mkdir()
    script = Path(__file__).with_name("draw.py")
    return subprocess.Popen(
        [*before, sys.executable, str(script), str(run), str(folder), *engines],
        env={**os.environ, "QEMU_LD_PREFIX": "/"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def drawn(built, tmp_path_factory) -> dict[str, Path]:
    """Folders of pictures: ``native`` by float and both engines, and one for each processor."""
    root = tmp_path_factory.mktemp("drawn")
    native = draw(built, root / "native", "float", *BUILT)
    started = {
        name: draw(built, root / name, *BUILT, before=(str(QEMU), "-cpu", name)) for name in PROCESSORS
    }  # at once: each is one thread
    for name, process in {"native": native, **started}.items():
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, (name, output[-3000:])
    return {name: root / name for name in ("native", *PROCESSORS)}


def psnr(first: Path, second: Path) -> float:
    a, b = (np.asarray(Image.open(path).convert("RGB"), np.float64) for path in (first, second))
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize("engine", BUILT)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_pictures_are_as_near_to_float_as_here(drawn, processor, engine):
    reference = drawn["native"] / "float.png"
    here = psnr(reference, drawn["native"] / f"{engine}.png")
    there = psnr(reference, drawn[processor] / f"{engine}.png")
    assert here > 30 and there > here - 1, (processor, engine, here, there)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_library_was_asked_on_that_processor(drawn, processor):
    facts = json.loads((drawn[processor] / "facts.json").read_text())
    exact = {name: "exact" in said for name, said in facts["integers"].items()}
    assert exact == PROCESSORS[processor]
    assert facts["default"] == ("openvino" if exact["openvino"] else "onnxruntime")
