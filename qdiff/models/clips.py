"""How video families and their pipelines meet: sizes that work, a callback after every step, frames as clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdiff.evaluation.video import Clip
from qdiff.models.base import Model, Request, StepCallback


def capture(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the named inputs from a call to a backbone that is given states of a text and one timestep for all
    samples.
    """
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return {
        "hidden_states": hidden_states.float(),
        "encoder_hidden_states": kwargs["encoder_hidden_states"].float(),
        "timestep": kwargs["timestep"].float().reshape(-1).expand(hidden_states.shape[0]),
    }


def generate(model: Model, request: Request, on_step: StepCallback | None, **further: Any) -> list[Clip]:
    """Return the clips of a request.

    Args:
        model: with the pipeline.
        request: prompts, seeds and settings.
        on_step: called after each denoising step.
        further: arguments of the pipeline besides those that all have.
    """
    arguments = {**model.arguments(request), **further}
    if on_step is not None:

        def after(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, float(timestep), tensors["latents"])
            return tensors

        arguments["callback_on_step_end"] = after
    model.pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        made = model.pipeline(
            negative_prompt=[request.negative_prompt] * len(request.prompts), output_type="np", **arguments
        ).frames  # float32 [N, T, H, W, 3] in 0..1
    return [Clip((frames * 255).round().astype("uint8")) for frames in made]
