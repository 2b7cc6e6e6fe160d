"""A diffusers pipeline with an engine of a run in its backbone's place."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from qdiff.runs.run import Run


def load_pipeline(
    run: Run | Path | str, engine: str | None = None, *, device: str | None = None, threads: int | None = None
) -> DiffusionPipeline:
    """Return the run's own diffusers pipeline; its ``transformer`` or ``unet`` is the engine.

    Scheduler, text encoders, VAE, callbacks and the arguments of the call are diffusers'. A call that names no steps, guidance
    or size takes those that the run was calibrated with, or that the weights bring (``generation.json``). The run's correction
    of the sampler's steps, if it has one, is in the scheduler.

    Args:
        run: a run folder with a built engine.
        engine: its name; ``None``: the fastest that is there. ``"float"`` is the float model, ``"eager"`` the quantized one in
            torch.
        device: where torch computes (``"cpu"``, ``"cuda"``); ``None``: a GPU if there is one.
        threads: of a CPU engine; ``None``: all cores.

    Raises:
        InputError: no run folder, or the engine was not built.
        IntegrityError: files of the run were changed.
        MissingDependencyError: the engine's library or hardware is not there.
    """
    from qdiff.correction import CorrectedScheduler
    from qdiff.runs.run import Run
    from qdiff.stages.calibrated_model import options_of
    from qdiff.stages.generate import Session

    if device is not None:
        from qdiff.device import set_device

        set_device(device)
    session = Session(run if isinstance(run, Run) else Run.existing(run), engine, threads=threads)
    pipe = session.model.pipeline
    if session.correction is not None:
        pipe.scheduler = CorrectedScheduler(pipe.scheduler, session.correction)
    calibrated = options_of(session.run)
    given = {"num_inference_steps": calibrated.steps, "guidance_scale": calibrated.guidance}
    settings = {**session.model.family.call_settings(session.model), **session.model.defaults}
    defaults = {**settings, **{name: value for name, value in given.items() if value is not None}}
    if defaults:
        _take_defaults(pipe, defaults)
    return pipe


def _take_defaults(pipe: Any, defaults: dict[str, Any]) -> None:
    """Let a call of ``pipe`` take ``defaults`` for the arguments that it is not given."""
    own = type(pipe)

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own.__call__(self, *args, **{**defaults, **kwargs})

    pipe.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
