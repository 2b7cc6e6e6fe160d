"""PNG metadata comes back as it was written, hostile files do not hurt, sheets hold every picture."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

import qdiff
from qdiff.errors import InputError, IntegrityError
from qdiff.evaluation.images import (
    PictureInfo,
    contact_sheet,
    difference,
    read_metadata,
    save_png,
    side_by_side,
    to_pixels,
)

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def flat(colour: tuple[int, int, int], side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 1, height: int = 1) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return SIGNATURE + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple",
        "",
        "Ein Löwe — 猫 🐈‍⬛ قطة \u202e",
        'two\nlines, "quotes", Steps: 1, Seed: 2\nNegative prompt: none',
        "x" * 100_000,
        "🐈" * 100_000,
    ],
    ids=["plain", "empty", "unicode", "fields", "100kB", "400kB"],
)
def test_metadata_round_trip(tmp_path: Path, prompt: str) -> None:
    info = PictureInfo(prompt, "blurry", 2**63 + 1, 20, 4.5, "openvino int8", "pixart", "3fa2b4c5d6e7")
    save_png(tmp_path / "a.png", flat((1, 2, 3)), info)
    assert read_metadata(tmp_path / "a.png") == info
    assert info.qdiff == qdiff.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)


def test_parameters_are_what_viewers_of_the_field_show(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", flat((0, 0, 0)), PictureInfo("a cat", "dog", 7, 20, 4.5, "a, b", "pixart", "12"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == (
            "a cat\nNegative prompt: dog\nSteps: 20, CFG scale: 4.5, Seed: 7, Size: 16x16, Model: pixart, "
            f'Engine: "a, b", Run: 12, Version: qdiff {qdiff.__version__}'
        )


def test_what_a_png_cannot_hold(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", flat((0, 0, 0)), PictureInfo("lone \ud800 surrogate"))
    assert read_metadata(tmp_path / "a.png") == PictureInfo("lone ? surrogate")
    with pytest.raises(InputError, match="too long"):
        save_png(tmp_path / "b.png", flat((0, 0, 0)), PictureInfo("x" * 600_000))
    with pytest.raises(InputError, match="JSON"):
        save_png(tmp_path / "b.png", flat((0, 0, 0)), PictureInfo("x", guidance=float("nan")))
    assert not (tmp_path / "b.png").exists()


def test_a_picture_of_somebody_else_has_no_metadata(tmp_path: Path) -> None:
    flat((0, 0, 0)).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") is None


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    flat((0, 0, 0)).save(tmp_path / "a.jpg")
    (tmp_path / "empty.png").touch()
    for name in ("no.png", "a.jpg", "empty.png", "."):
        with pytest.raises(InputError):
            read_metadata(tmp_path / name)


def text_chunk(value: str) -> bytes:
    return chunk(b"tEXt", b"qdiff\0" + value.encode("latin-1"))


HOSTILE = {
    "cut off": png()[:30],
    "wrong checksum": SIGNATURE + b"\0\0\0\x0dIHDR" + b"\1" * 17,
    "text bomb": png(chunk(b"zTXt", b"qdiff\0\0" + zlib.compress(b"a" * 50_000_000))),
    "huge picture": png(width=2**31 - 1, height=2**31 - 1),
    "no JSON": png(text_chunk("{")),
    "other JSON": png(text_chunk("[1, 2]")),
    "no prompt": png(text_chunk('{"seed": 1}')),
    "wrong type": png(text_chunk('{"prompt": ["a"]}')),
    "seed is text": png(text_chunk('{"prompt": "a", "seed": "1"}')),
    "deep": png(text_chunk('{"prompt": ' + "[" * 100_000)),
    "long number": png(text_chunk('{"prompt": "a", "seed": ' + "9" * 100_000 + "}")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(HOSTILE[name])
    with pytest.raises(IntegrityError) as error:
        read_metadata(tmp_path / "a.png")
    assert len(str(error.value)) < 600


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("qdiff", json.dumps({"prompt": "a", "sampler": "new"}))
    flat((0, 0, 0)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_metadata(tmp_path / "a.png") == PictureInfo("a")


def test_difference_is_amplified_and_clipped() -> None:
    assert difference(flat((10, 20, 30)), flat((12, 20, 90))).getpixel((3, 3)) == (16, 0, 255)
    with pytest.raises(InputError):
        difference(flat((0, 0, 0)), flat((0, 0, 0), 8))


def test_pixels_are_channels_last() -> None:
    pixels = to_pixels([flat((1, 2, 3)), flat((4, 5, 6)).convert("RGBA")])
    assert pixels.shape == (2, 16, 16, 3) and pixels[1, 0, 0].tolist() == [4, 5, 6]
    with pytest.raises(InputError, match="one size"):
        to_pixels([flat((0, 0, 0)), flat((0, 0, 0), 8)])
    with pytest.raises(InputError, match="no pictures"):
        to_pixels([])


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def areas(sheet: Image.Image) -> list[int]:
    counts = {colour: number for number, colour in sheet.getcolors(1 << 24) or []}
    return [counts.get(colour, 0) for colour in COLOURS]


def test_every_picture_is_on_the_sheet_unsmoothed() -> None:
    captions = ["", "two words", "a caption that is much longer than its cell " * 20, "Ünïcödé 猫", "\x00\n\u202e"]
    sheet = contact_sheet([flat(colour) for colour in COLOURS], captions, columns=2, cell=64)
    assert areas(sheet) == [64 * 64] * 5  # 16 pixels, four times
    assert sheet.width < sheet.height


def test_a_caption_changes_only_the_room_below() -> None:
    bare = contact_sheet([flat(COLOURS[0])], ["a"], cell=128)
    assert bare.tobytes() != contact_sheet([flat(COLOURS[0])], ["b"], cell=128).tobytes()
    assert bare.size == contact_sheet([flat(COLOURS[0])], ["word " * 2000], cell=128).size


def test_side_by_side_puts_variants_into_columns() -> None:
    variants = [("float", [flat(COLOURS[0]), flat(COLOURS[1])]), ("INT8", [flat(COLOURS[2]), flat(COLOURS[3], 500)])]
    sheet = side_by_side(variants, ["first", "second"], cell=64)
    assert areas(sheet) == [64 * 64] * 4 + [0]
    row = [sheet.getpixel((x, y)) for y in range(sheet.height) for x in (20, 20 + 64 + 4)]
    assert COLOURS[0] in row[::2] and COLOURS[2] in row[1::2]


def test_sheets_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="caption"):
        contact_sheet([flat(COLOURS[0])], [])
    with pytest.raises(InputError, match="2 pictures|each variant"):
        side_by_side([("a", [flat(COLOURS[0])])], ["x", "y"])
    with pytest.raises(InputError, match="cell"):
        contact_sheet([flat(COLOURS[0])], cell=8)
    with pytest.raises(InputError, match="too large"):
        contact_sheet([flat(COLOURS[0])] * 400, cell=2048)
