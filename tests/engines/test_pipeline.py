"""An engine inside diffusers' own pipelines (real classes, small random weights)."""

from __future__ import annotations

import pytest
import torch

from qdiff.engines import ModuleRunner, Runner
from qdiff.engines.hoisted import same_bytes
from qdiff.engines.pipeline import EngineBackbone, insert, replace
from qdiff.errors import InputError
from qdiff.evaluation.images import to_pixels
from qdiff.models import FAMILIES
from qdiff.models.base import NamedInputs
from qdiff.models.model import Request
from qdiff.stages.generate import simulate

PIXART = FAMILIES["pixart"].inputs({"in_channels": 4, "caption_channels": 12})


class Recorder(Runner):
    """Passes calls on and keeps what it was given."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, inputs):
        self.calls.append(dict(inputs))
        return self.inner(inputs)


def test_bytes_of_a_timestep_that_was_expanded_to_a_batch_of_one():
    one, two = torch.tensor(5).expand(1), torch.tensor(6).expand(1)
    assert same_bytes(one, torch.tensor([5])) and not same_bytes(one, two)
    assert same_bytes(torch.ones(2, 1).expand(2, 3), torch.ones(2, 3))


@pytest.fixture(scope="module")
def pipe():
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, patch_size=2, caption_channels=12, norm_type="ada_norm_single",
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **more):
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    arguments = {
        "prompt": None, "negative_prompt": None, "num_inference_steps": 3, "height": 8, "width": 8,
        "use_resolution_binning": False,
        "prompt_embeds": torch.randn(1, 5, 12, generator=generator), "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 5, 12, generator=generator), "negative_prompt_attention_mask": mask,
        "generator": torch.Generator().manual_seed(7), "output_type": "pt",
    }  # fmt: skip
    with torch.no_grad():
        return pipe(**{**arguments, **more}).images


def test_the_picture_is_bitwise_the_same(pipe):
    original = pipe.transformer
    wanted = draw(pipe)
    steps = []
    runner = Recorder(ModuleRunner(original, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}))
    with insert(pipe, "transformer", runner, PIXART) as backbone:
        assert pipe.transformer is backbone and backbone.config is original.config
        got = draw(pipe, callback=lambda step, timestep, latents: steps.append(step), callback_steps=1)
    assert pipe.transformer is original
    assert torch.equal(got, wanted) and wanted.std() > 0
    assert steps == [0, 1, 2]
    assert len(backbone.seconds) == 3 and all(seconds > 0 for seconds in backbone.seconds)
    assert all(list(call) == [spec.name for spec in PIXART] for call in runner.calls)
    assert runner.calls[0]["hidden_states"].shape == (2, 4, 8, 8) and runner.calls[0]["timestep"].shape == (2,)


def test_batches_and_other_settings(pipe):
    original = pipe.transformer
    settings = {"guidance_scale": 1.0, "num_images_per_prompt": 2, "num_inference_steps": 2, "eta": 0.0}
    wanted = draw(pipe, **settings)
    with insert(pipe, "transformer", ModuleRunner(original), PIXART):
        assert torch.equal(draw(pipe, **settings), wanted)


def test_the_original_comes_back_after_an_error(pipe):
    original = pipe.transformer

    class Broken(Runner):
        def __call__(self, inputs):
            raise InputError("broken", "mend it")

    with pytest.raises(InputError, match="broken"), insert(pipe, "transformer", Broken(), PIXART):
        draw(pipe)
    assert pipe.transformer is original


def test_forward_answers_as_the_original(pipe):
    original = pipe.transformer
    runner = Recorder(ModuleRunner(original))
    backbone = EngineBackbone(original, runner, PIXART)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.tensor([5, 5])
    with torch.no_grad():
        wanted = original(x, text, t, encoder_attention_mask=torch.ones(2, 5), return_dict=False)[0]
    assert torch.equal(backbone(x, text, t).sample, wanted)  # the mask that is not given is made of ones
    assert torch.equal(backbone(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0], wanted)
    mask = runner.calls[0]["encoder_attention_mask"]
    assert mask.dtype == torch.int64 and mask.shape == (2, 5) and mask.all()
    assert backbone(x, text, torch.tensor(5)).sample.shape == (2, 8, 8, 8)
    assert runner.calls[-1]["timestep"].tolist() == [5, 5]
    assert not list(backbone.parameters())  # the original's weights are not held
    backbone.to(torch.float64)
    assert backbone.dtype == torch.float64 and backbone.device.type == "cpu"
    with backbone.cache_context("cond"):
        pass


def test_what_the_graph_cannot_honour_is_refused(pipe):
    backbone = EngineBackbone(pipe.transformer, ModuleRunner(pipe.transformer), PIXART)
    x, text, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.tensor([5])
    with pytest.raises(InputError, match="'scale'"):
        backbone(x, text, t, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(InputError, match="'attention_mask'"):
        backbone(x, text, t, attention_mask=torch.tensor([[1, 0]]))
    with pytest.raises(InputError, match="wants 'timestep'"):
        backbone(x, text)
    unmasked = EngineBackbone(pipe.transformer, ModuleRunner(pipe.transformer), PIXART[:3])
    assert unmasked(x, text, t, encoder_attention_mask=torch.ones(1, 5)).sample.shape == (1, 8, 8, 8)
    with pytest.raises(InputError, match="'encoder_attention_mask'"):
        unmasked(x, text, t, encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))


def test_a_unet_and_its_scalar_timestep():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip

    class Pipe:
        pass

    pipe = Pipe()
    pipe.unet = unet
    backbone = replace(pipe, "unet", ModuleRunner(unet), FAMILIES["stable-diffusion"].inputs(unet.config))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        wanted = unet(x, 11, text).sample
    assert torch.equal(pipe.unet(x, 11, text).sample, wanted)
    residual = [torch.zeros(2, 8, 8, 8)]
    with pytest.raises(InputError, match="'down_block_additional_residuals'"):
        backbone(x, 11, text, down_block_additional_residuals=residual)


@pytest.mark.parametrize(
    ("family", "configuration"),
    [("pixart", "pixart-tiny"), ("stable-diffusion", "sd-tiny"), ("stable-diffusion", "sdxl-tiny"), ("wan", "wan-tiny"),
     ("cogvideox", "cogvideox-tiny")],
)  # fmt: skip
def test_every_pipeline_takes_the_stand_in(family, configuration):
    """Pipelines ask their backbone for more than an answer; and an engine may be put where one is already."""
    model = FAMILIES[family].load(f"random:{configuration}")
    request = Request(["a red apple"], [3], steps=1)
    expected, original = model.generate(request), model.backbone
    named = NamedInputs(model.family, original)
    with insert(
        model.pipeline, model.family.backbone_attribute, ModuleRunner(named), model.family.inputs(model.backbone.config)
    ):
        made = simulate(model, original, request, batch=1)
    assert to_pixels(made).equal(to_pixels(expected)) and model.backbone is original
