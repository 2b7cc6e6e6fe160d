"""A diffusers pipeline with an engine of a run in its backbone's place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.api.arguments import checked, require, unknown_argument
from qdiff.errors import UsageError
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TYPES = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "height": int | None,
    "width": int | None,
    "num_frames": int,
    "num_images_per_prompt": int | None,
}  # of arguments that diffusers does not check before it computes with them

_OURS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "frames": "num_frames",
    "seed": "generator",
}  # what other functions of the API call an argument, and what pipelines call it


@checked
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
    pipe.__class__ = _with_defaults(type(pipe), defaults, session.run)
    return pipe


def _with_defaults(own: Any, defaults: dict[str, Any], run: Run) -> Any:
    """Return a subclass of the pipeline class ``own`` whose call takes ``defaults`` for the arguments that it is not given, and
    refuses those that ``own`` would drop silently or fail on.
    """
    known, read = _arguments(own.__call__)

    @functools.wraps(own.__call__)
    def call(self: object, *args: object, **kwargs: object) -> object:
        for name, value in kwargs.items():
            if name not in read:
                raise unknown_argument(own.__name__, name, known, _OURS.get(name))
            if name in _TYPES:
                require(own.__name__, name, value, _TYPES[name])
        return own.__call__(self, *args, **{**defaults, **kwargs})

    def save_pretrained(self: object, *args: object, **kwargs: object) -> None:
        """Refuse to save: a diffusers folder cannot hold an engine."""
        raise UsageError(
            f"this {own.__name__} has an engine in its backbone's place, which a diffusers folder cannot hold",
            f"keep the run folder {run.path}, which is whole, and load it with qdiff.load_pipeline",
        )

    members = {"__call__": call, "save_pretrained": save_pretrained, "__module__": own.__module__}
    return type(own.__name__, (own,), members)


def _arguments(call: Callable[..., object]) -> tuple[list[str], Collection[str]]:
    """Return the arguments of a pipeline's call, and with them those that it looks up among its ``**kwargs`` (names of an earlier
    diffusers). What else is given there, diffusers ignores.
    """
    parameters = inspect.signature(call).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name != "self"]
    if len(known) + 1 == len(parameters):
        return known, known
    constants = inspect.unwrap(call).__code__.co_consts
    return known, {*known, *(name for name in constants if isinstance(name, str))}
