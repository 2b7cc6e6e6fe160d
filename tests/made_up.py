"""A model family that does not exist, with what published backbones have and the bundled ones lack: a layer that the forward
calls twice, an input without a batch axis, one of integers, one under another name than its argument, and an exact one that
joins the modulation. The rest is PixArt's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from qdiff.models import FAMILIES
from qdiff.models.pixart import PixArt
from qdiff.recording.inputs import InputSpec

KINDS, STYLES = 5, 6


class MadeUpTransformer(diffusers.PixArtTransformer2DModel):
    """PixArt's with ``added``: what is added to every latent, ``[channels, 1, 1]``; ``kind [batch]``, an index;
    ``style [batch, STYLES]``."""

    @functools.wraps(
        diffusers.PixArtTransformer2DModel.__init__
    )  # diffusers reads the configuration from the signature
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.given: dict[str, Tensor] = {}  # for the hooks; one for a copy of the module as well
        width = self.config.num_attention_heads * self.config.attention_head_dim
        self.again = nn.Linear(width, width)
        self.kinds = nn.Embedding(KINDS, width)
        self.stylist = nn.Linear(STYLES, 6 * width)
        self.adaln_single.register_forward_hook(self._with_style)
        self.caption_projection.register_forward_hook(self._again)

    def _with_style(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        modulation, embedded = output
        return modulation + self.given["style"], embedded

    def _again(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.again(3 + torch.tanh(self.again(output))) + self.kinds(self.given["kind"])[:, None]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        picture: Tensor | None = None,
        kind: Tensor | None = None,
        style: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        self.given["kind"] = kind
        # Both kinds of path: through a layer, and straight into the modulation.
        self.given["style"] = self.stylist(style) + style.mean(dim=1, keepdim=True)
        return super().forward(
            hidden_states + picture,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )


class MadeUp(PixArt):
    name = "made-up"
    title = "Made-up"
    configurations = ("made-up-tiny",)

    def inputs(self, config: Mapping[str, Any]) -> tuple[InputSpec, ...]:
        return (
            InputSpec("kind", ("batch",), torch.int64),
            InputSpec("base", (config["in_channels"], 1, 1), argument="picture"),
            *super().inputs(config),
            InputSpec("style", ("batch", STYLES), exact=True),
        )

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        extra = {"kind": kwargs["kind"], "base": kwargs["picture"], "style": kwargs["style"]}
        return {**super().capture(args, kwargs), **extra}

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return backbone(
            inputs["hidden_states"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep=inputs["timestep"],
            encoder_attention_mask=inputs["encoder_attention_mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            picture=inputs["base"],
            kind=inputs["kind"],
            style=inputs["style"],
            return_dict=False,
        )[0]

    def random_pipeline(self, configuration: str, seed: int) -> Any:
        pipeline = FAMILIES["pixart"].random_pipeline("pixart-tiny", seed)
        config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline.transformer = MadeUpTransformer(**config).eval().requires_grad_(False)
        return MadeUpPipeline(**pipeline.components)


class Giving(nn.Module):
    """A backbone that is given, in every call, what the pipeline of this family would give besides."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        batch = torch.arange(len(hidden_states))
        return self.backbone(
            hidden_states,
            picture=torch.linspace(-1, 1, hidden_states.shape[1])[:, None, None],
            kind=batch % KINDS,
            style=torch.sin(batch[:, None] + torch.arange(STYLES)),
            **kwargs,
        )


class MadeUpPipeline(diffusers.PixArtSigmaPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        backbone = self.transformer
        self.transformer = Giving(backbone)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.transformer = backbone


@contextmanager
def made_up_family() -> Iterator[MadeUp]:
    """Registers the family, and its class in diffusers, for the length of a block."""
    family = MadeUp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "MadeUpTransformer", MadeUpTransformer, raising=False)
        patch.setitem(FAMILIES._entries, family.name, family)
        yield family
