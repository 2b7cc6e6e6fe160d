"""The bundled PixArt: diffusers' own classes at a small size, trained from nothing on emoji.

64x64 pictures -> 16x16x4 latents -> patches of 2 -> 64 tokens of width 192, 8 blocks (5.1 M parameters), cross attention
to a 3-layer T5 encoder (1.3 M) that is trained with it.

Objective: flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023). x_s = (1 - s) x_0 + s noise, the model is
given the timestep 1000 s and predicts v = noise - x_0; s is logit-normal (Esser et al. 2024, eq. 19) with a uniform part,
drawn stratified over the batch. diffusers' stock pipeline samples it with `DPMSolverMultistepScheduler` and flow sigmas.

    python -m zoo.autoencoder --work DIR/vae
    python -m zoo.pixart --work DIR --steps 2800 --export qdiff/models/bundled/pixart
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import autoencoder, text
from zoo.text_to_image import TextToImage, flow_levels, main


def build_transformer() -> nn.Module:
    """Return a fresh PixArt transformer: 5.1 M parameters."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    model = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=192,
        sample_size=16,
        patch_size=2,
        caption_channels=text.WIDTH,
        use_additional_conditions=False,
    )
    model.set_attn_processor(AttnProcessor())  # on a CPU the backward pass of plain matmuls is twice as fast
    return model


def hidden_matrix(name: str) -> bool:
    """Return the matrices that Muon trains: those of the transformer blocks and of the T5 layers."""
    return ("transformer_blocks" in name or "encoder.block" in name) and "relative_attention_bias" not in name


class PixArt(TextToImage):
    """PixArt with flow matching."""

    name = "pixart"
    tokens = 24  # captions are shorter; the pipeline pads to 32 and masks
    special = text.T5
    generation: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "max_sequence_length": text.MAX_LENGTH,
        "use_resolution_binning": False,
    }

    def build_backbone(self) -> nn.Module:
        return build_transformer()

    def build_encoder(self, vocabulary: int) -> nn.Module:
        return text.build_encoder(vocabulary)

    def hidden_matrix(self, name: str) -> bool:
        return hidden_matrix(name)

    def loss_of(self, clean: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        device = self.settings.device
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean, s = clean.to(device), flow_levels(len(clean), generator).to(device)
        level = s[:, None, None, None]
        velocity = self.run(
            (1 - level) * clean + level * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=1000 * s,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def assemble(self, backbone: nn.Module, encoder: nn.Module) -> Any:
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0, num_train_timesteps=1000
        )
        return PixArtSigmaPipeline(
            tokenizer=self.make_tokenizer(),  # fresh: a used one keeps its last truncation
            text_encoder=encoder,
            vae=autoencoder.load(self.work / "vae"),  # the decoder may have been refined since
            transformer=backbone,
            scheduler=scheduler,
        )


if __name__ == "__main__":
    main(PixArt, str(__doc__).splitlines()[0])
