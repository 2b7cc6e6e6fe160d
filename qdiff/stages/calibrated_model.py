"""What every stage after calibration begins with: the float model, and what was recorded of it.

:func:`calibrated_model` reads a run folder once; what decides and quantizes is handed its value, and asks the folder for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qdiff.errors import InputError, option
from qdiff.runs.run import Run
from qdiff.stages.calibrate import CalibrateOptions, load_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qdiff.attention.statistics import AttentionStatistics
    from qdiff.models.model import Model
    from qdiff.recording.activation_statistics import Statistics
    from qdiff.recording.trajectory import Trajectory

ATTENTION_STATISTICS = "attention/statistics.safetensors"


@dataclass(frozen=True)
class CalibratedModel:
    """A float model, and what its calibration recorded, which is read when it is first asked for.

    Args:
        model: float.
        options: that it was calibrated with.
        fingerprint: sha256 over the files of the calibration.
        path: of the run folder.
    """

    model: Model
    options: CalibrateOptions
    fingerprint: str
    path: Path

    @cached_property
    def statistics(self) -> Statistics:
        """Return what every group of layers reads."""
        from qdiff.recording.activation_statistics import Statistics

        return Statistics.load(self.path / "calibration" / "statistics.safetensors")

    @cached_property
    def attention_statistics(self) -> AttentionStatistics:
        """Return what self-attentions look at; a calibration with ``--attention`` has them."""
        from qdiff.attention.statistics import AttentionStatistics

        return AttentionStatistics.load(self.path / ATTENTION_STATISTICS)

    @cached_property
    def trajectory(self) -> Trajectory:
        """Return the recorded calls, on the model's device."""
        return recorded_calls(self.path, self.model.device)

    @property
    def trajectory_bytes(self) -> int:
        """Return the bytes of the recorded calls on disk."""
        return sum(path.stat().st_size for path in self.trajectory.paths)

    @property
    def guided(self) -> bool:
        """Return whether every prompt is twice in the recorded batches."""
        return self.model.guided(self.options.guidance)

    def prompts(self, count: int) -> list[str]:
        """Return ``count`` of the calibration's prompts, from the first on, repeated where it has fewer."""
        lines = (self.path / "calibration" / "prompts.txt").read_text(encoding="utf-8").splitlines()
        return [lines[index % len(lines)] for index in range(count)]


def calibrated_model(run: Run) -> CalibratedModel:
    """Return the float model of a run with what was recorded of it.

    Raises:
        InputError: the run is not calibrated, or the weights changed since.
    """
    return CalibratedModel(reload_model(run), options_of(run), run.outputs_hash("calibrate"), run.path)


def recorded_calls(path: Path, device: torch.device | None = None) -> Trajectory:
    """Return the recorded calls of the run in ``path``. ``device``: that tensors are moved to; ``None``: host memory."""
    from qdiff.recording.trajectory import Trajectory

    return Trajectory(path / "calibration", device)


def options_of(run: Run) -> CalibrateOptions:
    """Return the options that a finished calibration was made with: later stages load the same model."""
    inputs = run.entry("calibrate")["inputs"]
    return CalibrateOptions(
        model=inputs["model"],
        weights=inputs["weights"],
        revision=inputs.get("revision"),
        steps=inputs["steps"],
        guidance=inputs["guidance"],
        scheduler=inputs["scheduler"],
        height=inputs.get("height"),
        width=inputs.get("width"),
        frames=inputs.get("frames"),
        batch=inputs["batch"],
        seed=inputs["seed"],
        other_guidance=tuple(inputs.get("other_guidance", ())),
    )


def guidance_range(run: Run, model: Model) -> tuple[float, float]:
    """Return the least and the largest guidance scale that a run was calibrated with."""
    options = options_of(run)
    scales = (model.guidance(options.guidance), *options.other_guidance)
    return min(scales), max(scales)


def reload_model(run: Run) -> Model:
    """Return the float model of a run, checked to be the one that was calibrated.

    Raises:
        InputError: its weights changed since.
    """
    options = options_of(run)
    if options.revision is not None:  # a folder of that name in the current one is something else
        options = replace(options, weights=f"hub:{options.weights}")
    model = load_model(options)
    recorded = run.entry("calibrate")["inputs"]["fingerprint"]
    if model.fingerprint != recorded:
        raise InputError(
            f"the weights {model.weights} are not those that {run.path} was calibrated with (their sha256 changed)",
            f"calibrate again with {option('force', True)}, or put the old weights back",
        )
    return model
