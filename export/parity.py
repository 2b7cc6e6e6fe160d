"""Parity: the graph in its runtime against the torch module it came from, on the recorded trajectory.

The runtime comes in as a callable, so this module knows no engine. Every step of the trajectory's shard is compared end to
end: what went in, what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.errors import QualityGateError
from qdiff.evaluation.metrics import cosine, decibels, sqnr_db
from qdiff.events import track
from qdiff.models.base import Family
from qdiff.recording.inputs import InputSpec, samples_of
from qdiff.recording.trajectory import Step
from qdiff.routing.follow import predict

COSINE = 0.9999
TOLERANCE_DB = 1.0


@dataclass(frozen=True)
class StepParity:
    """One step: its timestep, the graph's output against the module's, and both against the float model's (SQNR in dB)."""

    timestep: float
    cosine: float
    sqnr_db: float
    module_db: float
    graph_db: float

    @property
    def agrees(self) -> bool:
        """Return whether the graph computes what the module computes, see :func:`compare`."""
        return self.cosine >= COSINE or self.graph_db >= self.module_db - TOLERANCE_DB


def expected_outputs(family: Family, backbone: nn.Module, steps: Iterable[Step]) -> list[Tensor]:
    """Return what the module computes on recorded steps. Apart from :func:`compare`, so that the module can go before
    the runtime comes: of a large model both together are the peak of the whole export.
    """
    with torch.inference_mode():
        return [predict(family, backbone, step.inputs) for step in steps]


def compare(
    expected_outputs: Iterable[Tensor],
    run: Callable[[Mapping[str, Tensor]], Tensor],
    steps: Iterable[Step],
    float_predictions: Iterable[Tensor],
    specs: Sequence[InputSpec],
) -> list[StepParity]:
    """Run the graph on recorded steps and compare it with what the module computed.

    A step agrees when the cosine of both outputs is at least 0.9999. Where quantization itself is coarser than that, two correct
    runtimes differ by more: sums in another order move values across rounding boundaries, and every layer after that
    amplifies it, up to the size of the quantization error. There a step agrees when the graph is as near to the float model
    as the module is (within 1 dB): a graph that computed something else would be farther away.

    Args:
        expected_outputs: the module's, for each of ``steps``.
        run: computes the graph's output for the inputs of a step.
        steps: recorded calls.
        float_predictions: what the float model predicted for each of them.
        specs: of the backbone's inputs: they say which axis is the batch.

    Raises:
        QualityGateError: a step does not agree.
    """
    results = []
    for step, expected, reference in track(
        list(zip(steps, expected_outputs, float_predictions, strict=True)), "parity"
    ):
        # One sample at a time: a large model's activations for a batch would be the peak of the whole export.
        samples = (slice(i, i + 1) for i in range(len(expected)))
        got = torch.cat([run(samples_of(specs, step.inputs, sample)) for sample in samples])
        against_float = [decibels(sqnr_db(reference, output)) for output in (expected, got)]
        result = StepParity(step.timestep, cosine(expected, got), decibels(sqnr_db(expected, got)), *against_float)
        if not result.agrees:
            raise QualityGateError(
                f"the exported graph differs from the torch module at timestep {result.timestep:g}: cosine {result.cosine:.6f}, "
                f"and {result.graph_db:.1f} dB from the float model where the module has {result.module_db:.1f} dB",
                "please report this: it is a bug of the export or of the runtime",
            )
        results.append(result)
    return results
