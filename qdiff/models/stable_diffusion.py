"""Stable Diffusion 1.5, 2.1, XL and XL-Turbo: a U-Net with cross attention to CLIP states.

Papers: latent diffusion arXiv 2112.10752, SDXL arXiv 2307.01952, SDXL-Turbo arXiv 2311.17042. Layers: ``time_embedding`` and
every resnet's ``time_emb_proj`` (timestep), ``conv_in``, ``down_blocks.*``, ``mid_block``, ``up_blocks.*`` with ``resnets`` and
``attentions`` (``attn1`` self, ``attn2`` cross, ``ff``), ``conv_out``; in XL ``add_embedding`` (pooled text and picture sizes).

Resnets of ``up_blocks`` read hidden states joined with a skip connection (:meth:`StableDiffusion.splits`), and cross attention
reads CLIP's constant first token (:meth:`StableDiffusion.first_token_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.errors import InputError
from qdiff.models.base import FAMILIES, Family
from qdiff.models.config import Config, config_of, integer, integers
from qdiff.models.given import added_conditions, tensor_of
from qdiff.models.model import Model, Request, StepCallback
from qdiff.models.parts import require_width
from qdiff.recording.inputs import Axis, InputSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPTextConfig, PreTrainedTokenizerBase

_THREE_LEVELS: dict[str, object] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_XL: dict[str, object] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CONFIGURATIONS: dict[str, dict[str, object]] = {
    # As published: four levels of 320 to 1280 channels, 8 heads, CLIP-L states of width 768, 512 px. 860 M parameters.
    "sd-1.5": {"sample_size": 64, "cross_attention_dim": 768},
    # As published for 1024 px: three levels, up to ten transformer layers in a block, two encoders. 2.6 G parameters.
    "sdxl": _XL,
    # The same network, sampled in one to four steps without guidance, at 512 px.
    "sdxl-turbo": {**_XL, "sample_size": 64},
    # Small enough for a unit test.
    "sd-tiny": {
        "sample_size": 16,
        "block_out_channels": (64, 64, 64),
        "layers_per_block": 1,
        "attention_head_dim": (2, 2, 2),
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
        **_THREE_LEVELS,
    },
    # XL's interface (two encoders, pooled text, picture sizes) at that size.
    "sdxl-tiny": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}
_STEPS_AND_GUIDANCE = {"sdxl-turbo": {"num_inference_steps": 4, "guidance_scale": 0.0}}


class StableDiffusion(Family):
    """Text to image with a :class:`diffusers.UNet2DConditionModel`."""

    name = "stable-diffusion"
    title = "Stable Diffusion 1.5, 2.1, XL, XL-Turbo"
    backbone_attribute = "unet"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    configurations = tuple(_CONFIGURATIONS)
    chain = False  # skip connections
    size_divisor = 64  # a latent cell is 8 pixels, and three levels halve it
    largest_batch = 63  # diffusers' upsampling takes another path from 64 on, and a graph has one
    default_guidance = 7.5

    def inputs(self, config: Config) -> tuple[InputSpec, ...]:
        specs = [
            InputSpec("sample", ("batch", integer(config, "in_channels"), "height", "width"), varies=True),
            InputSpec("timestep", ("batch",), varies=True, exact=True),
            InputSpec("encoder_hidden_states", ("batch", "tokens", _text_width(config))),
        ]
        if config.get("time_cond_proj_dim") is not None:  # of a guidance-distilled model (LCM): the scale is an input
            specs.append(InputSpec("timestep_cond", ("batch", integer(config, "time_cond_proj_dim")), exact=True))
        if config.get("addition_embed_type") == "text_time":
            specs += [
                InputSpec("text_embeds", ("batch", _pooled_width(config)), exact=True),
                InputSpec("time_ids", ("batch", 6), exact=True),
            ]
        return tuple(specs)

    def resolved(self, backbone: nn.Module) -> dict[str, object]:
        config = config_of(backbone)
        # Without one the pipeline knows no size to draw at; 64 cells are those of the family's first models.
        return {"sample_size": 64} if config.get("sample_size") is None else {}

    def check(self, model: Model) -> None:
        super().check(model)
        config = model.config
        pipeline, name = model.pipeline, type(model.pipeline).__name__
        large = name == "StableDiffusionXLPipeline"
        added = config["addition_embed_type"]
        reads = {
            "class labels": config["class_embed_type"] is not None or config["num_class_embeds"] is not None,
            "pictures beside its text": config["encoder_hid_dim_type"] not in (None, "text_proj"),
            f"{added} embeddings": added not in (None, "text", "text_time"),
            "pooled text and picture sizes": added == "text_time" and not large,
            "boxes (GLIGEN)": str(config["attention_type"]).startswith("gated"),
        }
        for what, does in reads.items():
            if does:
                raise InputError(
                    f"the U-Net of {model.weights} reads {what}, which {name} does not give it",
                    "use a text-to-image model of that pipeline",
                )
        if large and added != "text_time":
            raise InputError(
                f"the U-Net of {model.weights} does not read the pooled text and picture sizes that {name} gives it",
                "use the pipeline class that this model was published with",
            )
        encoders = [getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")]
        require_width(model, _text_width(config), [encoder for encoder in encoders if encoder is not None])

    def output_axes(self, config: Config) -> tuple[Axis, ...]:
        return ("batch", integer(config, "out_channels"), "height", "width")

    def cells_divisor(self, config: Config) -> int:
        return 2 ** (len(integers(config, "block_out_channels")) - 1)

    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        given = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
        sample = tensor_of(given, "sample")
        inputs = {
            "sample": sample.float(),
            "timestep": torch.as_tensor(given["timestep"]).float().reshape(-1).expand(len(sample)),
            "encoder_hidden_states": tensor_of(given, "encoder_hidden_states").float(),
            **added_conditions(given),
        }
        if given.get("timestep_cond") is not None:
            inputs["timestep_cond"] = tensor_of(given, "timestep_cond").float()
        return inputs

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        return backbone(
            inputs["sample"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep_cond=inputs.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]

    def splits(self, backbone: nn.Module) -> dict[str, int]:
        config = config_of(backbone)
        widths, depths = integers(config, "block_out_channels"), integers(config, "layers_per_block")
        skips = [widths[0]]  # channels of the skip connections in the order in which they are made
        for level, channels in enumerate(widths):
            layers = depths[level] if len(depths) > 1 else depths[0]
            last = level == len(widths) - 1
            skips += [channels] * (layers if last else layers + 1)
        found = {}
        for level, block in enumerate(backbone.get_submodule("up_blocks").children()):
            for index, resnet in enumerate(getattr(block, "resnets", ())):
                at = resnet.conv1.in_channels - skips.pop()
                for part in ("conv1", "conv_shortcut"):
                    if getattr(resnet, part, None) is not None:
                        found[f"up_blocks.{level}.resnets.{index}.{part}"] = at
        return found

    def blocks(self, backbone: nn.Module) -> list[str]:
        """Return resnets and transformer blocks in the order in which they are called: a level's resnets and attentions
        take turns.
        """
        sections = [f"down_blocks.{i}" for i, _ in enumerate(backbone.get_submodule("down_blocks").children())]
        middle = ["mid_block"] if getattr(backbone, "mid_block", None) is not None else []
        sections += [
            *middle,
            *(f"up_blocks.{i}" for i, _ in enumerate(backbone.get_submodule("up_blocks").children())),
        ]
        found = []
        for section in sections:
            part = backbone.get_submodule(section)
            attentions = list(getattr(part, "attentions", None) or [])
            for index, _ in enumerate(getattr(part, "resnets", ())):
                found.append(f"{section}.resnets.{index}")
                # The middle's only attention stands between its two resnets.
                if index < len(attentions) and attentions[index] is not None:
                    name = f"{section}.attentions.{index}"
                    inner = getattr(attentions[index], "transformer_blocks", None)
                    found += (
                        [name] if inner is None else [f"{name}.transformer_blocks.{i}" for i, _ in enumerate(inner)]
                    )
        return found

    def first_token_layers(self, backbone: nn.Module) -> list[str]:
        return [name for name, _ in backbone.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]

    def generate(self, model: Model, request: Request, on_step: StepCallback | None = None) -> list[Image]:
        arguments = model.arguments(request)
        if on_step is not None:

            def after(pipeline: object, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
                on_step(step, float(t), values["latents"])
                return {}

            arguments["callback_on_step_end"] = after
        model.pipeline.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            return model.pipeline(
                negative_prompt=[request.negative_prompt] * len(request.prompts) if request.negative_prompt else None,
                **arguments,
            ).images

    def random_pipeline(self, configuration: str, seed: int) -> object:
        import diffusers
        from diffusers import DPMSolverMultistepScheduler
        from diffusers.models import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from qdiff.models.loading import bundled_tokenizer, random_networks, stand_in_vae

        config = _CONFIGURATIONS[configuration]
        defaults = {"attention_head_dim": 8} if "attention_head_dim" not in config else {}
        width, tokenizer = integer(config, "cross_attention_dim"), bundled_tokenizer(self.name)
        is_xl = "addition_embed_type" in config
        # Only the backbone has its full size; what runs before and after it is a stand-in of the right interface.
        if not is_xl:
            encoders: dict[str, Callable[[], nn.Module]] = {
                "text_encoder": lambda: CLIPTextModel(_clip(width, tokenizer))
            }
        else:
            pooled = _pooled_width(config)
            first = 3 * width // 8  # XL: 768 and 1280
            encoders = {
                "text_encoder": lambda: CLIPTextModel(_clip(first, tokenizer)),
                "text_encoder_2": lambda: CLIPTextModelWithProjection(_clip(width - first, tokenizer, pooled)),
            }
        networks = random_networks(
            seed, unet=lambda: UNet2DConditionModel(**defaults, **config), vae=stand_in_vae, **encoders
        )
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="trailing",
        )
        parts = {"tokenizer": tokenizer, "scheduler": scheduler, **networks}
        if is_xl:
            return diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=bundled_tokenizer(self.name))
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def random_defaults(self, configuration: str) -> dict[str, object]:
        return dict(_STEPS_AND_GUIDANCE.get(configuration, {}))


def _text_width(config: Config) -> int:
    """Return the width of the text states that the backbone is given, which it may project; blocks may have a width
    each, of the same states.
    """
    if config.get("encoder_hid_dim") is not None:
        return integer(config, "encoder_hid_dim")
    return integers(config, "cross_attention_dim")[0]


def _pooled_width(config: Config) -> int:
    """Return the width of XL's pooled text, which is embedded beside six embedded sizes."""
    sizes = 6 * integer(config, "addition_time_embed_dim")
    return integer(config, "projection_class_embeddings_input_dim") - sizes


def _clip(width: int, tokenizer: PreTrainedTokenizerBase, pooled: int = 0) -> CLIPTextConfig:
    """Return the configuration of a text encoder of one layer and of that width."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=math.gcd(width, 8),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=pooled or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


FAMILIES.register("stable-diffusion")(StableDiffusion())
