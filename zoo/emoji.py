"""The pictures: which emoji, their names, and how one is drawn on a coloured background.

Two steps, each run once, whose results are committed:

* ``python -m zoo.emoji table`` reads the CLDR English annotations and writes ``zoo/emoji.json``: the emoji
  chosen below with their names and the keywords that belong to one chosen emoji alone.
* ``python -m zoo.emoji atlas`` draws them with Noto Color Emoji and writes the sprite atlas that ships with
  qdiff (``qdiff/models/bundled/emoji``), so that neither training nor the metric needs a font or CLDR.

The choice is by hand: things that a person names at once at 48 pixels, without look-alikes (one dog, one car).
Names are shortened where CLDR's are clumsy ("soft ice cream"); CLDR's own name stays as a synonym.

Layout: sprites of 48x48 centred in 64x64. Sprites are premultiplied when they are resized (no dark seams) and kept
as straight RGBA in the atlas. Every picture is ``alpha * sprite + (1 - alpha) * background`` in sRGB values.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.captions import TEMPLATES

TABLE = Path(__file__).with_name("emoji.json")
BUNDLED = Path(__file__).parents[1] / "qdiff" / "models" / "bundled"
CLDR = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the one bitmap strike of Noto Color Emoji
IMAGE_SIZE = 64
SPRITE_SIZE = 48
COLUMNS = 20

CHOSEN = (
    "🐕🐈🐎🐄🐖🐫🐘🐇🐿🦔🦇🐻🐨🐼🦥🦘🐓🐥🐧🦅🦆🦉🦩🦚🦜🐸🐊🐢🐍🐉🐳🐬🐟🐡🦈🐙🐚🐌🦋🐝🐞🦁🐯🦊🦒🦓🐒🦀🦞🦛🦢"
    "🌹🌻🌷🌲🌴🌵🍀🍁🍄🌽🌸🍇🍉🍊🍋🍌🍍🍎🍐🍑🍒🍓🥝🍅🥥🥑🍆🥕🥦🍞🥐🥨🧀🍗🍔🍟🍕🌭🌮🥚🍳🍿🍣🍦🍩🍪🎂🧁🍫🍭🍯🍷🍺☕"
    "🚂🚌🚒🚓🚗🚜🛵🚲⛵🚢✈🚁🚀🛸🎈⚓🚦🛶🌋🏠🏰🗽⛺🎡🏝🌙🌞⭐☁🌈☂⚡❄⛄🔥💧🌊🪐🌍"
    "🎃🎄🎁🏆⚽🏀🏈🎾🎯🎲🧸👓👕👟👑🎩💄💍💎🔔🎸🎹🎺🥁📷📺☎💡📕✉✏✂🔒🔑🔨🪓🛡🔧🧲🚪🛒⏰⌛🧭🧦🏹🔋🕯"
    "😀😂😍😎😢😡😱🤖👻💀👽🤡😴🎅❤"
)

NAMES = {
    "🐫": "camel", "🐥": "chick", "🐳": "whale", "🐚": "seashell", "🐝": "bee", "🐞": "ladybug", "🐯": "tiger",
    "🦛": "hippo", "🌲": "fir tree", "🍀": "clover", "🌽": "corn", "🍎": "apple", "🥝": "kiwi", "🧀": "cheese",
    "🍗": "drumstick", "🍳": "fried egg", "🍦": "ice cream", "🎂": "cake", "🍫": "chocolate", "🍯": "honey", "🍷": "wine",
    "🍺": "beer", "☕": "coffee", "🚂": "train", "🚗": "car", "🛵": "scooter", "🚦": "traffic light", "🌙": "moon",
    "🌞": "sun", "⚡": "lightning", "⛄": "snowman", "💧": "water drop", "🌊": "wave", "🪐": "planet", "🌍": "earth",
    "🎃": "pumpkin", "🎁": "gift", "🎾": "tennis racket", "🎯": "target", "🎲": "dice", "👕": "shirt", "👟": "shoe",
    "💎": "gem", "🎹": "piano", "📕": "book", "🔒": "lock", "🛒": "shopping cart", "⌛": "hourglass", "😀": "smiley",
    "😂": "laughing face", "😍": "love face", "😎": "cool face", "😡": "angry face", "😱": "scared face",
    "🤡": "clown", "🎅": "santa", "❤": "heart", "🏝": "island", "🏹": "bow and arrow", "🛸": "ufo", "🥥": "coconut",
    "🍆": "eggplant", "🐿": "squirrel", "🚓": "police car", "📺": "television", "✈": "airplane", "☂": "umbrella",
}  # fmt: skip

PALETTE = {
    "black": (20, 20, 22), "white": (248, 248, 248), "red": (214, 38, 42), "orange": (244, 132, 24),
    "yellow": (252, 218, 58), "green": (46, 150, 66), "blue": (42, 92, 214), "purple": (128, 56, 178),
    "pink": (250, 150, 196), "brown": (116, 72, 42), "gray": (138, 138, 140), "teal": (26, 166, 164),
}  # fmt: skip
COLOUR_SYNONYMS = {"grey": "gray", "violet": "purple", "turquoise": "teal"}


def build_table(cldr: Path) -> list[dict[str, object]]:
    """Return the chosen emoji with a name and unambiguous synonyms, from the CLDR annotations file ``cldr``."""
    annotations: dict[str, dict[str, str]] = {}
    for node in ElementTree.parse(cldr).getroot().iter("annotation"):
        kind = "name" if node.get("type") == "tts" else "keywords"
        annotations.setdefault(str(node.get("cp")), {})[kind] = node.text or ""
    words = {e: {w.strip().lower() for w in annotations[e]["keywords"].split("|")} for e in CHOSEN}
    names = {e: NAMES.get(e, annotations[e]["name"]).lower() for e in CHOSEN}
    if len(set(names.values())) != len(CHOSEN):
        raise ValueError(f"names used twice: {[n for n, c in Counter(names.values()).items() if c > 1]}")
    for emoji in CHOSEN:
        words[emoji].add(annotations[emoji]["name"].lower())
    count = Counter(word for group in words.values() for word in group)
    forbidden = (
        set(PALETTE) | set(COLOUR_SYNONYMS) | set(names.values()) | {"background", "emoji", "picture", "image", "4"}
    )
    table = []
    for emoji in CHOSEN:
        own = sorted(w for w in words[emoji] if count[w] == 1 and w not in forbidden and w.isascii())
        shared = sorted(w for w in words[emoji] if count[w] > 1 and w not in forbidden)
        table.append({"emoji": emoji, "name": names[emoji], "synonyms": own, "keywords": shared})
    return table


def load_table(path: Path = TABLE) -> list[dict[str, object]]:
    """Return the committed table: ``emoji``, ``name``, ``synonyms`` (this emoji's alone) and ``keywords`` (shared)."""
    return json.loads(path.read_text(encoding="utf-8"))["emoji"]


def find_font(font: Path | None = None) -> Path:
    """Return ``font`` if given, else Noto Color Emoji from its usual place or from fontconfig."""
    if font is not None:
        return font
    if FONT.is_file():
        return FONT
    if shutil.which("fc-match"):
        command = ["fc-match", "-f", "%{file}", "Noto Color Emoji"]
        found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if found.name == FONT.name:
            return found
    raise FileNotFoundError("NotoColorEmoji.ttf was not found; install fonts-noto-color-emoji or pass --font")


def draw_sprite(emoji: str, font: ImageFont.FreeTypeFont, size: int = SPRITE_SIZE) -> Image.Image:
    """Return one emoji as straight RGBA, its ink scaled and centred into ``size`` x ``size``."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no picture for {emoji!r} (U+{ord(emoji[0]):X})")
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def write_atlas(folder: Path, font_path: Path | None = None) -> None:
    """Write ``atlas.png`` and ``emoji.json`` (what `qdiff.evaluation.prompt_accuracy` reads) into ``folder``."""
    table = load_table()
    font = ImageFont.truetype(str(find_font(font_path)), FONT_SIZE)
    rows = -(-len(table) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE), (0, 0, 0, 0))
    for index, row in enumerate(table):
        corner = (index % COLUMNS * SPRITE_SIZE, index // COLUMNS * SPRITE_SIZE)
        atlas.paste(draw_sprite(str(row["emoji"]), font), corner)
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "atlas.png", optimize=True)
    vocabulary = {
        "licence": "sprites: Noto Color Emoji, OFL-1.1; names: Unicode CLDR, Unicode-DFS-2016; see README.md",
        "layout": {"image": IMAGE_SIZE, "sprite": SPRITE_SIZE, "columns": COLUMNS},
        "palette": {name: list(rgb) for name, rgb in PALETTE.items()},
        "colour_synonyms": COLOUR_SYNONYMS,
        "unstated_background": "white",
        "emoji": [{"emoji": r["emoji"], "name": r["name"], "synonyms": r["synonyms"]} for r in table],
        "templates": TEMPLATES,
    }
    write_json(folder / "emoji.json", vocabulary)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON whose innermost lists and objects stay on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def sprites(folder: Path = BUNDLED / "emoji") -> np.ndarray:
    """Return all sprites of the atlas, straight RGBA. Shape [N, 48, 48, 4], uint8."""
    atlas = np.asarray(Image.open(folder / "atlas.png").convert("RGBA"))
    rows, columns = atlas.shape[0] // SPRITE_SIZE, atlas.shape[1] // SPRITE_SIZE
    cells = atlas.reshape(rows, SPRITE_SIZE, columns, SPRITE_SIZE, 4).swapaxes(1, 2)
    return cells.reshape(-1, SPRITE_SIZE, SPRITE_SIZE, 4)[: len(load_table())]


def compose(sprite: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return sprites centred on flat backgrounds.

    Args:
        sprite: straight RGBA, uint8 [N, 48, 48, 4].
        background: RGB in 0..255 [N, 3].

    Returns:
        float32 [N, 64, 64, 3] in 0..255.
    """
    margin = (IMAGE_SIZE - SPRITE_SIZE) // 2
    image = np.broadcast_to(background[:, None, None, :], (len(sprite), IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    alpha = sprite[..., 3:].astype(np.float32) / 255
    inside = slice(margin, margin + SPRITE_SIZE)
    image[:, inside, inside] = alpha * sprite[..., :3] + (1 - alpha) * image[:, inside, inside]
    return image


def main() -> None:
    """Parse the command line and run ``table`` or ``atlas``."""
    parser = argparse.ArgumentParser(prog="python -m zoo.emoji", description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=["table", "atlas"])
    parser.add_argument("--cldr", type=Path, default=CLDR, help="CLDR annotations/en.xml (Debian: unicode-cldr-core)")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")
    parser.add_argument("--out", type=Path, default=BUNDLED / "emoji", help="folder of the atlas")
    options = parser.parse_args()
    if options.what == "table":
        licence = "Unicode CLDR, Copyright 1991-2022 Unicode, Inc., SPDX Unicode-DFS-2016, https://www.unicode.org/copyright.html"
        write_json(TABLE, {"licence": licence, "emoji": build_table(options.cldr)})
        print(f"{TABLE.name}: {len(load_table())} emoji")
    else:
        write_atlas(options.out, options.font)
        print(f"{options.out.name}: {len(sprites(options.out))} sprites")


if __name__ == "__main__":
    main()
