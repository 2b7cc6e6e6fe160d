"""Folders as people publish them: they load, or are refused by the name of what is wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff.errors import InputError, IntegrityError, UsageError
from qdiff.events import log
from qdiff.models import FAMILIES
from qdiff.models.folders import choose_variant, files_that_count, weight_files
from qdiff.models.model import Request
from tests.published_folders import edit_json, edit_weights

FAMILY = {"alpha_1024": "pixart", "vae_lacks_a_weight": "pixart", "vae_gives_nan": "pixart", "plain": "pixart"}


def load(folder: Path, family: str = "stable-diffusion"):
    return FAMILIES[family].load(str(folder))


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_the_safety_checker_is_left_out_and_said_so(published, said):
    model = load(published("safety_checker"))
    assert model.pipeline.safety_checker is None and model.pipeline.feature_extractor is None
    assert "safety checker is left out" in said.text
    assert len(model.generate(Request(["x"], [0], steps=2))) == 1


@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("vae", ["my_module", "MyVAE"]),
        ("vae", ["stable_diffusion", "MyVAE"]),  # the module is diffusers', the class is not in it
        ("vae", ["stable_diffusion.pipeline_stable_diffusion", "StableDiffusionPipeline"]),
        ("vae", ["os", "path"]),
        ("safety_checker", ["my_module", "Checker"]),  # also where it would not be loaded
        ("feature_extractor", ["my_module", "Extractor"]),
        ("_class_name", ["pipeline", "MyPipeline"]),
    ],
)
def test_what_remote_code_would_have_to_be_trusted_for_is_refused(published, tmp_path, component, value):
    folder = copied(published("safety_checker"), tmp_path / "own")
    edit_json(folder / "model_index.json", lambda index: index.update({component: value}))
    with pytest.raises(IntegrityError, match="brings its own code"):
        load(folder)


def test_an_auto_class_with_code_beside_it_is_refused(published, tmp_path):
    folder = copied(published("plain"), tmp_path / "own")
    edit_json(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoModel"]))
    edit_json(folder / "vae" / "config.json", lambda config: config.update(auto_map={"AutoModel": "vae.MyVAE"}))
    with pytest.raises(IntegrityError, match=r"'vae'.*brings its own code"):
        load(folder, "pixart")


def test_a_class_that_the_library_does_not_have_is_named(published, tmp_path):
    folder = copied(published("plain"), tmp_path / "newer")
    edit_json(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoencoderOfTomorrow"]))
    with pytest.raises(InputError, match="a AutoencoderOfTomorrow, which diffusers .* cannot load"):
        load(folder, "pixart")


COMPONENTS = [("stable-diffusion", part) for part in ("unet", "vae", "text_encoder")] + [("pixart", "text_encoder")]


@pytest.mark.parametrize(("family", "component"), COMPONENTS)
@pytest.mark.parametrize("how", ["missing", "NaN", "extra"])
def test_every_component_is_whole_and_finite(published, tmp_path, said, family, component, how):
    folder = copied(published("pndm" if family == "stable-diffusion" else "plain"), tmp_path / "weights")
    key = ""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal key
        key = next(name for name, tensor in tensors.items() if tensor.dim() == 1)
        if how == "missing":
            tensors.pop(key)
        elif how == "NaN":
            tensors[key][0] = float("nan")
        else:
            tensors["nobody.reads.this"] = torch.zeros(3)

    edit_weights(folder / component, spoil)
    if how == "extra":
        assert load(folder, family).generate(Request(["x"], [0], steps=1))
        assert (
            f"the {component} of" in said.text and "does not use 1 weights of its file: nobody.reads.this" in said.text
        )
        return
    with pytest.raises(InputError) as caught:
        load(folder, family)
    assert component in caught.value.message and key.rpartition(".")[2] in caught.value.message
    assert ("lacks the weight" if how == "missing" else "NaN or infinite") in caught.value.message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_weight_that_a_shard_lacks_is_missed(published, tmp_path, component):
    folder = copied(published("sharded_variant"), tmp_path / "weights")
    assert load(folder).variants["unet"] == "fp16"
    shard = sorted((folder / component).glob("*-of-*.safetensors"))[1]
    tensors = load_file(shard)
    key = sorted(tensors)[0]
    tensors.pop(key)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match=rf"the {component} of .* lacks the weight"):
        load(folder)


@pytest.mark.parametrize("family", ["pixart", "stable-diffusion", "wan"])
def test_tied_weights_are_no_missing_ones(family, said):
    """T5 and UMT5 save their embedding once and read it twice."""
    model = FAMILIES[family].load()
    assert "does not use" not in said.text
    if family != "stable-diffusion":
        encoder = model.pipeline.text_encoder
        assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_weights_in_files_of_a_variant_load(published, said):
    model = load(published("fp16_variant"))
    assert model.variants == {"unet": "fp16", "vae": "fp16", "text_encoder": "fp16"} and "read are fp16" in said.text
    plain = load(published("pndm"))
    for name, weight in plain.backbone.state_dict().items():
        assert torch.equal(weight, model.backbone.state_dict()[name]), (
            "the names say fp16, the saved numbers are float32"
        )


def test_the_plain_set_of_weights_goes_before_a_variant_and_alone_counts(published, tmp_path):
    folder = copied(published("plain"), tmp_path / "weights")
    before = load(folder, "pixart")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save_file(zeros, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    after = load(folder, "pixart")
    assert after.variants == {} and after.fingerprint == before.fingerprint
    assert after.backbone.state_dict()["proj_out.weight"].abs().sum() > 0


def test_names_of_weight_files():
    names = [
        "model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "model-00001-of-00002.safetensors", "lora.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors", "model.safetensors.index.json", "config.json",
    ]  # fmt: skip
    found = weight_files(names)
    assert {variant: len(files) for variant, files in found.items()} == {"": 2, "fp16": 2, "bf16": 1, "non_ema": 1}
    assert choose_variant(found) == "" and choose_variant(["bf16", "fp16", "non_ema"]) == "fp16"
    assert choose_variant(["non_ema"]) == "non_ema"


def test_files_of_a_repository_that_count():
    names = [
        "model_index.json", "v1-5-pruned.safetensors", "README.md", "safety_checker/model.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin", "tokenizer/merges.txt", "text_encoder/model.fp16.safetensors",
    ]  # fmt: skip
    assert files_that_count(names) == [
        "model_index.json", "text_encoder/model.fp16.safetensors", "tokenizer/merges.txt", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_pickles_are_refused_with_the_way_to_safetensors(published, tmp_path):
    """The advice is carried out, word for word."""
    with pytest.raises(InputError, match=r"has no safetensors but \w+\.bin") as caught:
        load(published("bin_files"))
    code = caught.value.fix.split("in Python: ")[1].split("; then use")[0].replace("'NEW'", repr(str(tmp_path / "new")))
    exec(code, {})
    assert load(tmp_path / "new").generate(Request(["x"], [0], steps=1))


def test_a_folder_of_another_family_names_the_one_that_takes_it(published):
    with pytest.raises(InputError, match="holds a PixArtSigmaPipeline") as caught:
        load(published("plain"))
    assert 'source="pixart"' in caught.value.fix


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("nine_channels", "reads 9 channels.* 4 of its latents"), ("class_embedding", "reads class labels")],
)
def test_what_the_pipeline_does_not_give_is_said_at_once(published, name, lacks):
    with pytest.raises(InputError, match=lacks):
        load(published(name))


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        ({"encoder_hid_dim": 64, "encoder_hid_dim_type": "image_proj"}, "pictures beside its text"),
        ({"addition_embed_type": "image", "cross_attention_dim": 64, "encoder_hid_dim": 64}, "image embeddings"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "pooled text and picture sizes",
        ),
        ({"cross_attention_dim": 48}, "states of width 64, and its backbone reads 48"),
    ],
)
def test_a_unet_that_reads_more_than_the_pipeline_gives(tmp_path, config, lacks):
    from tests.published_folders import stable_diffusion

    stable_diffusion(tmp_path / "weights", config)
    with pytest.raises(InputError, match=lacks):
        load(tmp_path / "weights")


def test_sizes_that_pixart_sigma_does_not_give(tmp_path):
    from tests.published_folders import pixart

    pixart(
        tmp_path / "weights", {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 48}
    )
    with pytest.raises(InputError, match="resolution and aspect ratio, which PixArtSigmaPipeline"):
        load(tmp_path / "weights", "pixart")


def test_what_a_config_leaves_open_is_what_the_module_decided(published):
    model = load(published("alpha_1024"), "pixart")
    assert model.backbone.config.use_additional_conditions is True
    assert [spec.name for spec in model.family.inputs(model.backbone.config)][-2:] == ["resolution", "aspect_ratio"]
    assert json.loads(model.backbone.to_json_string())["use_additional_conditions"] is True, "plans hold the same"


@pytest.mark.parametrize("entry", [{"out_channels": None}, {"caption_channels": None}])
def test_other_entries_that_pixart_leaves_open(tmp_path, entry):
    from tests.published_folders import pixart

    folder = tmp_path / "weights"
    if "caption_channels" in entry:  # states as wide as the model are not projected
        pixart(folder, {**entry, "num_attention_heads": 3, "cross_attention_dim": 48})
    else:
        pixart(folder, {"out_channels": 4})
        edit_json(folder / "transformer" / "config.json", lambda config: config.update(entry))
    model = load(folder, "pixart")
    family, config = model.family, model.backbone.config
    assert family.output_axes(config)[1] in (4, 8)
    assert family.inputs(config)[1].axes[-1] == 48
    assert all(model.backbone.get_submodule(name) is not None for name in family.masked_layers(model.backbone))
    assert model.generate(Request(["x"], [0], steps=1))


def test_a_unet_without_a_sample_size_draws(tmp_path):
    from tests.published_folders import stable_diffusion

    stable_diffusion(tmp_path / "weights", {"sample_size": None})
    model = load(tmp_path / "weights")
    assert model.generate(Request(["x"], [0], steps=1, height=128, width=128))[0].size == (128, 128)
    assert model.backbone.config.sample_size == 64


def test_a_unet_without_a_middle_has_blocks_all_the_same(published):
    model = load(published("no_mid_block"))
    blocks = model.family.blocks(model.backbone)
    assert blocks and not any(name.startswith("mid_block") for name in blocks)
    assert all(model.backbone.get_submodule(name) is not None for name in blocks)


def test_the_scale_of_guidance_as_an_input(published):
    """LCM's U-Net reads it, so there is one branch and a further input."""
    from qdiff.models.base import NamedInputs
    from qdiff.models.parts import captured

    model = load(published("lcm_distilled"))
    calls, answers = [], []
    hooks = [
        model.backbone.register_forward_pre_hook(lambda m, a, k: calls.append(captured(model, a, k)), with_kwargs=True),
        model.backbone.register_forward_hook(lambda m, a, out: answers.append(out[0])),
    ]
    model.generate(Request(["x", "y"], [0, 1], steps=2, guidance=8.0))
    for hook in hooks:
        hook.remove()
    assert not model.guided(8.0) and len(calls[0]["timestep"]) == 2
    assert calls[0]["timestep_cond"].shape == (2, 16)
    with torch.inference_mode():
        assert torch.equal(NamedInputs(model.family, model.backbone)(**calls[0]), answers[0])


@pytest.mark.parametrize("weights", ["bundled", "random:sd-tiny", "folder"])
def test_a_revision_of_weights_that_have_none(published, weights):
    named = str(published("pndm")) if weights == "folder" else weights
    with pytest.raises(UsageError, match='revision="main"'):
        FAMILIES["stable-diffusion"].load(named, revision="main")
