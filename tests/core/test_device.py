"""Where models compute: the device that is chosen, and that nothing forgets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdiff import device
from qdiff.errors import MissingDependencyError, UsageError
from tests.conftest import run_cli


@pytest.fixture(autouse=True)
def as_before():
    yield
    device.set_device(None)


@pytest.mark.parametrize(("there", "name"), [(0, "cuda"), (0, "cuda:128"), (1, "cuda:1"), (2, "cuda:256")])
def test_a_gpu_that_is_not_there(monkeypatch, there, name):
    """Torch wraps numbers at 256, and takes ``cuda:256`` for the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(MissingDependencyError, match=r"sees (no GPU|one GPU|2 GPUs)"):
        device.set_device(name)


@pytest.mark.parametrize("name", ["npu", "mps", "cuda:-1", "cpu:x", "cpu:0", ""])
def test_devices_that_qdiff_does_not_compute_on(name):
    with pytest.raises(UsageError, match="computes on cpu and cuda"):
        device.set_device(name)


def test_the_command_line_chooses(tmp_path):
    assert run_cli("calibrate", "--device", "cuda:7", "-o", tmp_path / "run").code == 4
    assert run_cli("calibrate", "--device", "npu", "-o", tmp_path / "run").code == 2
    assert (
        run_cli("calibrate", "--device", "cpu", "--weights", "random:pixart-tiny", "--dry-run", "-o", tmp_path).code
        == 0
    )
    assert device.chosen().type == "cpu"


def test_what_is_timed_beside_engines_of_the_host_is_there(monkeypatch):
    monkeypatch.setattr(device, "found", lambda: "cuda")
    assert device.chosen().type == "cuda"
    with device.on_host():
        assert device.chosen().type == "cpu"
    assert device.chosen().type == "cuda"
    monkeypatch.setattr(device, "_chosen", "cuda:1")  # asked for
    with device.on_host():
        assert device.chosen() == torch.device("cuda:1")


@pytest.mark.slow
def test_nothing_forgets_the_device():
    """In a process of its own: torch counts devices when it first computes gradients, and one more is one too many."""
    cases = Path(__file__).with_name("fake_device_cases.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cases.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
