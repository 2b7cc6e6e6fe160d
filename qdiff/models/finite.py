"""NaN and infinity are found where they arise: in a backbone's prediction, in the sampler's latents, in a decoded picture.

A picture cannot say it any more: uint8 has no NaN, diffusers makes black of it, and two black pictures are equal. So
predictions are looked at as tensors in every step, and pictures as what the decoder gives, before they become pixels.

Whose fault it is decides the error. The float model, or its decoder beside the float model: the model is broken, which is bad
input. An engine of the quantized model: it is worse than any gate allows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, QdiffError, QualityGateError, option

if TYPE_CHECKING:
    from qdiff.models.model import Model

FLOAT = "float"


class SampleOutput(Protocol):
    """An output of diffusers that holds its tensor in ``sample``."""

    sample: Tensor


Answer = Tensor | tuple[Tensor, ...] | SampleOutput


def not_finite(what: str, engine: str, where: str) -> QdiffError:
    """Return the error about NaN or infinity.

    Args:
        what: is not finite.
        engine: whose predictions were sampled with; :data:`FLOAT` is the model itself.
        where: the step, in words.
    """
    if engine == FLOAT:
        return InputError(
            f"the float model itself makes NaN or infinity: {what} {where}",
            f"its weights are damaged, or it needs another scheduler ({option('scheduler')}) or more steps ({option('steps')})",
        )
    return QualityGateError(
        f"engine {engine} makes NaN or infinity: {what} {where}",
        "keep more layers in 16 bit (ignore in the recipe), or quantize with another recipe",
    )


def require_finite_step(
    engine: str, timestep: Tensor | float, latents: Tensor, prediction: Tensor, step: str = ""
) -> None:
    """Refuse a prediction that is not finite, and say whether it was the latents that had been broken before.

    Args:
        engine: name, for the message.
        timestep: of the step.
        latents: that the backbone was given.
        prediction: of the backbone.
        step: which one of how many, in words, where that is known.

    Raises:
        InputError: it is the float model's.
        QualityGateError: it is a quantized engine's.
    """
    if bool(torch.isfinite(prediction).all()):
        return
    value = float(torch.as_tensor(timestep).reshape(-1)[0])
    what = "the prediction" if bool(torch.isfinite(latents).all()) else "the latents"
    raise not_finite(what, engine, f"at timestep {value:g}{step}")


@contextlib.contextmanager
def finite_pictures(model: Model, steps: int, calls_per_step: int) -> Iterator[None]:
    """Look at every prediction of the backbone and at what the decoder gives, for the length of a block."""
    backbone = model.backbone
    engine = getattr(backbone, "engine", FLOAT)
    hooks = [_decoder(model.pipeline.vae).register_forward_hook(_watch_decoder(engine))]
    if not hasattr(backbone, "engine"):  # a stand-in looks for itself
        hooks.append(backbone.register_forward_hook(_watch_backbone(model, steps, calls_per_step), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoder(vae: nn.Module) -> nn.Module:
    """Return what of an autoencoder is called as a module when it decodes."""
    inside = getattr(vae, "decoder", None)
    return inside if isinstance(inside, nn.Module) else vae


def _watch_decoder(engine: str) -> Callable[..., None]:
    def after(module: nn.Module, args: tuple[object, ...], output: Answer) -> None:
        pictures = _tensor(output)
        if not bool(torch.isfinite(pictures).all()):
            raise not_finite("the decoded picture", engine, "after the last step")

    return after


def _watch_backbone(model: Model, steps: int, calls_per_step: int) -> Callable[..., None]:
    calls = 0

    def after(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: Answer) -> None:
        nonlocal calls
        calls += 1
        inputs = model.family.capture(args, kwargs)
        latents = next(iter(inputs.values()))
        step = f" (call {calls} of {steps * calls_per_step})"
        require_finite_step(FLOAT, inputs["timestep"], latents, _tensor(output), step)

    return after


def _tensor(output: Answer) -> Tensor:
    """Return the tensor of an answer of diffusers: itself, the first of a tuple, or ``sample``."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample
