"""The contract of every model family, on its smallest configuration; and what loading refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff.calib.record import joined
from qdiff.errors import InputError, IntegrityError, UsageError
from qdiff.evaluation.images import to_pixels
from qdiff.models import FAMILIES
from qdiff.models.base import NamedInputs
from qdiff.models.loading import bundled_folder
from qdiff.models.model import Model, Request
from qdiff.models.schedulers import schedulers_for

SMALLEST = {name: next(name for name in FAMILIES[name].configurations if name.endswith("-tiny")) for name in FAMILIES}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request) -> Model:
    return FAMILIES[request.param].load(f"random:{SMALLEST[request.param]}")


def watched(model: Model, request: Request) -> tuple[list, list, list]:
    """Pictures of a request, with the inputs and outputs of every backbone call."""
    calls, outputs = [], []
    hooks = [
        model.backbone.register_forward_pre_hook(
            lambda m, a, k: calls.append({n: t.clone() for n, t in model.family.capture(a, k).items()}),
            with_kwargs=True,
        ),
        model.backbone.register_forward_hook(lambda m, a, output: outputs.append(output[0].clone())),
    ]
    try:
        made = model.generate(request)
    finally:
        for hook in hooks:
            hook.remove()
    if model.family.branches_apart and model.guidance(request.guidance) > 1:
        timesteps = [float(call["timestep"][0]) for call in calls]
        pairs = [{"output": output} for output in outputs]
        calls = joined(timesteps, calls)[1]
        outputs = [pair["output"] for pair in joined(timesteps, pairs)[1]]
    return made, calls, outputs


def test_captures_and_replays_its_backbones_calls_to_equal_numbers(model):
    family, config = model.family, model.backbone.config
    request = Request(["a red apple", "a rocket"], [3, 4], "blurry", steps=2, guidance=4.0)
    images, calls, outputs = watched(model, request)
    assert len(images) == 2 and len(calls) == 2
    specs = family.inputs(config)
    wrapped = NamedInputs(family, model.backbone)
    exported = family.for_export(model.backbone)
    for call, output in zip(calls, outputs, strict=True):
        assert set(call) == {spec.name for spec in specs}
        named: dict[str, int] = {}
        for spec in specs:
            assert call[spec.name].dtype == spec.dtype and call[spec.name].dim() == len(spec.axes)
            for axis, size in zip(spec.axes, call[spec.name].shape, strict=True):  # an axis has one size everywhere
                assert named.setdefault(axis, size) == size if isinstance(axis, str) else axis == size
        assert named["batch"] == 4, "both branches of guidance"
        with torch.inference_mode():
            replayed = family.call(model.backbone, call)
            # calls that were two are one in a recording: a matrix product of more rows may round otherwise
            assert torch.allclose(replayed, output, atol=1e-5 * family.branches_apart, rtol=0)
            assert torch.equal(wrapped(*(call[spec.name] for spec in specs)), replayed)
            assert torch.equal(wrapped(**call), replayed)
            assert torch.allclose(exported(*(call[spec.name] for spec in specs)), output, atol=1e-5)
        assert output.shape == tuple(named[a] if isinstance(a, str) else a for a in family.output_axes(config))
    constant = [spec.name for spec in specs if not spec.varies]
    assert all(torch.equal(calls[0][name], calls[1][name]) for name in constant)
    latent = specs[0].name
    assert not torch.equal(calls[0][latent], calls[1][latent])


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(model):
    import numpy as np

    both = model.generate(Request(["a red apple", "a rocket"], [3, 4], steps=2))
    alone = model.generate(Request(["a rocket"], [4], steps=2))[0]
    other = model.generate(Request(["a rocket"], [5], steps=2))[0]
    pixels = [to_pixels([image]).numpy().astype(int) for image in (both[1], alone, other)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert np.abs(pixels[1] - pixels[2]).max() > 1


def test_the_callback_sees_every_step_and_can_stop(model):
    seen: list[tuple[int, float]] = []
    model.generate(Request(["x"], [0], steps=3), on_step=lambda step, t, latents: seen.append((step, t)))
    assert [step for step, _ in seen] == [0, 1, 2] and [t for _, t in seen] == sorted(
        (t for _, t in seen), reverse=True
    )

    def stop(step, t, latents):
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        model.generate(Request(["x"], [0], steps=3), on_step=stop)


def test_settings_of_sampling_are_the_users_the_weights_or_the_familys(model):
    assert model.steps(7) == 7 and model.guidance(0.0) == 0.0
    assert model.steps() == model.family.default_steps >= 1 and model.guidance() == model.family.default_guidance >= 0
    own = replace(model, defaults={**model.defaults, "num_inference_steps": 3, "guidance_scale": 1.0})
    assert own.steps() == 3 and own.guidance() == 1.0 and own.steps(7) == 7
    _, calls, _ = watched(own, Request(["x"], [0]))
    assert len(calls) == 3 and len(calls[0]["timestep"]) == 1, "the pipeline samples with what the model says"


def test_schedulers_by_name(model):
    before = model.pipeline.scheduler
    offered = {
        alias: scheduler
        for alias, scheduler in schedulers_for(before).items()
        if alias in ("dpmsolver++", "ddim", "euler", "unipc")
    }
    assert offered
    for alias, scheduler in offered.items():
        try:
            model.use_scheduler(alias)
            assert type(model.pipeline.scheduler).__name__ == scheduler.__name__
            assert len(model.generate(Request(["x"], [0], steps=2))) == 1
        finally:
            model.pipeline.scheduler = before


def test_a_requests_scheduler_is_its_own(model):
    """The next request has the model's again."""
    own, usable = model.pipeline.scheduler, schedulers_for(model.pipeline.scheduler)
    alias = next(
        alias for alias in ("unipc", "dpmsolver++", "ddim") if alias in usable and usable[alias] is not type(own)
    )
    seen = []
    model.generate(
        Request(["a"], [0], steps=1, scheduler=alias), lambda *_: seen.append(type(model.pipeline.scheduler))
    )
    assert seen == [usable[alias]] and model.pipeline.scheduler is own


def test_an_unknown_scheduler_gets_the_nearest_names(model):
    with pytest.raises(UsageError, match=r"did you mean .*dpmsolver\+\+"):
        model.use_scheduler("dpmsolver+")


def test_a_family_says_whether_its_attentions_can_follow_lists(model):
    known = model.family.self_attentions(model.backbone)
    assert model.family.can_be_sparse == bool(known)
    assert all(model.backbone.get_submodule(name) is not None for name in known)


@pytest.mark.parametrize(("height", "width"), [(8, None), (None, 100), (0, 64), (-16, 64)])
def test_sizes_that_cannot_be_cut_into_patches(model, height, width):
    with pytest.raises(UsageError, match=f"does not divide by {model.family.size_divisor}"):
        model.generate(Request(["x"], [0], steps=1, height=height, width=width))


def test_random_weights_are_those_of_their_seed(tiny):
    family = FAMILIES["pixart"]
    states = [family.load("random:pixart-tiny", seed=seed) for seed in (0, 0, 1)]
    first, same, other = (dict(model.backbone.named_parameters())["proj_out.weight"] for model in states)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert states[0].fingerprint == states[1].fingerprint != states[2].fingerprint
    state = torch.get_rng_state()
    tiny()
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are not touched"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The smallest PixArt as a diffusers folder."""
    folder = tmp_path_factory.mktemp("saved") / "pixart"
    FAMILIES["pixart"].load("random:pixart-tiny").pipeline.save_pretrained(folder)
    return folder


def test_a_saved_folder_loads_to_the_same_pictures(saved, tiny):
    loaded = FAMILIES["pixart"].load(str(saved))
    request = Request(["a red apple"], [3], steps=2)
    assert loaded.generate(request)[0].tobytes() == tiny().generate(request)[0].tobytes()
    assert len(loaded.fingerprint) == 64 and str(saved) in loaded.note


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def poison(path: Path, value: float) -> None:
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith("to_q.weight"))[0, 0] = value
    save_file(tensors, path, {"format": "pt"})


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "NaN": (lambda f: poison(f / WEIGHTS, float("nan")), InputError, "to_q.weight .* holds 1 NaN"),
    "infinity": (lambda f: poison(f / WEIGHTS, float("inf")), InputError, "to_q.weight .* holds 1 NaN or infinite"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), InputError, "cannot load"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), InputError, "cannot load"),
    "no index": (lambda f: (f / "model_index.json").unlink(), InputError, "not a diffusers folder"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), IntegrityError, "not valid JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), InputError, "holds a None"),
    "another family": (
        lambda f: edit_json(f / "model_index.json", lambda v: v.update(_class_name="StableDiffusionPipeline")),
        InputError,
        "holds a StableDiffusionPipeline, not one of pixart",
    ),
    "own code": (
        lambda f: edit_json(f / "model_index.json", lambda v: v.update(vae=["my_module", "MyVAE"])),
        IntegrityError,
        "brings its own code",
    ),
    "empty component": (
        lambda f: edit_json(f / "model_index.json", lambda v: v.update(vae=[])),
        InputError,
        "cannot load",
    ),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "transformer/diffusion_pytorch_model.bin"),
        InputError,
        "cannot load",
    ),
    "config of another size": (
        lambda f: edit_json(f / "transformer/config.json", lambda v: v.update(num_layers=3)),
        InputError,
        r"cannot load|lacks the weight transformer_blocks\.2",
    ),
    "broken defaults": (lambda f: (f / "generation.json").write_text("[1]"), IntegrityError, "generation.json"),
}


@pytest.mark.parametrize("how", sorted(DAMAGES))
def test_a_damaged_or_foreign_folder_is_refused(saved, tmp_path, how):
    damage, error, message = DAMAGES[how]
    folder = tmp_path / "weights"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        FAMILIES["pixart"].load(str(folder))
    assert len(str(caught.value).splitlines()) <= 2 and len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", "cannot load PixArt-alpha/PixArt-Sigma-XL-2-512-MS from the Hub"),
        ("random:pixart-tine", "did you mean pixart-tiny"),
        ("random:", "unknown configuration"),
        ("/no/such/folder", "no weights '/no/such/folder'"),
        ("bundeld", "random:pixart-tiny|pixart-tiny"),
    ],
)
def test_weights_that_are_not_there(weights, message):
    with pytest.raises(InputError) as caught:
        FAMILIES["pixart"].load(weights)
    assert any(part in str(caught.value) for part in message.split("|"))


@pytest.mark.slow
def test_the_bundled_wan_makes_a_clip_that_moves():
    model = FAMILIES["wan"].load()
    clip = model.generate(Request(["a rocket moves up on a black background"], [0], steps=4))[0]
    assert clip.frames.shape == (33, 64, 64, 3)
    assert clip.frames[0].std() > 5 and abs(clip.frames[0].astype(float) - clip.frames[-1]).mean() > 1
    assert sum(file.stat().st_size for file in bundled_folder("wan").rglob("*") if file.is_file()) < 20e6


def test_the_bundled_model_loads_and_makes_a_picture():
    model = FAMILIES["pixart"].load()
    image = model.generate(Request(["a rocket on a blue background"], [0], steps=2))[0]
    assert image.size[0] >= 64 and image.size[0] == image.size[1]
    assert sum(file.stat().st_size for file in bundled_folder("pixart").rglob("*") if file.is_file()) < 40e6
