"""What all rows share, made once in the work folder: the calibration, the held-out calls and pictures, and float's answers.

- ``calibration/``: a run of ``qdiff calibrate``, recorded calls and statistics.
- ``held-out/``: the same of other prompts from other noise; only its recorded calls are used, to score predictions.
- ``float.safetensors``: float's predictions on the held-out calls, and its pictures.
- ``shared.json``: what that took. Statistics are collected a second time with a clock, because rows of qdiff have to pay for them
  and the stage's own seconds also hold the recording, which serves everybody.

No held-out prompt is one of the calibration's, and no seed either.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ptq.material import Material, shared_layers
from bench.ptq.score import answers
from qdiff.calib.collect import Collector
from qdiff.errors import InputError
from qdiff.files import open_tensors, read_json, save_tensors, sha256_json, write_json, write_text
from qdiff.models.model import Model, Request, default_prompts
from qdiff.recording.trajectory import Trajectory
from qdiff.resources import measure_usage
from qdiff.runs.run import Run
from qdiff.stages.calibrate import CalibrateOptions, calibrate
from qdiff.stages.calibrated_model import calibrated_model, recorded_calls, reload_model

CALIBRATION_SEED, PICTURE_SEED, CALL_SEED = 0, 10_000, 20_000


@dataclass(frozen=True)
class Settings:
    """What decides the scores of all rows.

    Args:
        model, weights: as ``qdiff calibrate`` takes them.
        pictures: how many are compared.
        samples: prompts of the calibration.
        held_out: prompts of the held-out calls.
        steps: of the sampler; ``None``: the model's own.
    """

    model: str = "pixart"
    weights: str = "bundled"
    pictures: int = 64
    samples: int = 32
    held_out: int = 8
    steps: int | None = None


@dataclass
class Shared:
    """The work folder of one table. Call :meth:`prepare` before anything else."""

    folder: Path
    settings: Settings

    @property
    def calibration(self) -> Run:
        """Return the calibrated run."""
        return Run(self.folder / "calibration")

    @property
    def held_out(self) -> Trajectory:
        """Return the recorded calls that no row was calibrated on."""
        return recorded_calls(self.folder / "held-out")

    @property
    def facts(self) -> dict[str, Any]:
        """Return the contents of ``shared.json``."""
        return read_json(self.folder / "shared.json", "the shared part of the benchmark")

    def prepare(self) -> None:
        """Make what is not there yet.

        Raises:
            InputError: the folder holds the shared part of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        options = CalibrateOptions(
            model=self.settings.model,
            weights=self.settings.weights,
            samples=self.settings.samples,
            steps=self.settings.steps,
            seed=CALIBRATION_SEED,
        )
        calibrate(self.calibration, options)
        prompts = self.folder / "held-out-prompts.txt"
        write_text(prompts, "\n".join(self.prompts(self.settings.held_out, CALL_SEED)) + "\n")
        calibrate(
            Run(self.folder / "held-out"),
            CalibrateOptions(
                model=options.model, weights=options.weights, steps=options.steps, prompts=prompts, seed=CALL_SEED
            ),
        )
        if (self.folder / "shared.json").exists():
            if self.facts["key"] != self.key:
                raise InputError(f"{self.folder} holds a table of other settings", "choose another --work folder")
            return
        model = self.model()
        predictions, pictures, accuracy = answers(model, self.held_out, self.request(model))
        save_tensors(self.folder / "float.safetensors", {"predictions": predictions, "pictures": pictures})
        started = time.process_time()
        with measure_usage() as usage:
            Collector(model, recorded_calls(self.calibration.path), "timed").collect(self.folder / "timed.safetensors")
        (self.folder / "timed.safetensors").unlink(missing_ok=True)
        facts = {
            "key": self.key,
            "settings": asdict(self.settings),
            "accuracy": accuracy,
            "statistics_seconds": usage.seconds,
            "statistics_cpu_seconds": time.process_time() - started,
            "kept_layers": self.kept(model),
            "note": model.note,
            "threads": torch.get_num_threads(),
            "made": time.strftime("%Y-%m-%d"),
        }
        write_json(self.folder / "shared.json", facts)

    @property
    def key(self) -> str:
        """Return the fingerprint of everything that scores depend on, but for the row."""
        hashes = [Run(self.folder / name).outputs_hash("calibrate") for name in ("calibration", "held-out")]
        return sha256_json([asdict(self.settings), hashes])

    def prompts(self, count: int, seed: int) -> list[str]:
        """Return prompts of that seed, less those of the calibration."""
        known = set(default_prompts(self.settings.samples, CALIBRATION_SEED))
        return [prompt for prompt in default_prompts(count + len(known), seed) if prompt not in known][:count]

    def request(self, model: Model) -> Request:
        """Return the pictures that are compared."""
        prompts = self.prompts(self.settings.pictures, PICTURE_SEED)
        return Request(prompts, [PICTURE_SEED + i for i in range(len(prompts))], steps=self.settings.steps)

    def model(self) -> Model:
        """Return the float model, loaded anew."""
        return reload_model(self.calibration)

    def material(self, scratch: Path) -> Material:
        """Return what a row is given."""
        calibrated = calibrated_model(self.calibration)
        layers = shared_layers(calibrated.model)
        return Material(calibrated.model, calibrated.trajectory, calibrated.statistics, layers, scratch)

    def float_answers(self) -> tuple[Tensor, Tensor]:
        """Return the float model's predictions on the held-out calls, and its pictures."""
        with open_tensors(self.folder / "float.safetensors", "float's answers") as file:
            return file.get_tensor("predictions"), file.get_tensor("pictures")

    @staticmethod
    def kept(model: Model) -> list[str]:
        """Return the linear layers that no row quantizes."""
        from qdiff.models.layers import quantizable_layers

        layers = shared_layers(model)
        return [name for name in quantizable_layers(model.backbone) if name not in layers]
