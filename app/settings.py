"""What a picture is made from, as one value: it comes from the page, the API or pasted JSON, and goes into the
download.

Strict on purpose: unknown names and wrong types are refused, so a typing error in pasted settings never passes as a default.
``model`` and ``engine`` are names from the service's own lists; nothing in here can be a path.
"""

from __future__ import annotations

import json
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdiff.errors import InputError
from qdiff.files import Json


class PastPicture(TypedDict):
    """A picture of a visit: its file and the settings that make it again."""

    path: str
    settings: dict[str, Json]


class Settings(BaseModel):
    """Settings of one request. ``None`` is the model's own value; the settings that a result carries have no ``None``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str
    negative_prompt: str = ""
    model: str = Field("", description="a name that the service lists; empty: the first")
    engine: str = Field("", description="float, or an engine of the model; empty: the fastest that is there")
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = Field(None, description="of the first picture; null: a new one")
    width: int | None = None
    height: int | None = None
    frames: int | None = Field(None, description="of a clip, for models that make videos")
    pictures: int = 1

    def to_json(self) -> dict[str, Json]:
        """Return the settings as JSON values, in the order of the fields; pictures have no frames."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if name != "frames" or value is not None}

    @classmethod
    def make(cls, **values: object) -> Settings:
        """Check the values and return them as settings.

        Raises:
            InputError: an unknown name or a wrong type, with the name.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"])[:60]
            raise InputError(f"The setting {name!r} does not fit: {first['msg']}.", "Correct it.") from None

    @classmethod
    def parse(cls, text: str, most_characters: int) -> Settings:
        """Return settings from pasted JSON: what the page offers as a download, or a part of it.

        Raises:
            InputError: too long, no JSON, or not settings.
        """
        if len(text) > most_characters:
            raise InputError(f"These settings have {len(text):,} characters.", f"At most {most_characters:,} are read.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(
                "These settings are not JSON.", 'Paste a whole downloaded file, or {"prompt": "…"}.'
            ) from None
        if isinstance(value, dict) and isinstance(value.get("settings"), dict):
            value = value["settings"]  # the downloaded file has facts around them
        if not isinstance(value, dict):
            raise InputError("These settings are not a group of names and values.", 'For example {"prompt": "…"}.')
        return cls.make(**{str(name): entry for name, entry in value.items()})
