"""What a model family is: how it loads, what its backbone is given, and how its pipeline is called.

Everything that a family needs is in its one file (``models/<family>.py``); this module holds what all of them share. The
flow is diffusers' own: families load real pipelines and call them; qdiff only watches or replaces the backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qdiff import device
from qdiff.correction import CorrectedScheduler, Correction
from qdiff.errors import InputError, UsageError
from qdiff.models.finite import finite_pictures
from qdiff.models.parts import require_latents
from qdiff.models.schedulers import check_steps, count_calls, named
from qdiff.nn.conv import is_plain
from qdiff.recording.inputs import Axis, InputSpec
from qdiff.registry import Registry

if TYPE_CHECKING:
    from PIL.Image import Image

    from qdiff.evaluation.video import Clip


@dataclass(frozen=True)
class Request:
    """Pictures to make: one for each prompt, with its own seed, so that a picture does not depend on its batch.

    ``None`` means the model's default (:meth:`Model.steps`, :meth:`Model.guidance`, ``Model.defaults``).
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    frames: int | None = None


MOST_FRAMES = 1_000
LARGEST_SIDE = 16_384  # pixels
StepCallback = Callable[[int, float, Tensor], None]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[batch, heads, tokens, size]`` to what attention makes of them."""


@dataclass
class Model:
    """A loaded pipeline and where it came from.

    ``weights`` is what the user named; ``fingerprint`` identifies the bytes that were loaded (sha256, or the configuration
    and seed of random weights); ``note`` is the sentence that output shows about them; ``defaults`` are the weights' own
    settings for sampling (``generation.json``), which go before the family's. ``correction`` is applied in every step of the
    sampler, for the quantized backbone that it was fitted to. ``revision`` is the commit of weights from the Hub; ``variants``
    are the sets of weights that were read where there is no plain one, by component.
    """

    family: Family
    pipeline: Any
    weights: str
    fingerprint: str
    note: str
    defaults: dict[str, Any] = field(default_factory=dict)
    correction: Correction | None = None
    revision: str | None = None
    variants: dict[str, str] = field(default_factory=dict)

    @property
    def backbone(self) -> nn.Module:
        """Return the network that is called once a step."""
        return getattr(self.pipeline, self.family.backbone_attribute)

    @backbone.setter
    def backbone(self, module: nn.Module) -> None:
        setattr(self.pipeline, self.family.backbone_attribute, module)

    @property
    def device(self) -> torch.device:
        """Return where the backbone computes."""
        return device.of(self.backbone)

    @property
    def pixels_per_cell(self) -> int:
        """Return pixels along one side of a latent cell: the factor of the autoencoder that is there."""
        pipeline = self.pipeline
        factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
        return int(factor or self.family.pixels_per_cell(self.backbone.config))  # type: ignore[arg-type]

    def steps(self, asked: int | None = None) -> int:
        """Return the number of denoising steps: what was asked for, else what these weights or their family sample
        with.
        """
        return int(self.defaults.get("num_inference_steps", self.family.default_steps)) if asked is None else asked

    def guidance(self, asked: float | None = None) -> float:
        """Return the guidance scale, chosen as :meth:`steps` is."""
        return float(self.defaults.get("guidance_scale", self.family.default_guidance)) if asked is None else asked

    def guided(self, asked: float | None = None) -> bool:
        """Return whether a step has two branches of guidance; a backbone that reads the scale as an input has one."""
        return self.guidance(asked) > 1 and not self.backbone.config.get("time_cond_proj_dim")  # type: ignore[union-attr, operator]

    def calls_per_step(self, guidance: float | None = None) -> int:
        """Return how often the pipeline gives a step to the backbone: twice where branches of guidance are apart."""
        return 2 if self.family.branches_apart and self.guided(guidance) else 1

    def calls_of_a_picture(
        self, steps: int | None = None, guidance: float | None = None, scheduler: str | None = None
    ) -> int:
        """Return how often the backbone is called for a picture of so many steps. Arguments as in :class:`Request`."""
        before = self.pipeline.scheduler
        try:
            self.use_scheduler(scheduler)
            return count_calls(self.pipeline.scheduler, self.steps(steps)) * self.calls_per_step(guidance)
        finally:
            self.pipeline.scheduler = before

    def use_scheduler(self, name: str | None) -> None:
        """Replace the pipeline's scheduler by a compatible one (``dpmsolver++`` … or a diffusers class name).

        Raises:
            UsageError: unknown, or it cannot sample this model; names those that can.
        """
        if name is not None:
            self.pipeline.scheduler = named(name, self.pipeline.scheduler, self.pipeline, self.weights)

    def use_size(self, height: int | None, width: int | None, frames: int | None) -> None:
        """Make pictures or clips of that size where a request names none; ``None`` leaves the weights' own.

        Raises:
            UsageError: a size that the model does not make.
        """
        check_size(self, height, width, frames)
        given = {"height": height, "width": width, "num_frames": frames}
        self.defaults = {**self.defaults, **{name: value for name, value in given.items() if value is not None}}

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return the arguments of a request that every pipeline takes, over these weights' own settings."""
        given = {
            "num_inference_steps": self.steps(request.steps),
            "guidance_scale": self.guidance(request.guidance),
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
            "prompt": list(request.prompts),
            "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        }
        return {**self.defaults, **{name: value for name, value in given.items() if value is not None}}

    def generate(self, request: Request, on_step: StepCallback | None = None) -> Sequence[Image | Clip]:
        """Make the pictures or clips of ``request``. ``on_step(step, timestep, latents)`` is called after every step;
        an exception that it raises stops the pipeline.

        Raises:
            UsageError: a size, a number of frames or a scheduler that is not the model's, or steps that the scheduler does not
                take.
            InputError: the float model makes NaN or infinity.
            QualityGateError: a quantized engine does.
        """
        check_size(self, request.height, request.width, request.frames)
        before = self.pipeline.scheduler
        try:
            self.use_scheduler(request.scheduler)
            steps = self.steps(request.steps)
            check_steps(self.pipeline.scheduler, steps)
            if self.correction is not None:
                self.pipeline.scheduler = CorrectedScheduler(self.pipeline.scheduler, self.correction)
            with finite_pictures(self, steps, self.calls_per_step(request.guidance)):
                return self.family.generate(self, request, on_step)
        finally:
            self.pipeline.scheduler = before


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
        config: Any = model.backbone.config
        resolved = {name: value for name, value in self.resolved(model.backbone).items() if name in config}
        model.backbone.register_to_config(**resolved)  # type: ignore[operator]
        self.check(model)
        device.place(model.pipeline)
        return model

    def resolved(self, backbone: nn.Module) -> dict[str, Any]:
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

    def unread(self, config: Mapping[str, Any]) -> tuple[str, ...]:
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

    def attention_processor(self, attend: Attend) -> Any:
        """Return a diffusers attention processor for those modules that leaves to ``attend`` what happens between the
        projections.
        """
        raise NotImplementedError(self.name)

    def grid(self, config: Mapping[str, Any], latent: Sequence[int]) -> tuple[int, int, int]:
        """Return frames, rows and columns of tokens that the backbone makes of a latent of that shape."""
        raise NotImplementedError(self.name)

    def text_tokens(self, config: Mapping[str, Any]) -> int:
        """Return how many tokens of text lie before those of the picture in its self-attentions."""
        return 0

    @abstractmethod
    def random_pipeline(self, configuration: str, seed: int) -> Any:
        """Return a pipeline with random weights whose backbone has the full size of a published model."""

    @abstractmethod
    def inputs(self, config: Mapping[str, Any]) -> tuple[InputSpec, ...]:
        """Return what the backbone of that diffusers config is given, in the order of the exported graph's inputs."""

    @abstractmethod
    def output_axes(self, config: Mapping[str, Any]) -> tuple[Axis, ...]:
        """Return axes of the backbone's output."""

    def cells_divisor(self, config: Mapping[str, Any]) -> int:
        """Return what a latent's height and width must divide by: cells of a patch, or the halvings of a U-Net."""
        return 2

    def longest_axis(self, config: Mapping[str, Any]) -> int | None:
        """Return how many patches an axis of a latent can have at most, where position tables end; ``None``: as many as
        one likes.
        """
        return None

    def random_defaults(self, configuration: str) -> dict[str, Any]:
        """Return settings for sampling that belong to a full-size configuration, as ``generation.json`` has them."""
        return {}

    def pixels_per_cell(self, config: Mapping[str, Any]) -> int:
        """Return pixels along one side of a latent cell: the VAE's factor."""
        return 8

    @abstractmethod
    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the named inputs from a call that the pipeline made to the backbone."""

    @abstractmethod
    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call a backbone (float or quantized) with named inputs; return its prediction."""

    def call_settings(self, model: Model) -> dict[str, Any]:
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
        specs = family.inputs(backbone.config)  # type: ignore[arg-type]
        self.names = tuple(spec.name for spec in specs)
        self.exact = frozenset(spec.name for spec in specs if spec.exact)

    def forward(self, *values: Tensor, **named: Tensor) -> Tensor:
        """Return the prediction."""
        from qdiff.routing.follow import predict

        return predict(self.family, self.backbone, {**dict(zip(self.names, values, strict=False)), **named})


FAMILIES: Registry[Family] = Registry("model")


def quantizable_layers(backbone: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that can be quantized, by name, in module order: linear layers, and convolutions that are plain
    (:func:`qdiff.nn.conv.is_plain`). What subclasses ``nn.Linear`` has a forward of its own. Left out are those of
    :data:`ASKED_FOR_DTYPE`.
    """
    left_out = tuple(
        f"{name}.{child}."
        for name, module in backbone.named_modules()
        for child in ASKED_FOR_DTYPE.get(type(module).__name__, ())
    )
    return {
        name: module
        for name, module in backbone.named_modules()
        if (type(module) is nn.Linear or is_plain(module)) and not name.startswith(left_out)
    }


ASKED_FOR_DTYPE = {"WanTimeTextImageEmbedding": ("time_embedder",)}
"""Modules of which diffusers asks the dtype of their first parameter, by the class around them: they have to keep parameters."""


def default_prompts(count: int, seed: int, media: str = "image") -> list[str]:
    """Return prompts for calibration and reports when the user gives none: of the kind the bundled models know."""
    from qdiff.evaluation import motion, prompt_accuracy

    return (motion if media == "video" else prompt_accuracy).default_prompts(count, seed)


def check_size(model: Model, height: int | None, width: int | None, frames: int | None) -> None:
    """Refuse sizes that the backbone cannot cut into patches or the VAE into frames.

    Raises:
        UsageError: with the nearest sizes that work; or frames are asked of a picture.
    """
    family = model.family
    for label, value in (("height", height), ("width", width)):
        if value is not None and abs(value) > LARGEST_SIDE:
            raise UsageError(f"{label} {str(value)[:20]} is not between 1 and {LARGEST_SIDE}", "choose a smaller one")
        if value is not None and (value <= 0 or value % family.size_divisor):
            nearest_size = max(1, round(value / family.size_divisor)) * family.size_divisor
            raise UsageError(f"{label} {value} does not divide by {family.size_divisor}", f"use {nearest_size}")
    if frames is None:
        return
    check_frames(family, frames)
    factor = model.pipeline.vae_scale_factor_temporal
    if (frames - 1) % factor:
        usable = max(1, round((frames - 1) / factor)) * factor + 1
        raise UsageError(f"{frames} frames are not 1 and a multiple of {factor}", f"use {usable}")


def check_frames(family: Family, frames: int | None) -> None:
    """Check a number of frames as far as is known before a model is loaded.

    Raises:
        UsageError: frames of a picture, or a number that no clip has.
    """
    if frames is None:
        return
    if family.media != "video":
        raise UsageError(f"--frames {frames}: {family.title} makes pictures", "leave --frames out")
    if not 2 <= frames <= MOST_FRAMES:
        raise UsageError(f"--frames {frames} is not between 2 and {MOST_FRAMES}", "81 are usual")


def require_steps(timesteps: Sequence[float]) -> None:
    """Refuse a recording without a single call of the backbone.

    Raises:
        InputError: the pipeline never called it.
    """
    if not timesteps:
        raise InputError("the pipeline never called its backbone", "check --steps and the scheduler")
