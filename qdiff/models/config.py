"""Read entries of a backbone's diffusers config, or of ``generation.json``. They come from files, so an entry of another type is
an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from qdiff.errors import InputError

Config = Mapping[str, object]
"""The entries of a diffusers config by name."""


def config_of(backbone: nn.Module) -> Config:
    """Return the config of a backbone.

    Raises:
        TypeError: the module is not one of diffusers', nor a stand-in for one.
    """
    config: object = backbone.config
    if not isinstance(config, Mapping):
        raise TypeError(f"{type(backbone).__name__} has no config")
    return config


def integer(config: Config, name: str) -> int:
    """Return the whole number that an entry holds.

    Raises:
        InputError: it is missing or something else.
    """
    value = config.get(name)
    if not isinstance(value, int | float) or value != int(value):
        raise _unusable(name, value, "a whole number")
    return int(value)


def number(config: Config, name: str) -> float:
    """Return the number that an entry holds.

    Raises:
        InputError: it is missing or something else.
    """
    value = config.get(name)
    if not isinstance(value, int | float):
        raise _unusable(name, value, "a number")
    return float(value)


def integers(config: Config, name: str) -> tuple[int, ...]:
    """Return the whole numbers that an entry holds; of a single number that one.

    Raises:
        InputError: it is missing or something else.
    """
    value = config.get(name)
    members = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not members or not all(isinstance(member, int) for member in members):
        raise _unusable(name, value, "a whole number or a list of them")
    return tuple(members)


def _unusable(name: str, value: object, expected: str) -> InputError:
    return InputError(
        f"the model's {name!r} is {str(value)[:60]!r}, not {expected}",
        "copy its config.json and generation.json again from the model's source",
    )
