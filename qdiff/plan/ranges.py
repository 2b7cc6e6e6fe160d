"""What a setting of a recipe takes, in words, from the type that it is checked against."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.json_schema import JsonSchemaValue as Schema

DOCUMENTED = "docs/recipes/index.md says what it takes"
_SIMPLE = {"boolean": "true or false", "string": "a text", "null": "null"}


def advice(schema: Schema, path: Sequence[int | str] = ()) -> str:
    """Return what to say about a value that was refused: what is taken there, and where more is told.

    Args:
        schema: JSON schema, as pydantic writes it.
        path: of the value in it, by entries of groups and indices of lists.
    """
    definitions, place = schema.get("$defs", {}), [schema]
    for name in path:
        place = [inner for one in place for inner in _inside(one, name, definitions)]
    words = list(dict.fromkeys(text for one in place for text in _words(one, definitions)))
    return f"it takes {' or '.join(words)}; docs/recipes/index.md says more" if words else DOCUMENTED


def _alternatives(schema: Schema, definitions: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _alternatives(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return [one for inner in schema.get("anyOf", ()) for one in _alternatives(inner, definitions)] or [schema]


def _inside(schema: Schema, name: int | str, definitions: Schema) -> list[Schema]:
    found = []
    for one in _alternatives(schema, definitions):
        inner = one.get("items") if isinstance(name, int) else one.get("properties", {}).get(name)
        inner = inner or one.get("additionalProperties")
        found += [inner] if isinstance(inner, dict) else []
    return found


def _words(schema: Schema, definitions: Schema) -> list[str]:
    found = []
    for one in _alternatives(schema, definitions):
        kind = one.get("type")
        if "enum" in one or "const" in one:
            found += [repr(value) for value in one.get("enum", [one.get("const")])]
        elif kind in ("number", "integer"):
            found.append(("a whole number" if kind == "integer" else "a number") + _range(one))
        elif kind == "array" and isinstance(one.get("items"), dict):
            found.append(f"a list, each entry {' or '.join(_words(one['items'], definitions))}")
        elif kind == "object":
            found.append("a group of settings")
        elif kind in _SIMPLE:
            found.append(_SIMPLE[kind])
    return found


def _range(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {_number(schema['minimum'])} to {_number(schema['maximum'])}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [f"{word} {_number(schema[key])}" for key, word in bounds.items() if key in schema]
    return f" {' and '.join(words)}" if words else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
