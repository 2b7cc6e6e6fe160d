"""Small random models saved as the shapes of folders that people publish, each a situation of a public bug report.

The names are those of the cases; sources beside them. Weights are random, so pictures are noise, but what float and engines make
of them is still one figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qdiff.models import FAMILIES

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Registers a writer under its name."""
    CASES[function.__name__] = function
    return function


def stable_diffusion(folder: Path, unet: dict[str, Any] | None = None, scheduler: Any = None, **saving: Any) -> Any:
    """``random:sd-tiny`` with another scheduler and some entries of the U-Net's config changed, saved; the pipeline."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    pipeline = FAMILIES["stable-diffusion"].load("random:sd-tiny").pipeline
    if unet is not None:
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel(**{**_arguments(pipeline.unet), **unet}).eval()
    pipeline.scheduler = scheduler or DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    pipeline.save_pretrained(str(folder), **saving)
    return pipeline


def pixart(folder: Path, transformer: dict[str, Any] | None = None, pipeline: str | None = None) -> None:
    """``random:pixart-tiny`` with some entries of the transformer's config changed, saved."""
    import diffusers

    made = FAMILIES["pixart"].load("random:pixart-tiny").pipeline
    if transformer is not None:
        torch.manual_seed(0)
        network = diffusers.PixArtTransformer2DModel(**{**_arguments(made.transformer), **transformer}).eval()
        made.transformer = network
    if pipeline is not None:
        made = getattr(diffusers, pipeline)(**made.components)
    made.save_pretrained(str(folder))


def _arguments(network: Any) -> dict[str, Any]:
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def edit_weights(component: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the only safetensors file of a component by ``edit(tensors)``."""
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a JSON file by ``edit(value)``."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@case
def safety_checker(folder: Path) -> None:
    """Stable Diffusion 1.4 and 1.5: PNDM, a checker of diffusers' own pipelines, a feature extractor of an old class
    (huggingface/optimum-intel#990, diffusers#4031)."""
    from diffusers import PNDMScheduler
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision, text = {**small, "image_size": 32, "patch_size": 8}, {**small, "vocab_size": 100}
    stable_diffusion(folder, scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False))
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    checker.save_pretrained(str(folder / "safety_checker"))
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    edit_json(
        folder / "model_index.json",
        lambda index: index.update(
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            feature_extractor=["transformers", "CLIPFeatureExtractor"],
            requires_safety_checker=True,
        ),
    )


@case
def pndm(folder: Path) -> None:
    """Comes to its second timestep twice (diffusers#4122)."""
    from diffusers import PNDMScheduler

    stable_diffusion(folder, scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True))


@case
def karras(folder: Path) -> None:
    """Its last timesteps are rounded to the same integers (diffusers#12771, #9090)."""
    from diffusers import DPMSolverMultistepScheduler

    stable_diffusion(folder, scheduler=DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True))


@case
def alpha_1024(folder: Path) -> None:
    """PixArt-α at 1024 px, whose config leaves open that it reads the picture's size (PixArt-sigma#70, #126)."""
    width = {"num_attention_heads": 3, "cross_attention_dim": 48}
    pixart(folder, {**width, "sample_size": 128, "use_additional_conditions": None}, "PixArtAlphaPipeline")


@case
def no_mid_block(folder: Path) -> None:
    """tiny-sd and BK-SDM (diffusers#7083)."""
    stable_diffusion(folder, {"mid_block_type": None})


@case
def vae_lacks_a_weight(folder: Path) -> None:
    """diffusers fills it with what the memory held (Wangt-CN/DisCo#100)."""
    pixart(folder)
    edit_weights(folder / "vae", lambda tensors: tensors.pop("decoder.conv_out.weight"))


@case
def vae_gives_nan(folder: Path) -> None:
    """Every picture is black (comfyanonymous/ComfyUI_TensorRT#7, #25)."""
    pixart(folder)
    edit_weights(folder / "vae", lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan")))


@case
def nine_channels(folder: Path) -> None:
    """An inpainting model in a text-to-image pipeline (AUTOMATIC1111/stable-diffusion-webui-tensorrt#64)."""
    stable_diffusion(folder, {"in_channels": 9})


@case
def class_embedding(folder: Path) -> None:
    """Reads a class that no text-to-image pipeline gives."""
    stable_diffusion(folder, {"num_class_embeds": 4})


@case
def lcm(folder: Path) -> None:
    """Takes 50 steps at most."""
    from diffusers import LCMScheduler

    stable_diffusion(folder, scheduler=LCMScheduler(**BETAS))


@case
def lcm_distilled(folder: Path) -> None:
    """LCM_Dreamshaper_v7: the scale of guidance is an input of the U-Net."""
    from diffusers import LCMScheduler

    stable_diffusion(folder, {"time_cond_proj_dim": 16}, LCMScheduler(**BETAS))


@case
def fp16_variant(folder: Path) -> None:
    """Weights in files named after their precision alone (diffusers#9253)."""
    stable_diffusion(folder, variant="fp16")


@case
def sharded_variant(folder: Path) -> None:
    """The same in several files with an index."""
    stable_diffusion(folder, variant="fp16", max_shard_size="200KB")


@case
def bin_files(folder: Path) -> None:
    """Pickles (diffusers#8898)."""
    stable_diffusion(folder, safe_serialization=False)


@case
def plain(folder: Path) -> None:
    """Nothing strange: for what is done with paths."""
    pixart(folder)
