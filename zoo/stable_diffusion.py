"""The bundled Stable Diffusion: diffusers' own classes at a small size, trained from nothing on emoji.

64x64 pictures -> 16x16x4 latents -> a U-Net of three levels (64, 128, 160 channels; self and cross attention on the first two,
skip concats on all), cross attention to a 3-layer CLIP text encoder that is trained with it.

Objective: v-prediction (Salimans and Ho 2022, eq. 11) on Stable Diffusion's ``scaled_linear`` betas, rescaled to no signal at the
last timestep (Lin et al. 2024): a flat background is the mean of a picture, which a last step with some signal left gives away
in training and lacks in sampling. Timesteps are uniform, stratified over the batch. diffusers' stock pipeline samples it with
`DPMSolverMultistepScheduler` and trailing timesteps.

    python -m zoo.autoencoder --work DIR/vae
    python -m zoo.stable_diffusion --work DIR --steps 3000 --compile
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import autoencoder, text
from zoo.text_to_image import TextToImage, main, stratified

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def build_unet() -> nn.Module:
    """Return a fresh U-Net."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    channels = (64, 128, 160)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=tuple(width // 32 for width in channels),  # the number of heads, as in Stable Diffusion 1.5
        cross_attention_dim=text.WIDTH,
        norm_num_groups=16,
    )
    model.set_attn_processor(AttnProcessor())  # on a CPU the backward pass of plain matmuls is twice as fast
    return model.to(memory_format=torch.channels_last)


@functools.cache
def signal_share() -> Tensor:
    """Return the share of the signal in a noisy latent's energy at each timestep, float32 [1000]."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULE).alphas_cumprod


class StableDiffusion(TextToImage):
    """Stable Diffusion with v-prediction."""

    name = "stable_diffusion"
    tokens = text.MAX_LENGTH  # the pipeline masks nothing, so training sees as many pads as sampling
    special = text.CLIP
    generation: ClassVar[dict[str, Any]] = {"num_inference_steps": 20, "guidance_scale": 2.0, "height": 64, "width": 64}

    def build_backbone(self) -> nn.Module:
        return build_unet()

    def build_encoder(self, vocabulary: int) -> nn.Module:
        return text.build_clip(vocabulary)

    def hidden_matrix(self, name: str) -> bool:
        return "transformer_blocks" in name or "encoder.layers" in name

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids).last_hidden_state

    def loss_of(self, clean: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        device, cumulative = self.settings.device, signal_share()
        t = (stratified(len(clean), generator) * len(cumulative)).long()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean, signal = clean.to(device), cumulative[t].sqrt().to(device)[:, None, None, None]
        spread = (1 - signal.square()).sqrt()
        noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
        velocity = self.run(noisy, t.to(device), states, return_dict=False)[0]
        return (velocity.float() - (signal * noise - spread * clean)).square().mean()

    def assemble(self, backbone: nn.Module, encoder: nn.Module) -> Any:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=autoencoder.load(self.work / "vae"),
            text_encoder=encoder,
            tokenizer=self.make_tokenizer(),
            unet=backbone.to(memory_format=torch.contiguous_format),
            scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


if __name__ == "__main__":
    main(StableDiffusion, str(__doc__).splitlines()[0])
