"""Whether the parts of a pipeline fit together: what one gives is what another reads.

A folder that was put together from two models, or a model for another pipeline than its index names, would else fail as a matrix
product somewhere inside, or as a graph that lacks an input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qdiff.errors import InputError
from qdiff.models.config import integer
from qdiff.models.given import flattened, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qdiff.models.model import Model


def captured(model: Model, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the named inputs of a call that the pipeline made, all of them and nothing else.

    Raises:
        InputError: the pipeline gives something that the family has no input for, or lacks one.
    """
    family, config = model.family, model.config
    specs = family.inputs(config)
    names = [spec.name for spec in specs]
    given = flattened(inspect.signature(model.backbone.forward).bind(*args, **kwargs).arguments)
    further = unknown(given, (*(spec.argument or spec.name for spec in specs), *family.unread(config)))
    if further:
        raise InputError(
            f"{type(model.pipeline).__name__} gives {further[0]!r} to its backbone, which is no input that qdiff knows of "
            f"{family.title}",
            f"use a model that needs no {further[0]}",
        )
    inputs = family.capture(args, kwargs)
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(
            f"the backbone of {model.weights} reads {missing[0]!r}, and {type(model.pipeline).__name__} gives none",
            "use the pipeline class that this model was published with",
        )
    return {name: inputs[name] for name in names}


def require_width(model: Model, width: int, encoders: Sequence[PreTrainedModel]) -> None:
    """Refuse text encoders whose states, side by side, are not as wide as the backbone reads them.

    Raises:
        InputError: with both widths, or when there is no text encoder.
    """
    if not encoders:
        raise InputError(f"{model.weights} has no text encoder", "use a folder with the text encoders of its model")
    made = sum(int(getattr(encoder.config, "hidden_size", 0) or encoder.config.d_model) for encoder in encoders)
    if made != width:
        raise InputError(
            f"the text encoders of {model.weights} make states of width {made}, and its backbone reads {width}",
            "the folder was put together from two models; copy it again from its source",
        )


def require_latents(model: Model) -> None:
    """Refuse a backbone that reads more channels than the latents have.

    Raises:
        InputError: with both numbers.
    """
    latents = model.pipeline.vae.config
    reads = integer(model.config, "in_channels")
    gives = integer(latents, "latent_channels" if "latent_channels" in latents else "z_dim")
    if reads != gives:
        raise InputError(
            f"the backbone of {model.weights} reads {reads} channels, and {type(model.pipeline).__name__} gives it the {gives} "
            "of its latents: it is a model for another pipeline (inpainting, depth, pictures as input)",
            "use a text-to-image or text-to-video model",
        )
