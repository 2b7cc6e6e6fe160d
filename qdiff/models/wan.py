"""Wan 2.1: text to video with a DiT over space and time.

Report: arXiv 2503.20314. Layers: ``patch_embedding`` (a 3-D convolution, never quantized), ``condition_embedder`` (timestep
and text), ``blocks.*`` with ``attn1`` (self, rotary positions), ``attn2`` (cross, UMT5 states) and ``ffn``, ``proj_out``. The
pipeline calls the backbone once for the prompt and once for the negative prompt: recordings join both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.evaluation.video import Clip
from qdiff.models import clips
from qdiff.models.base import FAMILIES, Attend, Family, Processor
from qdiff.models.config import Config, integer, integers
from qdiff.models.model import Model, Request, StepCallback
from qdiff.models.parts import require_width
from qdiff.recording.inputs import Axis, InputSpec

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanAttention

CONFIGURATIONS: dict[str, dict[str, object]] = {
    # Wan2.1-T2V-1.3B as published: 30 blocks, 12 heads of 128, UMT5-XXL states of width 4096.
    "wan2.1-1.3b": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 30,
    },
    # Small enough for a unit test.
    "wan-tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 64,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    },
}
_SIZES: dict[str, dict[str, object]] = {
    "wan2.1-1.3b": {"height": 256, "width": 256, "num_frames": 17},
    "wan-tiny": {"height": 64, "width": 64, "num_frames": 9},
}


class Wan(Family):
    """Text to video with a :class:`diffusers.WanTransformer3DModel`."""

    name = "wan"
    title = "Wan 2.1 (text to video)"
    media = "video"
    pipelines = ("WanPipeline",)
    configurations = tuple(CONFIGURATIONS)
    default_guidance = 5.0
    block_list = "blocks"
    branches_apart = True

    def check(self, model: Model) -> None:
        config = model.config
        if getattr(model.pipeline, "transformer_2", None) is not None or model.pipeline.config.expand_timesteps:
            raise InputError(
                f"{model.weights} is a Wan 2.2 with two backbones or a timestep for every token, which qdiff does not know",
                "use a Wan 2.1 text-to-video model",
            )
        if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
            raise InputError(
                f"the transformer of {model.weights} reads a picture, which {type(model.pipeline).__name__} does not give it",
                "use a Wan 2.1 text-to-video model",
            )
        super().check(model)
        require_width(model, integer(config, "text_dim"), [model.pipeline.text_encoder])

    def inputs(self, config: Config) -> tuple[InputSpec, ...]:
        return (
            InputSpec(
                "hidden_states", ("batch", integer(config, "in_channels"), "frames", "height", "width"), varies=True
            ),
            InputSpec("encoder_hidden_states", ("batch", "tokens", integer(config, "text_dim"))),
            InputSpec("timestep", ("batch",), varies=True, exact=True),
        )

    def output_axes(self, config: Config) -> tuple[Axis, ...]:
        return ("batch", integer(config, "out_channels"), "frames", "height", "width")

    def longest_axis(self, config: Config) -> int | None:
        return integer(config, "rope_max_seq_len")

    def self_attentions(self, backbone: nn.Module) -> list[str]:
        return [f"{block}.attn1" for block in self.blocks(backbone)]

    def attention_processor(self, attend: Attend) -> Processor:
        return _SelfAttention(attend)

    def grid(self, config: Config, latent: Sequence[int]) -> tuple[int, int, int]:
        patches = integers(config, "patch_size")
        frames, rows, columns = (size // patch for size, patch in zip(latent[-3:], patches, strict=True))
        return frames, rows, columns

    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        return clips.capture(args, kwargs)

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return backbone(
            inputs["hidden_states"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            return_dict=False,
        )[0]

    def generate(self, model: Model, request: Request, on_step: StepCallback | None = None) -> list[Clip]:
        return clips.generate(model, request, on_step)

    def random_defaults(self, configuration: str) -> dict[str, object]:
        return {"max_sequence_length": 32, **_SIZES[configuration]}

    def random_pipeline(self, configuration: str, seed: int) -> object:
        from diffusers import UniPCMultistepScheduler, WanPipeline
        from diffusers.models import AutoencoderKLWan, WanTransformer3DModel
        from transformers import UMT5Config, UMT5EncoderModel

        from qdiff.models.loading import random_t5_parts

        config = CONFIGURATIONS[configuration]
        parts = random_t5_parts(
            seed,
            UMT5Config,
            UMT5EncoderModel,
            integer(config, "text_dim"),
            transformer=lambda: WanTransformer3DModel(**config),
            vae=lambda: AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        )
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        return WanPipeline(**parts, scheduler=scheduler)


class _SelfAttention:
    """diffusers' ``WanAttnProcessor`` for ``attn1``, with the attention itself left to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention's output ``[batch, tokens, width]`` for an input of that shape."""
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = (_rotate(x, *rotary_emb) for x in (q, k))
        found = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[0](found.transpose(1, 2).flatten(2, 3).type_as(hidden_states))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return ``x [batch, tokens, heads, size]`` after its rotary positions on pairs of neighbours (arXiv 2104.09864)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).type_as(x)


FAMILIES.register("wan")(Wan())
