"""PixArt-α and PixArt-Σ: a DiT with cross-attention to T5 states and one AdaLN modulation for all blocks.

Papers: PixArt-α arXiv 2310.00426, PixArt-Σ arXiv 2403.04692. Layers: ``pos_embed.proj`` (patches), ``adaln_single``
(timestep to modulation), ``caption_projection`` (T5 width to model width), ``transformer_blocks.*`` with ``attn1`` (self),
``attn2`` (cross) and ``ff``, ``proj_out``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.models.base import FAMILIES, Attend, Family, NamedInputs, Processor
from qdiff.models.config import Config, config_of, integer
from qdiff.models.given import added_conditions, tensor_of
from qdiff.models.model import Model, Request, StepCallback
from qdiff.models.parts import require_width
from qdiff.recording.inputs import Axis, InputSpec

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import PatchEmbed
    from PIL.Image import Image

_CONFIGURATIONS: dict[str, dict[str, object]] = {
    # PixArt-XL/2 as published for 512 px: 28 blocks, 16 heads of 72, T5-XXL states of width 4096.
    "pixart-xl": {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "sample_size": 64,
        "caption_channels": 4096,
    },
    # The same architecture at a ninth of the size, for quick benchmarks.
    "pixart-67m": {
        "num_layers": 15,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "sample_size": 64,
        "caption_channels": 1024,
    },
    # Small enough for a unit test.
    "pixart-tiny": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "sample_size": 16,
        "caption_channels": 48,
    },
}


# Sample sizes that a pipeline has a table of sizes for.
_BINS = {"PixArtSigmaPipeline": (32, 64, 128, 256), "PixArtAlphaPipeline": (32, 64, 128)}


class PixArt(Family):
    """Text to image with a :class:`diffusers.PixArtTransformer2DModel`."""

    name = "pixart"
    title = "PixArt-α / PixArt-Σ"
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    configurations = tuple(_CONFIGURATIONS)
    default_guidance = 4.5
    block_list = "transformer_blocks"

    def inputs(self, config: Config) -> tuple[InputSpec, ...]:
        specs = [
            InputSpec("hidden_states", ("batch", integer(config, "in_channels"), "height", "width"), varies=True),
            InputSpec("encoder_hidden_states", ("batch", "tokens", _text_width(config))),
            InputSpec("timestep", ("batch",), varies=True, exact=True),
            InputSpec("encoder_attention_mask", ("batch", "tokens"), torch.int64),
        ]
        if config.get("use_additional_conditions"):
            specs += [
                InputSpec("resolution", ("batch", 2), exact=True),
                InputSpec("aspect_ratio", ("batch", 1), exact=True),
            ]
        return tuple(specs)

    def unread(self, config: Config) -> tuple[str, ...]:
        return () if config.get("use_additional_conditions") else ("resolution", "aspect_ratio")

    def resolved(self, backbone: nn.Module) -> dict[str, object]:
        from diffusers.models import PixArtTransformer2DModel

        assert isinstance(backbone, PixArtTransformer2DModel)
        from diffusers.models import PixArtTransformer2DModel

        assert isinstance(backbone, PixArtTransformer2DModel)
        config = config_of(backbone)
        values = {
            "use_additional_conditions": bool(backbone.use_additional_conditions),
            "out_channels": int(backbone.out_channels),
        }
        return {name: value for name, value in values.items() if config.get(name) is None}

    def check(self, model: Model) -> None:
        super().check(model)
        config = model.config
        require_width(model, _text_width(config), [model.pipeline.text_encoder])
        fed = type(model.pipeline).__name__ == "PixArtAlphaPipeline" and config["sample_size"] == 128
        if config["use_additional_conditions"] and not fed:
            raise InputError(
                f"the transformer of {model.weights} reads the picture's resolution and aspect ratio, which "
                f"{type(model.pipeline).__name__} gives to PixArt-α of sample_size 128 alone",
                "write PixArtAlphaPipeline into its model_index.json if it is one, or use another model",
            )

    def output_axes(self, config: Config) -> tuple[Axis, ...]:
        return ("batch", integer(config, "out_channels"), "height", "width")

    def masked_layers(self, backbone: nn.Module) -> list[str]:
        inside = [f"{block}.attn2.{name}" for block in self.blocks(backbone) for name in ("to_k", "to_v")]
        there = {name for name, _ in backbone.named_modules()}
        return [
            name for name in ("caption_projection.linear_1", "caption_projection.linear_2", *inside) if name in there
        ]

    def text_mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return inputs["encoder_attention_mask"].bool()

    def self_attentions(self, backbone: nn.Module) -> list[str]:
        return [f"{block}.attn1" for block in self.blocks(backbone)]

    def attention_processor(self, attend: Attend) -> Processor:
        return _SelfAttention(attend)

    def grid(self, config: Config, latent: Sequence[int]) -> tuple[int, int, int]:
        patch = integer(config, "patch_size")
        return 1, latent[-2] // patch, latent[-1] // patch

    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        given = {**dict(zip(("hidden_states",), args, strict=False)), **kwargs}
        hidden_states, states = tensor_of(given, "hidden_states"), tensor_of(given, "encoder_hidden_states")
        if given.get("encoder_attention_mask") is None:
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
        else:
            mask = tensor_of(given, "encoder_attention_mask").to(torch.int64)
        return {
            "hidden_states": hidden_states.float(),
            "encoder_hidden_states": states.float(),
            "timestep": tensor_of(given, "timestep").float().reshape(-1).expand(hidden_states.shape[0]),
            "encoder_attention_mask": mask,
            **added_conditions(given),
        }

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        added = {name: inputs.get(name) for name in ("resolution", "aspect_ratio")}
        return backbone(
            inputs["hidden_states"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep=inputs["timestep"],
            encoder_attention_mask=inputs["encoder_attention_mask"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def call_settings(self, model: Model) -> dict[str, object]:
        return {
            "use_resolution_binning": model.config["sample_size"] in _binned_sizes(type(model.pipeline)),
            "max_sequence_length": min(300, model.pipeline.tokenizer.model_max_length),
            "clean_caption": False,
        }

    def generate(self, model: Model, request: Request, on_step: StepCallback | None = None) -> list[Image]:
        arguments = {**self.call_settings(model), **model.arguments(request)}
        if arguments.get("height") or arguments.get("width"):
            arguments["use_resolution_binning"] = False
        if on_step is not None:
            arguments |= {"callback": lambda step, t, latents: on_step(step, float(t), latents), "callback_steps": 1}
        model.pipeline.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            return model.pipeline(
                negative_prompt=[request.negative_prompt] * len(request.prompts),
                **arguments,
            ).images

    def for_export(self, backbone: nn.Module) -> nn.Module:
        from diffusers.models.embeddings import PatchEmbed

        patches = backbone.get_submodule("pos_embed")
        assert isinstance(patches, PatchEmbed)
        exported = copy.copy(backbone)
        exported._modules = dict(backbone._modules)
        exported._modules["pos_embed"] = _DynamicPatchEmbed(patches)
        return NamedInputs(self, exported)

    def random_pipeline(self, configuration: str, seed: int) -> object:
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
        from diffusers.models import PixArtTransformer2DModel
        from transformers import T5Config, T5EncoderModel

        from qdiff.models.loading import random_t5_parts, stand_in_vae

        config = _CONFIGURATIONS[configuration]
        width = integer(config, "num_attention_heads") * integer(config, "attention_head_dim")
        parts = random_t5_parts(
            seed,
            T5Config,
            T5EncoderModel,
            integer(config, "caption_channels"),
            transformer=lambda: PixArtTransformer2DModel(
                cross_attention_dim=width, interpolation_scale=1, use_additional_conditions=False, **config
            ),
            vae=stand_in_vae,
        )
        return PixArtSigmaPipeline(**parts, scheduler=DPMSolverMultistepScheduler())


def _text_width(config: Config) -> int:
    """Return the width of the text states that the backbone is given: its own width where it projects none."""
    return integer(config, "cross_attention_dim" if config["caption_channels"] is None else "caption_channels")


class _SelfAttention:
    """diffusers' ``AttnProcessor2_0`` for ``attn1``, with the attention itself left to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the attention's output ``[batch, tokens, width]`` for an input of that shape."""
        assert encoder_hidden_states is None and attention_mask is None
        projected = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        found = self.attend(q, k, v).transpose(1, 2).flatten(2, 3).to(q.dtype)
        return attn.to_out[0](found)


class _DynamicPatchEmbed(nn.Module):
    """diffusers' ``PatchEmbed`` with its sine-cosine position table computed in the graph, so that height and width can be
    dynamic. Same formula, float32 as there; frequencies as in ViT (arXiv 2010.11929), grid scaled as in PixArt-α §2.4.
    """

    def __init__(self, original: PatchEmbed) -> None:
        super().__init__()
        self.proj: nn.Conv2d = original.proj
        self.base_size: int = original.base_size
        self.interpolation_scale: float = original.interpolation_scale

    def forward(self, latent: Tensor) -> Tensor:
        """Return the tokens ``[B, H/p * W/p, width]`` of ``latent [B, C, H, W]``."""
        patches = self.proj(latent)  # [B, D, h, w]
        height, width = patches.shape[-2:]
        rows = self._angles(height)  # [h, D/4]
        columns = self._angles(width)  # [w, D/4]
        across = torch.cat([columns.sin(), columns.cos()], dim=-1)  # [w, D/2]
        down = torch.cat([rows.sin(), rows.cos()], dim=-1)  # [h, D/2]
        table = torch.cat([across[None, :, :].expand(height, -1, -1), down[:, None, :].expand(-1, width, -1)], dim=-1)
        return (patches.permute(0, 2, 3, 1) + table.to(patches.dtype)).flatten(1, 2)

    def _angles(self, size: int) -> Tensor:
        quarter = self.proj.out_channels // 4
        device = self.proj.weight.device
        omega = 10000 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        position = torch.arange(size, dtype=torch.float32, device=device) / (size / self.base_size)
        return (position / self.interpolation_scale)[:, None] * omega[None, :]


def _binned_sizes(pipeline: type) -> tuple[int, ...]:
    """Return the sample sizes that a pipeline class, or the one that it is made from, has a table of sizes for."""
    return next((_BINS[cls.__name__] for cls in pipeline.__mro__ if cls.__name__ in _BINS), ())


FAMILIES.register("pixart")(PixArt())
