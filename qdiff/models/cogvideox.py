"""CogVideoX 1.0: text to video with an expert transformer over one sequence of text and video.

Report: arXiv 2408.06072. Layers: ``patch_embed`` (a convolution over frames one by one, and the text's projection),
``time_embedding``, ``transformer_blocks.*`` with ``norm1`` and ``norm2`` (modulation, apart for text and video), ``attn1`` (text
and video read each other) and ``ff``, ``norm_out``, ``proj_out``. Positions are a table in the 2B model and rotations of queries
and keys in the 5B; both are made for one number of frames, rows and columns, so a graph is too.
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
from qdiff.models.config import Config, config_of, integer
from qdiff.models.model import Model, Request, StepCallback
from qdiff.models.parts import require_width
from qdiff.recording.inputs import Axis, InputSpec

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

_CONFIGURATIONS: dict[str, dict[str, object]] = {
    # CogVideoX-2B as published: 30 blocks, 30 heads of 64, T5-XXL states of width 4096.
    "cogvideox-2b": {
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "num_layers": 30,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "max_text_seq_length": 226,
    },
    # Small enough for unit tests; with a table of positions, as the 2B has it, for another size than that of its clips.
    "cogvideox-tiny-table": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "time_embed_dim": 32,
        "text_embed_dim": 48,
        "sample_width": 12,
        "sample_height": 10,
        "sample_frames": 13,
        "max_text_seq_length": 16,
    },
    # The same with rotary positions, as the 5B has them.
    "cogvideox-tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "time_embed_dim": 32,
        "text_embed_dim": 48,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": True,
    },
}
_SIZES: dict[str, dict[str, object]] = {
    "cogvideox-2b": {"height": 256, "width": 256, "num_frames": 9},
    "cogvideox-tiny-table": {"height": 64, "width": 64, "num_frames": 9},
    "cogvideox-tiny": {"height": 64, "width": 64, "num_frames": 9},
}


class CogVideoX(Family):
    """Text to video with a :class:`diffusers.CogVideoXTransformer3DModel`."""

    name = "cogvideox"
    title = "CogVideoX 1.0 (text to video)"
    media = "video"
    pipelines = ("CogVideoXPipeline",)
    configurations = tuple(_CONFIGURATIONS)
    default_guidance = 6.0
    default_steps = 50
    block_list = "transformer_blocks"
    chain = False  # a block returns the text's states too
    one_size = True

    def check(self, model: Model) -> None:
        config = model.config
        if (
            config["patch_size_t"] is not None
            or config["ofs_embed_dim"] is not None
            or config["use_learned_positional_embeddings"]
        ):
            raise InputError(
                f"{model.weights} is a CogVideoX 1.5 or reads a picture, which qdiff does not know",
                "use a CogVideoX 1.0 text-to-video model (2B or 5B)",
            )
        super().check(model)
        require_width(model, integer(config, "text_embed_dim"), [model.pipeline.text_encoder])

    def inputs(self, config: Config) -> tuple[InputSpec, ...]:
        return (
            InputSpec(
                "hidden_states", ("batch", "frames", integer(config, "in_channels"), "height", "width"), varies=True
            ),
            InputSpec("encoder_hidden_states", ("batch", self.text_tokens(config), integer(config, "text_embed_dim"))),
            InputSpec("timestep", ("batch",), varies=True, exact=True),
        )

    def output_axes(self, config: Config) -> tuple[Axis, ...]:
        return ("batch", "frames", integer(config, "out_channels"), "height", "width")

    def self_attentions(self, backbone: nn.Module) -> list[str]:
        return [f"{block}.attn1" for block in self.blocks(backbone)]

    def attention_processor(self, attend: Attend) -> Processor:
        return _JointAttention(attend)

    def text_tokens(self, config: Config) -> int:
        return integer(config, "max_text_seq_length")

    def grid(self, config: Config, latent: Sequence[int]) -> tuple[int, int, int]:
        patch = integer(config, "patch_size")
        return latent[1], latent[-2] // patch, latent[-1] // patch

    def fix_size(self, backbone: nn.Module, latent: Sequence[int]) -> None:
        """Make the table of positions, which diffusers computes in the forward for all sizes but the one in its
        configuration.
        """
        from diffusers.models.embeddings import CogVideoXPatchEmbed

        patches = backbone.get_submodule("patch_embed")
        assert isinstance(patches, CogVideoXPatchEmbed)
        if not patches.use_positional_embeddings:
            return
        ratio = patches.temporal_compression_ratio
        size = latent[-2], latent[-1], (latent[1] - 1) * ratio + 1
        table = patches._get_positional_embeddings(*size)
        patches.pos_embedding = table.to(patches.get_buffer("pos_embedding"))
        patches.sample_height, patches.sample_width, patches.sample_frames = size

    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        return clips.capture(args, kwargs)

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        config = config_of(backbone)
        return backbone(
            inputs["hidden_states"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep=inputs["timestep"],
            image_rotary_emb=_rotary(config, self.grid(config, inputs["hidden_states"].shape)),
            return_dict=False,
        )[0]

    def call_settings(self, model: Model) -> dict[str, object]:
        return {"max_sequence_length": self.text_tokens(model.config)}

    def generate(self, model: Model, request: Request, on_step: StepCallback | None = None) -> list[Clip]:
        return clips.generate(model, request, on_step, **self.call_settings(model))

    def random_defaults(self, configuration: str) -> dict[str, object]:
        return dict(_SIZES[configuration])

    def random_pipeline(self, configuration: str, seed: int) -> object:
        from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
        from diffusers.models import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
        from transformers import T5Config, T5EncoderModel

        from qdiff.models.loading import random_t5_parts

        config = _CONFIGURATIONS[configuration]
        parts = random_t5_parts(
            seed,
            T5Config,
            T5EncoderModel,
            integer(config, "text_embed_dim"),
            transformer=lambda: CogVideoXTransformer3DModel(**config),
            vae=lambda: AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=16
            ),
        )
        scheduler = CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0,
        )
        return CogVideoXPipeline(**parts, scheduler=scheduler)


class _JointAttention:
    """diffusers' ``CogVideoXAttnProcessor2_0``, with the attention itself left to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention's outputs for video ``[batch, tokens, width]`` and text ``[batch, text, width]``, in
        these shapes.
        """
        assert attention_mask is None
        text = encoder_hidden_states.shape[1]
        states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = (layer(states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q, k = (x if norm is None else norm(x) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        if image_rotary_emb is not None:
            q, k = (_rotate(x, text, image_rotary_emb) for x in (q, k))
        found = self.attend(q, k, v).transpose(1, 2).flatten(2, 3).to(states.dtype)
        found = attn.to_out[0](found)
        return found[:, text:], found[:, :text]


def _rotate(x: Tensor, text: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return positions of the tokens behind the text: ``x [batch, heads, text + tokens, size]``."""
    from diffusers.models.embeddings import apply_rotary_emb

    turned: object = apply_rotary_emb(x[:, :, text:], rotary)  # type: ignore[arg-type]
    assert isinstance(turned, Tensor)
    return torch.cat([x[:, :, :text], turned], dim=2)


def _rotary(config: Config, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """Return cosines and sines of the positions of a grid of tokens, as the pipeline makes them; ``None`` where there
    is a table.
    """
    if not config["use_rotary_positional_embeddings"]:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, rows, columns = grid
    patch = integer(config, "patch_size")
    base = integer(config, "sample_width") // patch, integer(config, "sample_height") // patch
    crops = get_resize_crop_region_for_grid((rows, columns), *base)
    cosines, sines = get_3d_rotary_pos_embed(integer(config, "attention_head_dim"), crops, (rows, columns), frames)
    return cosines, sines


FAMILIES.register("cogvideox")(CogVideoX())
