"""Built-in recipes, and how recipes are read: YAML, with single entries overridden.

A name is looked up among the built-in recipes (the YAML files beside this), then as a path. ``--set a.b=value`` overrides single
entries; ``--budget`` and ``--density`` are short for some of them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

from qdiff.errors import InputError, UsageError, nearest, option, unknown_name
from qdiff.files import path_of, read_user_text
from qdiff.plan.ranges import DOCUMENTED, advice
from qdiff.plan.recipe import Recipe
from qdiff.plan.renamed import key_of_today

MOST_BYTES = 1_000_000  # of a recipe
EXAMPLE = "see qdiff/recipes/int8.yaml for an example"


def built_in() -> list[str]:
    """Return names of the recipes that come with qdiff."""
    folder = resources.files(__name__)
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe of that name (built in) or at that path, with overrides of the form ``a.b=value``.

    Raises:
        InputError: unknown name, unreadable YAML, unknown or wrong entries; says where and what is allowed.
        UsageError: a malformed override.
    """
    if name in built_in():
        text = (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).suffix in (".yaml", ".yml"):
        text = read_user_text(path_of(name), "the recipe", MOST_BYTES)
    else:
        raise unknown_name("recipe", name, built_in(), InputError)
    try:
        value = _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"recipe {name} is not valid YAML: {str(error)[:300]}", EXAMPLE) from None
    if not isinstance(value, dict):
        raise InputError(f"recipe {name} is not a group of settings", EXAMPLE)
    for assignment in overrides or []:
        chooser = next((key for key in ("mixed", "routing") if key in value), None)
        if assignment.startswith(("budget=", "mixed.", "routing.")):
            if chooser is None or not assignment.startswith(("budget=", f"{chooser}.")):
                raise UsageError(
                    f"recipe {name!r} chooses no formats that way, so it has no budget for {assignment.partition('=')[0]!r}",
                    f"use {option('recipe', 'mixed')}, or {option('recipe', 'routed')}",
                )
            assignment = f"{chooser}.{assignment}" if assignment.startswith("budget=") else assignment
        _override(value, assignment)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        fix = DOCUMENTED
        if first["type"] == "missing":
            fix = f"give it, for example with {option('settings', [f'{where}=…'])}"
        elif first["type"] == "extra_forbidden":
            known = _entries(Recipe, first["loc"][:-1])
            close = nearest(str(first["loc"][-1]), known)
            fix = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
        elif first["type"] != "value_error":  # a check of our own says it itself
            fix = advice(Recipe.model_json_schema(), first["loc"])
        raise InputError(": ".join(part for part in (f"recipe {name}", where, message) if part), fix) from None
    from qdiff.methods import check_options, check_reconstruction

    for method, options in recipe.methods.items():
        check_options(method, options)
    if recipe.sequential is not None and recipe.sequential.reconstruct is not None:
        check_reconstruction(recipe.sequential.reconstruct)
    return recipe


def _entries(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return names of the entries of a recipe's group, by its path."""
    for name in path:
        field = model.model_fields.get(str(name))
        groups = [] if field is None else [field.annotation, *get_args(field.annotation)]
        model = next((each for each in groups if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return list(model.model_fields)


def members_of(recipe: Recipe) -> list[Recipe | None]:
    """Return the recipes that a mixed one chooses from, each with its ``ignore``, ``kept``, ``floors`` and structure;
    ``None`` where a layer may stay in ``kept``.

    Raises:
        InputError: one that cannot be read, or chooses itself.
    """
    assert recipe.mixed is not None
    found: list[Recipe | None] = []
    for name in recipe.mixed.recipes:
        member = None if name == recipe.storage_dtype else _member(recipe, name)
        if member is not None and (member.distil or (member.sequential and member.sequential.reconstruct)):
            raise InputError(
                f"recipe {recipe.name!r}: {name!r} trains what is chosen from",
                "name recipes without distil and reconstruct",
            )
        found.append(member and member.model_copy(update={"sequential": None, "distil": None}))
    return found


def versions_of(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that a routed one changes between, each with its ``ignore``, ``kept``, ``floors`` and
    structure. Raises as :func:`members_of`.
    """
    assert recipe.routing is not None
    return [_member(recipe, name) for name in recipe.routing.recipes]


def _member(recipe: Recipe, name: str) -> Recipe:
    member = load_recipe(name)
    if member.scheme is None:
        raise InputError(
            f"recipe {recipe.name!r}: {name!r} chooses among others itself", "name recipes that have a scheme"
        )
    shared = ("ignore", "storage_dtype", "split_shortcuts", "first_token", "floors")
    return member.model_copy(update={key: getattr(recipe, key) for key in shared})


def budget_override(text: str) -> str:
    """Return the override of a budget, such as ``bits=5.5``.

    Raises:
        UsageError: another form, measure, or no number.
    """
    measure, _, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = -1.0
    if measure not in ("bits", "bytes", "latency") or not 0 < number < float("inf"):
        raise UsageError(
            f"{option('budget')} {text!r} is not bits=NUMBER, bytes=NUMBER or latency=MILLISECONDS",
            f"example: {option('recipe', 'mixed')} with {option('budget', 'bits=5.5')}",
        )
    return f"budget={{{measure}: {number!r}}}"


def density_override(density: float) -> str:
    """Return the override of a density.

    Raises:
        UsageError: not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise UsageError(
            f"{option('density', density)} is not above 0 and at most 1", "1 reads everything, 0.3 three blocks of ten"
        )
    return f"attention.density={density!r}"


def _override(value: dict[str, object], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UsageError(
            f"{option('settings')} {assignment!r} is not of the form a.b=value",
            f"example: {option('settings', ['methods.smooth.strengths=[0.5]'])}",
        )
    *parents, last = key_of_today(path).split(".")
    for parent in parents:
        if value.get(parent) is None:
            value[parent] = {}
        inner = value[parent]
        if not isinstance(inner, dict):
            raise UsageError(f"{option('settings')} {assignment!r}: {parent!r} is not a group of settings")
        value = inner
    try:
        value[last] = _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            f"{option('settings')} {assignment[:200]!r}: the value is not YAML ({str(error)[:200]})"
        ) from None


def _read_yaml(text: str) -> object:
    loader = _NoAliases(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _NoAliases(yaml.SafeLoader):
    """YAML without aliases, of which a few lines make more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not taken")
        return super().compose_node(parent, index)
