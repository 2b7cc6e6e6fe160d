"""Pictures that say where they came from, and sheets of them.

A PNG carries two text chunks: ``parameters``, the text that the viewers of the field read (the convention of the
Stable Diffusion web UI), and ``qdiff``, the same as JSON. Only the JSON is read back: ``parameters`` has no escaping, so
a prompt that contains ``Steps: 1, Seed: 2`` cannot be told from the line that follows it.

Reading never decodes pixels. Pillow bounds the inflated size of text chunks; what it raises becomes our errors.
Sheets are drawn with the DejaVu fonts that matplotlib brings along: the same sheet on every machine, no font to install.
"""

from __future__ import annotations

import json
import os
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageFont, PngImagePlugin

import qdiff
from qdiff.errors import InputError, IntegrityError
from qdiff.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.evaluation.video import Clip

MAX_METADATA_BYTES = 512 * 1024
"""Longest JSON that is written into a PNG; readers refuse inflated text of 1 MiB and more."""
MAX_SHEET_PIXELS = 100_000_000
_COMPRESS_FROM = 2048
_PAPER, _INK, _MUTED = (255, 255, 255), (24, 26, 31), (98, 104, 114)


@dataclass(frozen=True)
class PictureInfo:
    """How a picture was made. ``guidance`` is the guidance scale, ``run_id`` the twelve digits of ``Run.id``."""

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    engine: str = ""
    model: str = ""
    run_id: str = ""
    qdiff: str = field(default_factory=lambda: qdiff.__version__)

    def parameters(self, width: int, height: int) -> str:
        """Return the text that picture viewers of the field show: prompt, negative prompt, and one line of settings."""
        settings = {
            "Steps": self.steps,
            "CFG scale": self.guidance,
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model": self.model,
            "Engine": self.engine,
            "Run": self.run_id,
            "Version": f"qdiff {self.qdiff}",
        }
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value not in (None, ""))
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, line])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text


def save_png(path: Path, image: Image.Image, info: PictureInfo) -> None:
    """Write ``image`` losslessly with its metadata, whole or not at all.

    Raises:
        InputError: the metadata is longer than :data:`MAX_METADATA_BYTES`, or holds NaN.
        MemoryExhaustedError: the disk is full.
    """
    chunks = PngImagePlugin.PngInfo()
    try:
        texts = {
            "parameters": info.parameters(*image.size),
            "qdiff": json.dumps(asdict(info), ensure_ascii=False, allow_nan=False),
        }
    except ValueError as error:
        raise InputError(f"the metadata of {path.name} is no JSON: {error}") from None
    for key, text in texts.items():
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        if len(text.encode()) > MAX_METADATA_BYTES:
            raise InputError(
                f"the prompt of {path.name} is too long for a PNG ({len(text):,} characters)", "shorten it"
            )
        chunks.add_itxt(key, text, zip=len(text) > _COMPRESS_FROM)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))


def read_metadata(path: Path) -> PictureInfo | None:
    """Return what :func:`save_png` wrote into ``path``, or ``None`` for a PNG of somebody else. Reads no pixels.

    Raises:
        InputError: there is no such file, or it is not a PNG.
        IntegrityError: the PNG or its metadata is damaged or hostile (cut off, text bomb, wrong types).
    """
    if not path.is_file():
        raise InputError(f"there is no picture at {path}")
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise InputError(f"{path} is not a PNG file")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("qdiff")
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise IntegrityError(f"{path} is a damaged PNG: {error}", "make the picture again") from None
    return None if text is None else parse_info(str(text), path)


def parse_info(text: str, path: Path) -> PictureInfo:
    """Return the metadata that a file of ours carries as JSON.

    Raises:
        IntegrityError: it is not what we write; names the file at ``path``.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(PictureInfo).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"the metadata in {path} is not ours: {place} {first['msg']}", "make it again") from None


def to_pixels(images: Sequence[Image.Image | Clip]) -> Tensor:
    """Return pictures of one size as uint8 ``[N, H, W, 3]``, clips as ``[N, T, H, W, 3]``, as
    :mod:`qdiff.evaluation.metrics` wants them.

    Raises:
        InputError: none, or sizes differ.
    """
    import numpy
    import torch

    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise InputError(f"pictures must have one size, got {sorted(sizes) or 'no pictures'}")
    arrays = [
        numpy.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image.frames for image in images
    ]
    if len({array.shape for array in arrays}) != 1:
        raise InputError("clips must have the same number of frames")
    return torch.from_numpy(numpy.stack(arrays))


def difference(image_a: Image.Image, image_b: Image.Image, gain: int = 8) -> Image.Image:
    """Return ``gain`` times the absolute difference per channel, clipped at 255 (RGB): black where both agree.

    Raises:
        InputError: sizes differ.
    """
    if image_a.size != image_b.size:
        raise InputError(f"cannot subtract pictures of {image_a.size} and {image_b.size} pixels")
    return ImageChops.difference(image_a.convert("RGB"), image_b.convert("RGB")).point(lambda value: value * gain)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, *, columns: int | None = None, cell: int = 256
) -> Image.Image:
    """Return all pictures in a grid, each with a caption of at most two lines below it.

    Args:
        images: any sizes; larger ones are scaled into the cell, smaller ones by whole factors without smoothing.
        captions: one for each picture, cut with an ellipsis; ``None`` leaves the room out.
        columns: default: as near to a square as the count allows.
        cell: side of a cell in pixels, 32 to 2048.

    Raises:
        InputError: no pictures, counts differ, ``cell`` out of range, or the sheet would exceed 100 megapixels.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise InputError(
            f"a sheet needs a caption for each picture: {len(images)} pictures, {len(captions or ())} captions"
        )
    columns = columns or min(len(images), max(1, round(len(images) ** 0.5 + 0.49)))
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    below = [list(captions[start : start + columns]) for start in range(0, len(images), columns)] if captions else None
    return _sheet(rows, cell, below=below)


def side_by_side(
    variants: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str], *, cell: int = 256
) -> Image.Image:
    """Return a sheet with one row for each prompt (its caption above) and one column for each variant (its name on
    top).

    Args:
        variants: ``(name, pictures)``; every variant has one picture for each caption.
        captions: the prompts.
        cell: side of a picture's cell in pixels.

    Raises:
        InputError: counts differ, or as :func:`contact_sheet`.
    """
    if not variants or not captions or any(len(pictures) != len(captions) for _, pictures in variants):
        counts = {name: len(pictures) for name, pictures in variants}
        raise InputError(f"each variant needs {len(captions)} pictures, got {counts}")
    rows = [[pictures[index] for _, pictures in variants] for index in range(len(captions))]
    return _sheet(rows, cell, header=[name for name, _ in variants], above=list(captions))


def _sheet(
    rows: list[list[Image.Image]],
    cell: int,
    *,
    header: list[str] | None = None,
    above: list[str] | None = None,
    below: list[list[str]] | None = None,
) -> Image.Image:
    if not 32 <= cell <= 2048:
        raise InputError(f"a cell of {cell} pixels is outside 32..2048")
    size = max(11, cell // 18)
    regular, bold = _font("DejaVuSans.ttf", size), _font("DejaVuSans-Bold.ttf", size)
    gap, line = cell // 16, round(size * 1.35)
    top = gap + (line + gap if header else 0)
    row_height = cell + gap + (line + gap // 2 if above else 0) + (2 * line + gap // 2 if below else 0)
    columns = max(len(row) for row in rows)
    width, height = gap + columns * (cell + gap), top + len(rows) * row_height + gap // 2
    if width * height > MAX_SHEET_PIXELS:
        raise InputError(f"a sheet of {width} x {height} pixels is too large", "take fewer pictures or a smaller cell")
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(header or ()):
        _write(draw, (gap + column * (cell + gap), gap), name, bold, cell, 1, line, _INK)
    for number, row in enumerate(rows):
        y = top + number * row_height
        if above:
            _write(draw, (gap, y), above[number], regular, width - 2 * gap, 1, line, _MUTED)
            y += line + gap // 2
        for column, image in enumerate(row):
            x = gap + column * (cell + gap)
            fitted = _fit(image, cell)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
            if below:
                _write(draw, (x, y + cell + gap // 3), below[number][column], regular, cell, 2, line, _MUTED)
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    longest = max(image.size)
    if longest <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / longest
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    width: int,
    lines: int,
    line_height: int,
    colour: tuple[int, int, int],
) -> None:
    for index, line in enumerate(_wrap(text, font, width, lines)):
        draw.text((place[0], place[1] + index * line_height), line, font=font, fill=colour)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Return the text broken into lines at spaces (inside a word that is too long); an ellipsis ends what does not fit."""
    shown = "".join(" " if unicodedata.category(mark)[0] in "CZ" else mark for mark in text[:600])
    left = " ".join(shown.split())
    done: list[str] = []
    while left and len(done) < lines:
        fits = len(left)
        while fits > 1 and font.getlength(left[:fits]) > width:
            fits -= 1
        if fits < len(left):
            space = left.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        done.append(left[:fits])
        left = left[fits:].lstrip()
    if done and (left or len(text) > 600):
        last = done[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        done[-1] = last.rstrip() + "…"
    return done
