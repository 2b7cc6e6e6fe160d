"""The bundled Wan: diffusers' own classes at a small size, trained from nothing on emoji that move.

33 frames of 64x64 -> 17x16x16 latents of 8 channels -> patches of 1x2x2 -> 1,088 tokens of width 192, 6 blocks of 3 heads,
cross attention to a 3-layer UMT5 encoder that is trained with it.

Objective: flow matching, as for the bundled PixArt; clips are redundant, so noise levels lie higher. The first
``--stills`` steps see first frames alone (64 tokens, a large batch: what there is and where), the rest whole clips (how it
moves). diffusers' stock pipeline samples it with `UniPCMultistepScheduler` and flow sigmas, as Wan's.

    python -m zoo.video_autoencoder --work DIR/video-vae
    python -m zoo.wan --work DIR --steps 2000
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import text, video_autoencoder
from zoo.clips import Clips
from zoo.text_to_image import TextToImage, flow_levels, main

MOVING_CLIPS = 768
STILLS = 900
STILL_BATCH = 96
FLOW_SHIFT = 3.0


def build_transformer() -> nn.Module:
    """Return a fresh Wan transformer: 3.6 M parameters."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=video_autoencoder.CHANNELS,
        out_channels=video_autoencoder.CHANNELS,
        text_dim=text.WIDTH,
        freq_dim=128,
        ffn_dim=576,
        num_layers=6,
        rope_max_seq_len=64,
    )


class Wan(TextToImage):
    """Wan with flow matching; ``size`` is the batch of whole clips."""

    name = "wan"
    tokens = text.MAX_LENGTH  # nothing is masked: the pipeline puts zeros behind the text, and so does training
    special = text.T5
    generation: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "num_frames": video_autoencoder.FRAMES,
        "max_sequence_length": text.MAX_LENGTH,
    }

    def build_data(self, training: bool) -> Clips:
        vae = video_autoencoder.load(self.work / "video-vae") if training else None
        return Clips.build(vae, self.work / "latents", MOVING_CLIPS)

    def build_backbone(self) -> nn.Module:
        return build_transformer()

    def build_encoder(self, vocabulary: int) -> nn.Module:
        return text.build_umt5(vocabulary)

    def hidden_matrix(self, name: str) -> bool:
        return ("transformer.blocks" in name or "encoder.block" in name) and "relative_attention_bias" not in name

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states * mask[..., None].to(states.dtype)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        self.data.moving = step >= STILLS  # type: ignore[attr-defined]
        full, self.size = self.size, self.size if step >= STILLS else STILL_BATCH
        try:
            return super().loss(step, generator)
        finally:
            self.size = full

    def loss_of(self, clean: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        device = self.settings.device
        noise = torch.randn(clean.shape, generator=generator).to(device)
        middle = 0.8 if clean.shape[2] > 1 else 0.2
        clean, s = clean.to(device), flow_levels(len(clean), generator, middle).to(device)
        level = s[:, None, None, None, None]
        velocity = self.run(
            (1 - level) * clean + level * noise,
            timestep=1000 * s,
            encoder_hidden_states=states,
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def judge(self, pipeline: Any, sheet: Path) -> str:
        from zoo.evaluate_clips import quick

        return quick(pipeline, sheet)

    def assemble(self, backbone: nn.Module, encoder: nn.Module) -> Any:
        from diffusers import UniPCMultistepScheduler, WanPipeline

        return WanPipeline(
            tokenizer=self.make_tokenizer(),
            text_encoder=encoder,
            vae=video_autoencoder.load(self.work / "video-vae"),
            transformer=backbone,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
            ),
        )


if __name__ == "__main__":
    main(Wan, str(__doc__).splitlines()[0], batch=8)
