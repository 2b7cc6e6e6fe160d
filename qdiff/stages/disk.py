"""How much disk stages will need, so that a nearly full one is noticed before the computing and not after it.

What is known before a stage begins is a model's layers, its parameters, the size of one recorded call and how much is asked for.
From that follow upper bounds; what a stage really wrote is in the run folder. The old and the new version of a file lie side by
side until the new one is whole, and unfinished parts beside finished ones: both are counted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdiff.calib.record import Recording
    from qdiff.models.model import Model

SMALL_FILES = 2_000_000  # manifests, plans, reports


def trajectory_bytes(model: Model, recording: Recording, call_bytes: int) -> int:
    """Return the bytes of all shards.

    Args:
        model: that is recorded.
        recording: what is to be recorded.
        call_bytes: inputs of one call of a whole batch.
    """
    return model.calls_per_step(recording.guidance) * call_bytes * recording.shards * _kept(model, recording)


def statistics_bytes(model: Model, recording: Recording) -> int:
    """Return the bytes of the statistics and their unfinished part, which lie side by side at the end
    (:mod:`qdiff.calib.observers`).
    """
    from qdiff.calib.observers import RowSample
    from qdiff.models.layers import quantizable_layers
    from qdiff.nn.conv import layer_channels
    from qdiff.recording.activation_statistics import HISTOGRAM_BINS

    steps = model.steps(recording.steps)
    timesteps = min(steps, recording.shards * _kept(model, recording))
    calls = recording.shards * _kept(model, recording)
    readers: dict[tuple[str, int], int] = {}
    columns: dict[tuple[str, int], int] = {}
    for name, layer in quantizable_layers(model.backbone).items():
        key = name.rpartition(".")[0], layer_channels(layer)
        readers[key] = readers.get(key, 0) + 1
        columns[key] = max(columns.get(key, 0), math.prod(layer.weight.shape[1:]))
    total = 0
    for key, count in readers.items():
        tensors = min(count, 2)  # query, key and value read one tensor, or two
        table = timesteps * (
            28 * key[1] + 12 * HISTOGRAM_BINS
        )  # float32 ranges and squares, sums in float64, counts in int64
        rows = 2 * calls * RowSample.count(columns[key]) * (4 * columns[key] + 8)
        total += tensors * (table + rows)
    return total


def checkpoint_bytes(model: Model) -> int:
    """Return the bytes of a quantized checkpoint, in which nothing is larger than 16 bit, with its scales."""
    return round(2.1 * sum(parameter.numel() for parameter in model.backbone.parameters()))


def quantization_bytes(model: Model, trajectory: int) -> int:
    """Return the bytes of the checkpoint and of the float model's predictions.

    Args:
        model: that is quantized.
        trajectory: bytes of the recorded calls, which predictions are not larger than.
    """
    return checkpoint_bytes(model) + trajectory + SMALL_FILES


def export_bytes(checkpoint: int) -> int:
    """Return the bytes of the graph for one target, and of the one that it replaces."""
    return 2 * checkpoint + SMALL_FILES


def engine_bytes(graph: int) -> int:
    """Return the bytes of one engine, and of what its library keeps for it while it builds."""
    return 2 * graph + SMALL_FILES


def picture_bytes(model: Model, pictures: int, engines: int) -> int:
    """Return the bytes of compared pictures or clips, as if nothing were compressed, and of the report's copies.

    Args:
        model: that makes the pictures.
        pictures: of each engine.
        engines: beside float.
    """
    config = model.backbone.config
    side = int(getattr(config, "sample_size", None) or 64) * model.family.pixels_per_cell(config)  # type: ignore[arg-type]
    height, width = (int(model.defaults.get(name) or side) for name in ("height", "width"))
    frames = int(model.defaults.get("num_frames") or (81 if model.family.media == "video" else 1))
    return 3 * height * width * frames * pictures * (engines + 2) + SMALL_FILES


def run_bytes(model: Model, pictures: int, targets: int, engines: int, trajectory: int) -> int:
    """Return the bytes of everything after the calibration."""
    checkpoint = checkpoint_bytes(model)
    graphs = targets * export_bytes(checkpoint) + engines * engine_bytes(checkpoint)
    return quantization_bytes(model, trajectory) + graphs + picture_bytes(model, pictures, max(1, engines))


def _kept(model: Model, recording: Recording) -> int:
    """Return steps that are recorded of each shard."""
    steps = model.steps(recording.steps)
    return steps if recording.strategy == "all" else min(steps, recording.keep)
