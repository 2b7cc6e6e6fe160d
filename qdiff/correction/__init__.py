"""Trajectory correction: what a quantized backbone gets wrong on average is put right in the sampler's step, without training.

A method looks at pairs of predictions, of the float and of the quantized model for the same input (:mod:`.moments`), or at the
pictures that come of a correction, and returns numbers: a :class:`Correction`, JSON in the run folder. A scheduler of diffusers
wrapped in :class:`CorrectedScheduler` applies it; the pipeline, the engine and the graph do not change. ``qdiff correct`` fits
the methods and keeps what brings pictures nearer to the float model's, which may be none of them (:mod:`qdiff.stages.correct`).
"""

from qdiff.correction import ptqd, q_drift, q_sched
from qdiff.correction.base import CORRECTIONS, Correction, load_correction
from qdiff.correction.scheduler import CorrectedScheduler

__all__ = ["CORRECTIONS", "CorrectedScheduler", "Correction", "load_correction", "ptqd", "q_drift", "q_sched"]
