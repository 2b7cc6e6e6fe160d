"""Recipes and plans with any values in them: they are read and come back equal, or are refused with an error of qdiff."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdiff.errors import QdiffError
from qdiff.formats.table import FORMATS
from qdiff.plan.plan import Plan
from qdiff.plan.recipe import Recipe
from qdiff.recipes import built_in, load_recipe

quickly = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**12)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["int8", "Linear", "*", "pixart"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2) | SCALARS, inner, max_size=3),
    max_leaves=5,
)
LAYER = {
    "name": "a", "kind": "Linear", "shape": [8, 8], "weights": "int8", "activations": "int8",
    "group": "a", "methods": ["smooth"], "why": "x", "bias": True, "clip": 1.0,
}  # fmt: skip
PLAN: dict[str, Any] = {
    "family": "pixart", "weights": "bundled", "fingerprint": "0", "recipe": "int8", "config": {"a": 1},
    "backbone_class": "PixArtTransformer2DModel", "timesteps": [999.0, 500.0], "layers": [LAYER],
}  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every entry inside a value of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in inner for place in [(*path, key), *places(entry, (*path, key))]]


def changed(value: Any, place: tuple, new: Any) -> Any:
    """Return a copy of a value of JSON with another entry at one place."""
    result = inner = copy.deepcopy(value)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return result


def read_plan(path: Path, value: Any) -> Plan | None:
    """Read a plan with this content; ``None`` where it is refused."""
    path.write_text(json.dumps(value))
    try:
        return Plan.load(path)
    except QdiffError:
        return None


def comes_back(plan: Plan, path: Path) -> bool:
    plan.save(path)
    return Plan.load(path).model_dump_json() == plan.model_dump_json()


def test_the_plan_of_these_tests_is_one(tmp_path):
    plan = read_plan(tmp_path / "plan.json", PLAN)
    assert plan is not None and comes_back(plan, tmp_path / "again.json")


@quickly
@given(place=st.sampled_from(places(PLAN)), value=VALUES.filter(lambda value: not isinstance(value, dict)))
def test_a_plan_with_any_entry(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("x")
    plan = read_plan(folder / "plan.json", changed(PLAN, place, value))
    if plan is not None:
        assert comes_back(plan, folder / "again.json")


@quickly
@given(
    names=st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=4),
    formats=st.tuples(st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(FORMATS))),
    timesteps=st.lists(st.floats(0, 1000), max_size=4),
    shape=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
def test_every_plan_comes_back(tmp_path_factory, names, formats, timesteps, shape):
    layers = [
        LAYER | {"name": name, "shape": list(shape), "weights": formats[0], "activations": formats[1]} for name in names
    ]
    folder = tmp_path_factory.mktemp("x")
    plan = read_plan(folder / "plan.json", PLAN | {"layers": layers, "timesteps": timesteps})
    assert plan is not None and comes_back(plan, folder / "again.json")


RECIPES = {name: load_recipe(name).model_dump(mode="json", exclude_unset=True) for name in built_in()}


def read_recipe(path: Path, text: str, overrides: list[str] | None = None) -> Recipe | None:
    """Read a recipe with this text; ``None`` where it is refused."""
    path.write_text(text, encoding="utf-8")
    try:
        return load_recipe(str(path), overrides)
    except QdiffError:
        return None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_comes_back(tmp_path, name):
    assert read_recipe(tmp_path / "x.yaml", yaml.safe_dump(RECIPES[name])) == load_recipe(name)


@quickly
@given(data=st.data())
def test_a_recipe_with_any_entry(tmp_path_factory, data):
    value = RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]
    place = data.draw(st.sampled_from(places(value)))
    text = yaml.safe_dump(changed(value, place, data.draw(VALUES)))
    path = tmp_path_factory.mktemp("x") / "x.yaml"
    recipe = read_recipe(path, text)
    if recipe is not None:
        again = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True))
        assert read_recipe(path, again) == recipe


@quickly
@given(
    text=st.text(max_size=60) | VALUES.map(yaml.safe_dump),
    override=st.text(max_size=12)
    | st.builds("{}={}".format, st.sampled_from(["kept", "scheme.weights", "a.b"]), SCALARS),
)
def test_any_text_is_a_recipe_or_refused(tmp_path_factory, text, override):
    path = tmp_path_factory.mktemp("x") / "x.yaml"
    read_recipe(path, text.encode("utf-8", "replace").decode())
    read_recipe(path, yaml.safe_dump(RECIPES["int8"]), [override])
