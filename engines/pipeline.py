"""An engine inside a diffusers pipeline: :class:`EngineBackbone` stands where ``pipe.transformer`` or ``pipe.unet`` stood.

The pipeline stays diffusers' own: scheduler, guidance, callbacks, text encoders and VAE do not notice. So the stand-in is
a module that answers what pipelines ask a backbone (``config``, ``dtype``, ``device``, ``cache_context``) and whose
``forward`` has the original's signature. From that call the tensors that the graph has as inputs are taken by name.

What the graph has no input for must not be dropped silently: a ControlNet residual that nobody adds is a wrong picture
without an error. So any argument with a value that the engine cannot honour is refused.

The weights of the original are not held: :func:`insert` keeps them for the way back, :func:`replace` lets them go.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import torch

from qdiff import device
from qdiff.engines.base import Runner
from qdiff.errors import InputError, option
from qdiff.models.finite import require_finite_step
from qdiff.models.given import flattened, tensor_of, unknown
from qdiff.recording.inputs import InputSpec, latent_of

if TYPE_CHECKING:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

UNNAMED = "(unnamed)"


class Backbone(Protocol):
    """What is read of the module whose place an engine takes."""

    forward: Callable[..., object]

    @property
    def config(self) -> Mapping[str, object]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class EngineBackbone(torch.nn.Module):
    """A runner with the face of a diffusers backbone.

    Args:
        original: the module whose place it takes; only its config, element type, device and signature are kept.
        runner: the loaded engine.
        inputs: the graph's inputs, each with the argument of the original's ``forward`` that it is (or the entry in one of its
            dict arguments, e.g. ``text_embeds`` in ``added_cond_kwargs``).
        engine: its name, for messages; ``float`` is the model itself.
        unread: what the pipeline gives and the original does not read either.

    ``seconds`` holds the wall time of every call so far, in order.
    """

    def __init__(
        self,
        original: Backbone,
        runner: Runner,
        inputs: Sequence[InputSpec],
        engine: str = UNNAMED,
        unread: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.engine, self.unread = engine, tuple(unread)
        self.config = original.config
        self.runner = runner
        self.inputs = {spec.argument or spec.name: spec for spec in inputs}
        self.latent = latent_of(tuple(inputs)).name
        self.seconds: list[float] = []
        if hasattr(original, "add_embedding"):  # of which SDXL's pipelines ask the width, to check their own embeddings
            width = original.add_embedding.linear_1.in_features
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._signature: inspect.Signature
        if isinstance(original, EngineBackbone):
            self._signature = original._signature
        else:
            self._signature = inspect.signature(original.forward)
        # Follows pipe.to(...) like weights would, so that dtype and device stay true.
        anchor = torch.empty(0, dtype=original.dtype, device=original.device)
        self.register_buffer("_anchor", anchor, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Return the element type that the pipeline prepares its tensors in."""
        return self._anchor.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Return where the pipeline keeps its latents."""
        return self._anchor.device  # type: ignore[return-value]

    @contextlib.contextmanager
    def cache_context(self, *_: object, **__: object) -> Iterator[None]:
        """Do nothing for the length of a block: diffusers' feature caches live inside torch blocks, and an engine has
        none.
        """
        yield

    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """Return what the original's call returns: ``(sample,)`` or an output object with ``sample``, in the latent's
        element type.

        Raises:
            InputError: an input of the graph that the pipeline did not give, a value that the graph has no input for, or NaN
                and infinity of the float model.
            QualityGateError: NaN or infinity of an engine.
        """
        arguments = self._signature.bind(*args, **kwargs).arguments
        inputs = self._inputs(arguments)
        latent = inputs[self.latent]
        start = time.perf_counter()
        sample = self.runner(inputs)
        device.finish(sample.device)
        self.seconds.append(time.perf_counter() - start)
        require_finite_step(self.engine, inputs.get("timestep", float("nan")), latent, sample)
        sample = sample.to(latent.device, latent.dtype)
        if arguments.get("return_dict", True) is False:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _inputs(self, arguments: Mapping[str, object]) -> dict[str, torch.Tensor]:
        given = flattened(arguments)
        for name in unknown(given, (*self.inputs, *self.unread)):
            message = f"the pipeline gives {name!r} to its backbone, and this engine's graph has no such input"
            raise InputError(message, f"leave {name!r} out, or run with {option('engine', 'float')}")
        (latent,) = (name for name, spec in self.inputs.items() if spec.name == self.latent)
        if given.get(latent) is None:
            raise _lacking(latent)
        sample = tensor_of(given, latent)
        return {spec.name: self._tensor(name, spec, given, sample) for name, spec in self.inputs.items()}

    def _tensor(self, name: str, spec: InputSpec, given: Mapping[str, object], latent: torch.Tensor) -> torch.Tensor:
        value = given.get(name)
        if value is None and name == "encoder_attention_mask" and given.get("encoder_hidden_states") is not None:
            states = tensor_of(given, "encoder_hidden_states")
            return torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        if value is None:
            raise _lacking(name)
        tensor = torch.as_tensor(value, device=latent.device)
        one_for_all = tensor.ndim == 0 and spec.axes == ("batch",)  # a scalar timestep: [] -> [B]
        return tensor.expand(len(latent)) if one_for_all else tensor


def _lacking(name: str) -> InputError:
    return InputError(f"the graph wants {name!r}, and the pipeline gave none", "use the model's own pipeline class")


def replace(
    pipe: object,
    attribute: str,
    runner: Runner,
    inputs: Sequence[InputSpec],
    engine: str = UNNAMED,
    unread: Sequence[str] = (),
) -> EngineBackbone:
    """Put an engine into ``pipe.<attribute>`` for good; the original's memory is free when no one else holds it.

    Args:
        pipe: a diffusers pipeline.
        attribute: ``"transformer"`` or ``"unet"``.
        runner: the loaded engine.
        inputs: see :class:`EngineBackbone`.
        engine: see :class:`EngineBackbone`.
        unread: see :class:`EngineBackbone`.
    """
    backbone = EngineBackbone(getattr(pipe, attribute), runner, inputs, engine, unread)
    setattr(pipe, attribute, backbone)
    return backbone


@contextlib.contextmanager
def insert(
    pipe: object,
    attribute: str,
    runner: Runner,
    inputs: Sequence[InputSpec],
    engine: str = UNNAMED,
    unread: Sequence[str] = (),
) -> Iterator[EngineBackbone]:
    """Call :func:`replace` for the length of a block; put the original back afterwards, also after an error."""
    original = getattr(pipe, attribute)
    try:
        yield replace(pipe, attribute, runner, inputs, engine, unread)
    finally:
        setattr(pipe, attribute, original)
