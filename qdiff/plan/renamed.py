"""Keys of recipes and plans that have another name since version 0.2: they are read by their old one for one release."""

from __future__ import annotations

from collections.abc import Mapping

RECIPE = {"kept": "storage_dtype", "outputs": "quantize_outputs"}
SCHEME = {"by_token": "per_token"}
PLAN = {"kept": "storage_dtype"}
LAYER = {"by_token": "per_token", "multiplier": "input_multiplier"}
BUFFERS = {"multiplier": "input_multiplier", "timestep_scale": "timestep_scales"}  # of quantized layers


def with_new_names(values: object, names: Mapping[str, str]) -> object:
    """Return ``values`` with its old keys renamed; anything but a mapping is returned as it is.

    An old key wins over the new one: it is what somebody wrote over a recipe that has the new one.

    Args:
        values: as they were read.
        names: old key -> new key.
    """
    if not isinstance(values, Mapping) or not any(old in values for old in names):
        return values
    renamed = {key: value for key, value in values.items() if key not in names}
    return renamed | {new: values[old] for old, new in names.items() if old in values}


def key_of_today(path: str) -> str:
    """Return the path of a recipe's entry (``scheme.per_token``) with today's names in the place of old ones."""
    first, *rest = path.split(".")
    if first in ("scheme", "convolutions") and rest:
        rest[0] = SCHEME.get(rest[0], rest[0])
    return ".".join([RECIPE.get(first, first), *rest])


def buffer_name(name: str) -> str:
    """Return the name that a tensor of a checkpoint has today; ``name`` is that of a buffer with its layer before it."""
    layer, dot, buffer = name.rpartition(".")
    return f"{layer}{dot}{BUFFERS.get(buffer, buffer)}"
