"""What a model family is: how it loads, what its backbone is given, and how its pipeline is called.

Everything that a family needs is in its one file (``models/<family>.py``); this module holds what all of them share. The
flow is diffusers' own: families load real pipelines and call them; qdiff only watches or replaces the backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from qdiff import device
from qdiff.models.config import Config, config_of
from qdiff.models.model import Model, Request, StepCallback
from qdiff.models.parts import require_latents
from qdiff.recording.inputs import Axis, InputSpec
from qdiff.registry import Registry

if TYPE_CHECKING:
    from PIL.Image import Image

    from qdiff.evaluation.video import Clip

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[batch, heads, tokens, size]`` to what attention makes of them."""
Processor = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""An attention processor of diffusers: the module and its inputs to the module's output."""


class Family(ABC):
    """One model family. Subclasses register in :data:`FAMILIES`; the contract test runs over all of them."""

    name: ClassVar[str]
    title: ClassVar[str]
    backbone_attribute: ClassVar[str] = "transformer"
    media: ClassVar[Literal["image", "video"]] = "image"  # what its pipeline makes
    branches_apart: ClassVar[bool] = False  # whether the pipeline calls the backbone once for each branch of guidance
    pipelines: ClassVar[tuple[str, ...]]  # diffusers pipeline classes whose folders it loads
    configurations: ClassVar[tuple[str, ...]] = ()  # names for --weights random:NAME
    block_list: ClassVar[str | None] = None  # attribute of the backbone that lists its blocks, where one feeds the next
    chain: ClassVar[bool] = True  # whether what a block returns is all that the next one reads
    one_size: ClassVar[bool] = False  # whether a graph is for one number of frames, rows and columns
    size_divisor: ClassVar[int] = 16  # pictures' height and width in pixels must divide by it
    largest_batch: ClassVar[int] = 256  # of an exported graph
    default_steps: ClassVar[int] = 20  # of sampling, where neither the user nor the weights say otherwise
    default_guidance: ClassVar[float]

    def load(self, weights: str = "bundled", *, revision: str | None = None, seed: int = 0) -> Model:
        """Load a pipeline in float32 onto the process's device (:mod:`qdiff.device`): ``bundled``, ``random:NAME``, a
        folder, or a Hub id (pinned to a commit).

        Raises:
            InputError: nothing there, another family's folder, damaged or NaN weights, parts that do not fit together or that
                this pipeline does not feed, no network.
            IntegrityError: the folder brings its own code.
            UsageError: a revision of weights that have none.
        """
        from qdiff.models import loading

        model = loading.load(self, weights, revision=revision, seed=seed)
        resolved = {name: value for name, value in self.resolved(model.backbone).items() if name in model.config}
        model.backbone.register_to_config(**resolved)  # type: ignore[operator]
        self.check(model)
        device.place(model.pipeline)
        return model

    def resolved(self, backbone: nn.Module) -> dict[str, object]:
        """Return entries of the config that the file leaves open (null) and the module has decided, with what it
        decided. Everything after loading reads the config.
        """
        return {}

    def check(self, model: Model) -> None:
        """Look at whether the parts of a pipeline fit together and whether it feeds its backbone everything that the
        backbone reads; most faults would else show as an error of a matrix product.

        Raises:
            InputError: with what the folder lacks for this pipeline.
        """
        require_latents(model)

    def unread(self, config: Config) -> tuple[str, ...]:
        """Return the arguments that a pipeline gives and a backbone of that config does not read."""
        return ()

    def splits(self, backbone: nn.Module) -> dict[str, int]:
        """Return layers that read hidden states joined with a skip connection, and at which channel the second part
        begins.
        """
        return {}

    def first_token_layers(self, backbone: nn.Module) -> list[str]:
        """Return layers that read text states whose first token is the same for every prompt and dwarfs the others
        (CLIP's).
        """
        return []

    def masked_layers(self, backbone: nn.Module) -> list[str]:
        """Return layers that read text states token per token, of which :meth:`text_mask` says which are ever looked
        at.
        """
        return []

    def text_mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return which text tokens of a call attention looks at, bool ``[batch, tokens]``; the others are padding.
        ``None``: all.
        """
        return None

    def read_by(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by layer, which tokens of the call count, bool ``[batch, tokens]``, for layers that are given padding
        as well.
        """
        mask = self.text_mask(inputs)
        return {} if mask is None or not mask.any() else dict.fromkeys(self.masked_layers(backbone), mask)

    def blocks(self, backbone: nn.Module) -> list[str]:
        """Return names of the blocks that the hidden states pass one after the other
        (:mod:`qdiff.quantization.block_walk`); empty where no block of the backbone is known.
        """
        if self.block_list is None:
            return []
        return [f"{self.block_list}.{name}" for name, _ in backbone.get_submodule(self.block_list).named_children()]

    def self_attentions(self, backbone: nn.Module) -> list[str]:
        """Return the attention modules in which the tokens of the picture read each other, in order; empty where the
        family knows none.
        """
        return []

    @property
    def can_be_sparse(self) -> bool:
        """Return whether its self-attentions can follow block lists."""
        return type(self).self_attentions is not Family.self_attentions

    def attention_processor(self, attend: Attend) -> Processor:
        """Return a diffusers attention processor for those modules that leaves to ``attend`` what happens between the
        projections.
        """
        raise NotImplementedError(self.name)

    def grid(self, config: Config, latent: Sequence[int]) -> tuple[int, int, int]:
        """Return frames, rows and columns of tokens that the backbone makes of a latent of that shape."""
        raise NotImplementedError(self.name)

    def text_tokens(self, config: Config) -> int:
        """Return how many tokens of text lie before those of the picture in its self-attentions."""
        return 0

    @abstractmethod
    def random_pipeline(self, configuration: str, seed: int) -> object:
        """Return a pipeline of diffusers with random weights whose backbone has the full size of a published model."""

    @abstractmethod
    def inputs(self, config: Config) -> tuple[InputSpec, ...]:
        """Return what the backbone of that diffusers config is given, in the order of the exported graph's inputs."""

    @abstractmethod
    def output_axes(self, config: Config) -> tuple[Axis, ...]:
        """Return axes of the backbone's output."""

    def cells_divisor(self, config: Config) -> int:
        """Return what a latent's height and width must divide by: cells of a patch, or the halvings of a U-Net."""
        return 2

    def longest_axis(self, config: Config) -> int | None:
        """Return how many patches an axis of a latent can have at most, where position tables end; ``None``: as many as
        one likes.
        """
        return None

    def random_defaults(self, configuration: str) -> dict[str, object]:
        """Return settings for sampling that belong to a full-size configuration, as ``generation.json`` has them."""
        return {}

    def pixels_per_cell(self, config: Config) -> int:
        """Return pixels along one side of a latent cell: the VAE's factor."""
        return 8

    @abstractmethod
    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        """Return the named inputs from a call that the pipeline made to the backbone."""

    @abstractmethod
    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call a backbone (float or quantized) with named inputs; return its prediction."""

    def call_settings(self, model: Model) -> dict[str, object]:
        """Return arguments that a call of the pipeline needs besides those of a request, so that every size and prompt works."""
        return {}

    @abstractmethod
    def generate(self, model: Model, request: Request, on_step: StepCallback | None = None) -> Sequence[Image | Clip]:
        """Call the pipeline."""

    def fix_size(self, backbone: nn.Module, latent: Sequence[int]) -> None:
        """Make for this size, before a backbone is traced, what it would otherwise make anew in every call. Most make
        nothing.

        Args:
            backbone: which is changed in place.
            latent: shape of the first input.
        """

    def for_export(self, backbone: nn.Module) -> nn.Module:
        """Return the backbone in a form that exports with dynamic axes, equal in its numbers. May share modules with
        it.
        """
        return NamedInputs(self, backbone)


class NamedInputs(nn.Module):
    """A backbone that takes exactly the inputs of its family's :class:`InputSpec` list, in order or by name."""

    def __init__(self, family: Family, backbone: nn.Module) -> None:
        super().__init__()
        self.family, self.backbone = family, backbone
        specs = family.inputs(config_of(backbone))
        self.names = tuple(spec.name for spec in specs)
        self.exact = frozenset(spec.name for spec in specs if spec.exact)

    def forward(self, *values: Tensor, **named: Tensor) -> Tensor:
        """Return the prediction."""
        from qdiff.routing.follow import predict

        return predict(self.family, self.backbone, {**dict(zip(self.names, values, strict=False)), **named})


FAMILIES: Registry[Family] = Registry("model")
