"""Recipes and plans: what is checked before anything runs, and what a hand that edited them gets to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from qdiff.errors import InputError, IntegrityError, UsageError
from qdiff.files import open_tensors, read_json, save_tensors
from qdiff.models import FAMILIES
from qdiff.models.layers import quantizable_layers
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.recipes import __file__ as RECIPES
from qdiff.recipes import built_in, load_recipe

MINIMAL = {"version": 1, "name": "mine", "scheme": {"weights": "int8", "activations": "int8"}}


SMALLEST = {
    family: next(name for name in FAMILIES[family].configurations if name.endswith("-tiny")) for family in FAMILIES
}


@pytest.fixture(scope="module")
def layers_of() -> dict[str, list[str]]:
    """The layers of every family's smallest model that can be quantized."""
    backbones = {family: FAMILIES[family].load(f"random:{SMALLEST[family]}").backbone for family in FAMILIES}
    return {family: list(quantizable_layers(backbone)) for family, backbone in backbones.items()}


def linear_names(tiny) -> list[str]:
    return [name for name, module in tiny().backbone.named_modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_recipe_validates_and_fits_the_families_that_it_names(name, layers_of):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert set(FAMILIES) >= set(recipe.ignore) >= set(recipe.quantize_outputs)
    for family in recipe.ignore:
        names = layers_of[family]
        ignored, outputs = recipe.ignored(family, names), recipe.with_output(family, names)
        assert 0 < len(ignored) < len(names) and not ignored.keys() & outputs.keys()
        assert all(ignored[layer] in recipe.ignore[family] for layer in ignored)


def test_int8_token_is_int8_gptq_with_scales_by_token_allowed():
    recipe, constant = load_recipe("int8-token"), load_recipe("int8-gptq")
    same = ("scheme", "ignore", "sequential", "targets", "storage_dtype")
    assert all(getattr(recipe, name) == getattr(constant, name) for name in same)
    assert recipe.methods == {**constant.methods, "dgq": {"tokens": True}} and not recipe.quantize_outputs
    assert list(recipe.methods).index("dgq") == list(recipe.methods).index("smooth") + 1, "before codes are chosen"
    assert set(recipe.ignore) == set(FAMILIES)


def test_the_int8_recipe_keeps_what_the_field_keeps(tiny):
    ignored = load_recipe("int8").ignored("pixart", linear_names(tiny))
    assert {"adaln_single", "caption_projection", "proj_out"} <= {name.split(".")[0] for name in ignored}
    assert sum(name.startswith("transformer_blocks") for name in ignored) <= 1, "blocks are what is quantized"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheem": {}}, ["scheem", "did you mean scheme"]),
        ({"scheme": {"weights": "int7", "activations": "int8"}}, ["scheme.weights", "unknown format 'int7'", "int8"]),
        ({"scheme": {"weights": "int8"}}, ["scheme.activations"]),
        ({"version": 2}, ["version"]),
        ({"storage_dtype": "float64"}, ["storage_dtype"]),
        ({"targets": ["Conv3d"]}, ["targets"]),
        ({"targets": []}, ["targets"]),
        ({"ignore": ["proj_out"]}, ["ignore"]),
        ({"methods": {"smoth": {}}}, ["smoth", "did you mean smooth"]),
        ({"methods": {"smooth": {"strength": [0.5]}}}, ["'strength'", "did you mean strengths"]),
    ],
)
def test_a_wrong_recipe_says_where_and_what_is_allowed(tmp_path, change, words):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert load_recipe(str(path)).name == "mine"
    path.write_text(yaml.safe_dump({**MINIMAL, **change}))
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "methods.smooth.strengths=[]", "methods.smooth.strengths=high", "methods.smooth.strengths=[2]",
        "methods.clip.ratios=[]", "methods.clip.ratios=0.5", "methods.clip.ratios=[0]", "methods.clip.ratios=[.nan]",
        "methods.timestep_scales.minimum_gain_db=much",
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_methods_option_is_an_input_error(setting):
    with pytest.raises(InputError, match=setting.split("=")[0].split(".")[1]):
        load_recipe("int8", [setting])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n", "\x00", "!!python/object/apply:os.system [echo]\n"])
def test_what_is_no_recipe_at_all(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="mine.yaml"):
        load_recipe(str(path))


def test_unknown_recipes_files_and_patterns_get_the_nearest_names(tmp_path, tiny):
    with pytest.raises(InputError, match="did you mean int8"):
        load_recipe("int88")
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError):
            load_recipe(str(path.with_suffix(".yaml")))
    recipe = load_recipe("int8", ['ignore.pixart=["transformer_blocks.9.attn1.to_q"]'])
    with pytest.raises(InputError, match=r"nearest layers: transformer_blocks\.\d\.attn1\.to_q"):
        recipe.ignored("pixart", linear_names(tiny))


def test_set_changes_single_entries():
    recipe = load_recipe(
        "int8", ["methods.smooth.strengths=[0.5]", "storage_dtype=bfloat16", "methods.smooth.minimum_gain_db=2"]
    )
    assert recipe.methods["smooth"]["strengths"] == [0.5] and recipe.storage_dtype == "bfloat16"
    assert recipe.methods["smooth"]["minimum_gain_db"] == 2 and recipe.methods["timestep_scales"]["minimum_gain_db"]
    for wrong in ("storage_dtype", "=bfloat16", "storage_dtype.deeper=1", "name=[1"):
        with pytest.raises(UsageError, match="settings="):
            load_recipe("int8", [wrong])


def test_recipes_are_read_by_the_names_of_the_last_release(tmp_path):
    new = (Path(RECIPES).parent / "int8.yaml").read_text()
    old = new.replace("storage_dtype: float16", "kept: bfloat16").replace("quantize_outputs:", "outputs:")
    assert old.count("kept:") == old.count("outputs:") == 1
    (tmp_path / "old.yaml").write_text(old.replace("activations: int8}", "activations: int8, by_token: true}"))
    recipe = load_recipe(str(tmp_path / "old.yaml"))
    assert recipe.storage_dtype == "bfloat16" and recipe.scheme is not None and recipe.scheme.per_token
    assert recipe.quantize_outputs == load_recipe("int8").quantize_outputs != {}
    changed = load_recipe("int8", ["kept=bfloat16", "outputs={}", "scheme.by_token=true"])
    assert changed == load_recipe("int8", ["storage_dtype=bfloat16", "quantize_outputs={}", "scheme.per_token=true"])


def test_plans_and_tensors_are_read_by_the_names_of_the_last_release(finished, tmp_path):
    value = json.loads((finished.path / "plan.json").read_text())
    value["kept"] = value.pop("storage_dtype")
    for layer in value["layers"]:
        layer["by_token"], layer["multiplier"] = layer.pop("per_token"), layer.pop("input_multiplier")
    (tmp_path / "plan.json").write_text(json.dumps(value))
    old = {"input_multiplier": "multiplier", "timestep_scales": "timestep_scale"}
    with open_tensors(finished.path / "model.safetensors", "test") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    renamed = {
        ".".join([*name.split(".")[:-1], old.get(name.split(".")[-1], name.split(".")[-1])]): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_tensors(tmp_path / "model.safetensors", renamed, {})
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == Plan.load(finished.path / "plan.json")
    states = [load_quantized(plan, folder / "model.safetensors").state_dict() for folder in (tmp_path, finished.path)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def edit(plan: dict, how: str) -> None:
    layer = next(layer for layer in plan["layers"] if layer["weights"] == "int8")
    match how:
        case "unknown format":
            layer["weights"] = "int7"
        case "duplicate":
            plan["layers"].append(layer)
        case "missing field":
            del layer["shape"]
        case "extra field":
            layer["bits"] = 8
        case "wrong type":
            plan["timesteps"] = "all"
        case "wrong version":
            plan["version"] = 99
        case "layers gone":
            del plan["layers"]
        case "unknown kept":
            plan["storage_dtype"] = "float8"
        case "unknown layer":
            layer["name"] = "transformer_blocks.0.attn9.to_q"
        case "other shape":
            layer["shape"] = [3, 3]
        case "fewer layers":
            plan["layers"].remove(layer)
        case "not a linear layer":
            layer["name"] = "transformer_blocks.0.norm1"
        case "unknown class":
            plan["backbone_class"] = "torch"
        case "another class":
            plan["backbone_class"] = "UNet2DConditionModel"
        case "another config":
            plan["config"]["num_layers"] = 1
        case "nonsense config":
            plan["config"]["num_attention_heads"] = "many"
        case "another format":
            layer["weights"] = layer["activations"] = "float16"
        case "fewer timesteps":
            plan["timesteps"].pop()


BY_ITSELF = ["unknown format", "duplicate", "missing field", "extra field", "wrong type", "wrong version", "layers gone",
             "unknown kept"]  # fmt: skip
WITH_TENSORS = ["unknown layer", "other shape", "fewer layers", "not a linear layer", "unknown class", "another class",
                "another config", "nonsense config", "another format", "fewer timesteps"]  # fmt: skip


@pytest.mark.parametrize("how", BY_ITSELF)
def test_a_plan_edited_by_hand_is_refused_in_one_sentence(finished, tmp_path, how):
    value = json.loads((finished.path / "plan.json").read_text())
    edit(value, how)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match="plan.json") as caught:
        Plan.load(path)
    assert len(caught.value.message) < 400 and caught.value.fix


@pytest.mark.parametrize("how", WITH_TENSORS)
def test_a_plan_that_does_not_fit_its_tensors_is_refused(finished, how):
    from qdiff.quantization.checkpoint import load_quantized

    value = json.loads((finished.path / "plan.json").read_text())
    edit(value, how)
    with pytest.raises(IntegrityError):
        load_quantized(Plan.model_validate(value), finished.path / "model.safetensors")


def test_a_plan_comes_back_from_its_file(finished, tmp_path: Path):
    plan = Plan.load(finished.path / "plan.json")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert read_json(tmp_path / "plan.json", "the plan") == read_json(finished.path / "plan.json", "the plan")
    assert all(layer.why for layer in plan.layers)
    assert all(layer.sqnr_db is not None and layer.group for layer in plan.quantized)


def test_bytes_of_the_67m_model_fit_the_bound_before_it_is_ever_exported():
    """The packed checkpoint of the recipe is below 0.30 of float32 (from shapes alone: nothing is allocated)."""
    import accelerate
    import torch
    from diffusers import PixArtTransformer2DModel

    from qdiff.models.pixart import _CONFIGURATIONS
    from qdiff.plan.plan import LayerPlan

    config = _CONFIGURATIONS["pixart-67m"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    with accelerate.init_empty_weights():
        backbone = PixArtTransformer2DModel(cross_attention_dim=width, use_additional_conditions=False, **config)
    recipe = load_recipe("int8")
    layers = {name: module for name, module in backbone.named_modules() if type(module) is torch.nn.Linear}
    ignored = recipe.ignored("pixart", list(layers))
    float_bytes = 4 * sum(parameter.numel() for parameter in backbone.parameters())
    packed = float_bytes / 2  # everything in 16 bit, and then
    for name, module in layers.items():
        if name not in ignored:
            plan = LayerPlan(
                name=name,
                kind="Linear",
                shape=tuple(module.weight.shape),
                bias=True,
                weights="int8",
                activations="int8",
            )
            packed += plan.weight_bytes() - 2 * module.weight.numel()
    assert 0.25 < packed / float_bytes <= 0.30


@pytest.mark.parametrize(
    ("recipe", "setting", "words"),
    [
        ("int8", "floors.layer=.nan", "a number from -100 to 100"),
        ("int8", "attention.density=nan", "a number above 0 and at most 1"),
        ("int8-gptq", "sequential.tokens=3", "a whole number from 16 to 1,000,000"),
        ("int8", "storage_dtype=nan", "'float16' or 'bfloat16'"),
        ("int8", "methods.smooth.strengths=[2]", "a list, each entry a number above 0 and at most 1"),
        ("int8", "methods.low_rank.rank=x", "a whole number at least 1"),
        ("int8", "targets=[x]", "'Linear' or 'Conv2d'"),
        ("int8", "scheme=3", "a group of settings or null"),
        ("int8", "first_token=2", "true or false"),
        ("mixed", "budget={bits: .nan}", "no positive number"),
    ],
)
def test_a_value_out_of_range_is_answered_with_the_range(recipe, setting, words):
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, [setting])
    assert words in str(caught.value) and "docs/recipes/index.md" in str(caught.value)
