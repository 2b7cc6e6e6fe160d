"""The stages that are killed, smallest model, and what has to be there before each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TINY = ("--weights", "random:pixart-tiny", "--samples", "5", "--steps", "4", "--batch", "3")
RUN = "RUN"  # stands for the run folder in a command


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: of the stage here.
        words: the command line after ``qdiff``; :data:`RUN` stands for the folder.
        after: the stage whose folder it begins with.
        threads: of torch; where a stage forks, one process for each.
    """

    name: str
    words: Sequence[str]
    after: str | None = None
    threads: int = 1

    def arguments(self, run: Path) -> list[str]:
        """Return the command line for a run folder."""
        return [str(run) if word == RUN else word for word in self.words]


# Blocks of the smallest model have 32 columns; 20 steps learn little, but are cut off like 300.
_LEARNED = (
    "scheme.weights=int4_g32",
    "sequential.tokens=256",
    "sequential.reconstruct.method=flexround",
    "sequential.reconstruct.iterations=20",
)
_MEASURED = ("mixed.pictures=2", "sequential.tokens=256")


def _set(settings: Iterable[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


_ENGINES = (
    "--engine",
    "openvino",
    "--engine",
    "onnxruntime",
    "--engine",
    "tensorrt_rtx",
    "--compute-capability",
    "8.9",
)

_STAGES = (
    Stage("calibrate", ("calibrate", *TINY, "-o", RUN)),
    Stage("attention", ("calibrate", *TINY, "--attention", "-o", RUN)),
    Stage("quantize", ("quantize", RUN), "calibrate"),
    Stage("quantize-gptq", ("quantize", RUN, "--recipe", "int8-gptq"), "calibrate"),
    Stage("quantize-w4a8", ("quantize", RUN, "--recipe", "w4a8", *_set(_LEARNED)), "calibrate"),
    Stage(
        "quantize-mixed",
        ("quantize", RUN, "--recipe", "mixed", "--budget", "bits=8", *_set(_MEASURED)),
        "calibrate",
        threads=2,
    ),
    Stage("quantize-nvfp4", ("quantize", RUN, "--recipe", "nvfp4", "--set", "sequential=null"), "calibrate"),
    Stage("quantize-again", ("quantize", RUN, "--force"), "compare"),
    Stage("correct", ("correct", RUN, "--engine", "eager", "--method", "q_drift", "--pictures", "2"), "quantize"),
    Stage("export-onnxruntime", ("export", RUN, "--target", "onnxruntime"), "quantize"),
    Stage("export-tensorrt", ("export", RUN, "--target", "tensorrt"), "export-onnxruntime"),
    Stage("export-nvfp4", ("export", RUN, "--target", "tensorrt"), "quantize-nvfp4"),
    Stage("build-openvino", ("build", RUN, "--engine", "openvino"), "export-tensorrt"),
    Stage("build-onnxruntime", ("build", RUN, "--engine", "onnxruntime"), "build-openvino"),
    Stage(
        "build-tensorrt_rtx",
        ("build", RUN, "--engine", "tensorrt_rtx", "--compute-capability", "8.9"),
        "build-onnxruntime",
    ),
    Stage(
        "compare",
        ("compare", RUN, "--engine", "openvino", "--engine", "onnxruntime", "--pictures", "2"),
        "build-tensorrt_rtx",
    ),
    Stage("report", ("report", RUN), "compare"),
    Stage("other-run", ("run", *TINY, "--seed", "1", *_ENGINES, "--pictures", "2", "-o", RUN)),
)
STAGES = {stage.name: stage for stage in _STAGES}
USUAL = (
    "calibrate",
    "quantize",
    "quantize-gptq",
    "quantize-w4a8",
    "export-onnxruntime",
    "export-tensorrt",
    "build-openvino",
    "build-onnxruntime",
    "build-tensorrt_rtx",
    "compare",
    "quantize-again",
    "report",
)
