"""A loaded pipeline, and the pictures that are asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff import device
from qdiff.correction import CorrectedScheduler, Correction
from qdiff.models.config import Config, config_of, integer, number
from qdiff.models.finite import finite_pictures
from qdiff.models.schedulers import check_steps, count_calls, named
from qdiff.models.sizes import check_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from qdiff.evaluation.video import Clip
    from qdiff.models.base import Family

StepCallback = Callable[[int, float, Tensor], None]


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
    def config(self) -> Config:
        """Return the backbone's diffusers config."""
        return config_of(self.backbone)

    @property
    def device(self) -> torch.device:
        """Return where the backbone computes."""
        return device.of(self.backbone)

    @property
    def pixels_per_cell(self) -> int:
        """Return pixels along one side of a latent cell: the factor of the autoencoder that is there."""
        pipeline = self.pipeline
        factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None)
        return int(factor or self.family.pixels_per_cell(self.config))

    def steps(self, asked: int | None = None) -> int:
        """Return the number of denoising steps: what was asked for, else what these weights or their family sample
        with.
        """
        usual = {"num_inference_steps": self.family.default_steps, **self.defaults}
        return integer(usual, "num_inference_steps") if asked is None else asked

    def guidance(self, asked: float | None = None) -> float:
        """Return the guidance scale, chosen as :meth:`steps` is."""
        usual = {"guidance_scale": self.family.default_guidance, **self.defaults}
        return number(usual, "guidance_scale") if asked is None else asked

    def guided(self, asked: float | None = None) -> bool:
        """Return whether a step has two branches of guidance; a backbone that reads the scale as an input has one."""
        return self.guidance(asked) > 1 and not self.config.get("time_cond_proj_dim")

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

    def calls_of_a_step(self, guidance: float | None = None, scheduler: str | None = None) -> int:
        """Return how often the backbone is called in one step: for each branch of guidance that is apart, as often as the order
        of the scheduler says (Heun's method is of second order; its last step is of first). Arguments as in :class:`Request`.
        """
        before = self.pipeline.scheduler
        try:
            self.use_scheduler(scheduler)
            return int(getattr(self.pipeline.scheduler, "order", 1)) * self.calls_per_step(guidance)
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

    def arguments(self, request: Request) -> dict[str, object]:
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
            calls = count_calls(self.pipeline.scheduler, steps)
            if self.correction is not None:
                self.pipeline.scheduler = CorrectedScheduler(self.pipeline.scheduler, self.correction)
            with finite_pictures(self, calls, self.calls_per_step(request.guidance)):
                return self.family.generate(self, request, on_step)
        finally:
            self.pipeline.scheduler = before


def default_prompts(count: int, seed: int, media: str = "image") -> list[str]:
    """Return prompts for calibration and reports when the user gives none: of the kind the bundled models know."""
    from qdiff.evaluation import motion, prompt_accuracy

    return (motion if media == "video" else prompt_accuracy).default_prompts(count, seed)
