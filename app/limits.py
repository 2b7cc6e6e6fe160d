"""What one visitor may ask for. Checked in the service: a slider's end is a hint, whoever calls the API never sees it.

Every limit bounds something that costs: the prompt bounds the text encoder, steps times area times pictures the backbone,
the queue the memory that waiting requests hold, the wall clock everything that was overlooked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdiff.errors import InputError

if TYPE_CHECKING:
    from qdiff.app.settings import Settings


@dataclass(frozen=True)
class Limits:
    """The numbers. ``area`` is in pixels of one picture, ``volume`` in pixels of all frames of one clip, ``seconds`` of wall
    clock for one job once it runs.

    Args:
        pictures: in one request (the batch).
        engines: beside float in one comparison.
        waiting: requests in the queue; the next one is told so.
        kept_seconds: how long a finished picture can be downloaded.
        kept_pictures: how many finished pictures are kept at most.
    """

    prompt_characters: int = 500
    steps: int = 100
    guidance: float = 30.0
    smallest_side: int = 32
    largest_side: int = 1024
    area: int = 1024 * 1024
    pictures: int = 4
    frames: int = 81
    volume: int = 81 * 512 * 512
    engines: int = 3
    waiting: int = 16
    seconds: float = 180.0
    settings_characters: int = 8_000
    kept_seconds: float = 3600.0
    kept_pictures: int = 400

    def check(self, settings: Settings, divisor: int, media: str = "image") -> None:
        """Refuse settings beyond the limits. ``divisor``: sides must be multiples of it; ``media``: what the model
        makes.

        Raises:
            InputError: with the value and the limit.
        """
        for what, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
            self._check_text(what, text)
        if not settings.prompt.strip():
            raise InputError("The prompt is empty.", "Say what the picture should show, or click an example.")
        self._check_number("steps", settings.steps, 1, self.steps)
        self._check_number("guidance", settings.guidance, 0, self.guidance)
        self._check_number("pictures", settings.pictures, 1, self.pictures)
        self._check_number("seed", settings.seed, 0, 2**32 - 1)
        if settings.frames is not None and media != "video":
            raise InputError("This model makes pictures, not clips.", "Leave the frames out.")
        self._check_number("frames", settings.frames, 2, self.frames)
        for what, side in (("width", settings.width), ("height", settings.height)):
            self._check_number(what, side, self.smallest_side, self.largest_side)
            if side is not None and side % divisor:
                nearest = max(self.smallest_side, round(side / divisor) * divisor)
                raise InputError(
                    f"The {what} {side} is no multiple of {divisor}.", f"Use {min(nearest, self.largest_side)}."
                )
        if settings.width and settings.height and settings.width * settings.height > self.area:
            raise InputError(
                f"{settings.width} × {settings.height} is {settings.width * settings.height:,} pixels.",
                f"At most {self.area:,} are drawn: make one side smaller.",
            )

        if settings.width and settings.height and settings.frames:
            volume = settings.width * settings.height * settings.frames
            if volume > self.volume:
                raise InputError(
                    f"{settings.frames} frames of {settings.width} × {settings.height} are {volume:,} pixels.",
                    f"At most {self.volume:,} are drawn: take fewer frames or a smaller size.",
                )

    def _check_text(self, what: str, text: str) -> None:
        if len(text) > self.prompt_characters:
            raise InputError(
                f"The {what} has {len(text):,} characters.",
                f"At most {self.prompt_characters:,} are taken: shorten it.",
            )
        if "\x00" in text or any("\ud800" <= mark <= "\udfff" for mark in text):
            raise InputError(f"The {what} holds characters that are not text.", "Type it again.")

    @staticmethod
    def _check_number(what: str, value: float | None, low: float, high: float) -> None:
        if value is not None and not low <= value <= high:  # NaN is not either
            shown, least, most = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (value, low, high))
            raise InputError(f"{what.capitalize()} {shown} is out of range.", f"Take {least} to {most}.")
