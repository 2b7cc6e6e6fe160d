"""Does the picture show what the prompt asked for? For the bundled emoji models, without any judge model.

The bundled models draw one emoji of a known set, centred on one of twelve flat backgrounds. So the answer can be looked
up: the background is the palette colour nearest to the median of the border pixels; the emoji is the one whose sprite,
composed on that background at the training layout, has the least mean squared error to the picture.

What the number says: the share of prompts whose nearest known picture is the one that was asked for. What it does not
say: that the picture is sharp (a blurred rocket is still nearest to the rocket; ``distance`` and paired PSNR see that),
nor anything about other models, other layouts or prompts outside the vocabulary, which are left out and counted as
``skipped``. A wrong background usually makes the emoji harder to find too; the two shares are not independent. Chance
is 1/207 for the emoji and 1/12 for the background. A prompt that states no background is judged by its emoji alone.

Sprites: Noto Color Emoji (OFL-1.1), names: Unicode CLDR; see ``models/bundled/emoji/README.md``. No font is needed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np

from qdiff.errors import InputError

FOLDER = Path(__file__).parents[1] / "models" / "bundled" / "emoji"
BORDER = 4  # pixels on each side that are background alone


@dataclass(frozen=True)
class Vocabulary:
    """What the bundled models know.

    Attributes:
        names: the emoji's names, in atlas order.
        synonyms: any word for an emoji (lower case, its name included) -> the name.
        palette: background name -> RGB.
        colour_words: any word for a background -> its name.
        sprites: straight RGBA, uint8 [N, S, S, 4].
        size: side of a picture in pixels; sprites are centred in it.
        templates: the forms of captions: ``subjects``, ``joined``, ``endings``.
        unstated: the background that models draw when a prompt states none.
    """

    names: tuple[str, ...]
    synonyms: dict[str, str]
    palette: dict[str, tuple[int, int, int]]
    colour_words: dict[str, str]
    sprites: np.ndarray
    size: int
    templates: dict[str, list[str]]
    unstated: str


@lru_cache(maxsize=1)
def load_vocabulary() -> Vocabulary:
    """Return the emoji, words, colours and sprites that ship with qdiff.

    Raises:
        InputError: the files are not where the package keeps them.
    """
    from PIL import Image

    try:
        data = json.loads((FOLDER / "emoji.json").read_text(encoding="utf-8"))
        with Image.open(FOLDER / "atlas.png") as file:
            atlas = np.asarray(file.convert("RGBA"))
    except FileNotFoundError as error:
        fix = "reinstall qdiff, or in a checkout run: python -m zoo.emoji atlas"
        raise InputError(f"the emoji atlas is missing: {error.filename}", fix) from error
    side, rows = data["layout"]["sprite"], data["emoji"]
    cells = atlas.reshape(atlas.shape[0] // side, side, atlas.shape[1] // side, side, 4).swapaxes(1, 2)
    synonyms = {word: row["name"] for row in rows for word in (row["name"], *row["synonyms"])}
    return Vocabulary(
        names=tuple(row["name"] for row in rows),
        synonyms=synonyms,
        palette={name: (r, g, b) for name, (r, g, b) in data["palette"].items()},
        colour_words={**{name: name for name in data["palette"]}, **data["colour_synonyms"]},
        sprites=cells.reshape(-1, side, side, 4)[: len(rows)],
        size=data["layout"]["image"],
        templates=data["templates"],
        unstated=data["unstated_background"],
    )


def render(name: str, background: str, size: int = 64) -> np.ndarray:
    """Return the picture that training showed for an emoji on a background.

    Args:
        name: an emoji's name or synonym.
        background: a palette colour's name or synonym.
        size: side in pixels; other than 64 is resampled.

    Returns:
        uint8 [size, size, 3].

    Raises:
        InputError: a name or colour that the vocabulary does not have.
    """
    from PIL import Image

    v = load_vocabulary()
    if name.lower() not in v.synonyms:
        raise InputError(f"no emoji is called {name!r}", f"names are: {', '.join(v.names)}")
    if background.lower() not in v.colour_words:
        raise InputError(f"no background is called {background!r}", f"backgrounds are: {', '.join(v.palette)}")
    index = v.names.index(v.synonyms[name.lower()])
    image = _compose(v.sprites[index : index + 1], v.palette[v.colour_words[background.lower()]], v.size)[0]
    pixels = np.rint(image).astype(np.uint8)
    if size == v.size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


def _compose(sprites: np.ndarray, background: Sequence[int], size: int) -> np.ndarray:
    """Return sprites ``[N, S, S, 4]`` centred on a flat background: float32 ``[N, size, size, 3]`` in 0..255."""
    margin = (size - sprites.shape[1]) // 2
    image = np.broadcast_to(np.array(background, np.float32), (len(sprites), size, size, 3)).copy()
    alpha = sprites[..., 3:].astype(np.float32) / 255
    inside = slice(margin, margin + sprites.shape[1])
    image[:, inside, inside] = alpha * sprites[..., :3] + (1 - alpha) * image[:, inside, inside]
    return image


def classify(images: np.ndarray) -> list[tuple[str, str, float]]:
    """Return the nearest known picture of each image.

    Args:
        images: uint8 [N, 64, 64, 3].

    Returns:
        per image (emoji, background, distance); distance is the root mean squared error in units of 0..255.

    Raises:
        InputError: another shape or dtype.
    """
    v = load_vocabulary()
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (v.size, v.size, 3) or images.dtype != np.uint8:
        given_as = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"images must be uint8 [N, {v.size}, {v.size}, 3], not {given_as}", "resize them first")
    colours = np.array(list(v.palette.values()), np.float32)
    border = np.ones((v.size, v.size), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    medians = np.median(images[:, border], axis=1).astype(np.float32)  # [N, 3]
    nearest = np.square(medians[:, None] - colours).sum(2).argmin(1)  # [N]
    found: list[tuple[str, str, float]] = [("", "", 0.0)] * len(images)
    for index in np.unique(nearest):
        name = list(v.palette)[int(index)]
        where = np.flatnonzero(nearest == index)
        # Everything relative to the background colour: then |x - c|^2 = |x|^2 - 2 x.c + |c|^2 loses nothing in float32.
        known = (_compose(v.sprites, v.palette[name], v.size) - colours[index]).reshape(len(v.names), -1)
        given = (images[where].astype(np.float32) - colours[index]).reshape(len(where), -1)
        errors = np.square(given).sum(1)[:, None] - 2 * given @ known.T + np.square(known).sum(1)
        for row, best in enumerate(errors.argmin(1)):
            mean = max(0.0, float(errors[row, best])) / given.shape[1]
            found[int(where[row])] = (v.names[int(best)], name, mean**0.5)
    return found


@lru_cache(maxsize=1)
def _background_forms() -> re.Pattern[str]:
    """Match a stated background; group ``before`` or ``after`` is the colour."""
    words = "|".join(sorted(load_vocabulary().colour_words, key=len, reverse=True))
    plain = r"(?:(?:a|an|the|plain|solid|flat|simple|bright|pure|all)\s+)*"
    noun = r"(?:background|backdrop|wall|backgrounds)"
    forms = (
        rf"{noun}\s*(?::|,|is|in|of|colou?red)?\s*{plain}(?P<after>{words})\b"
        rf"|(?:\b(?:on|against|over|before|with|and|in front of|upon)\s+)?"
        rf"\b{plain}(?P<before>{words})(?:\s+colou?red)?\s+{noun}\b"
        rf"|\b(?:on|against|over|before|in front of|upon)\s+{plain}(?P<alone>{words})(?=\s*(?:$|[.,:;!?)]))"
    )
    return re.compile(forms)


@lru_cache(maxsize=1)
def _emoji_words() -> re.Pattern[str]:
    """Match any name or synonym as whole words, the longest first."""
    words = sorted(load_vocabulary().synonyms, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(re.escape(w) for w in words) + r")(?:s|es)?(?![\w-])")


def parse_prompt(prompt: str) -> tuple[str | None, str | None]:
    """Return (emoji, background) that a prompt asks for; None for what it does not state.

    A colour counts as the background only where it is said to be it ("on blue", "blue background", "the background is
    blue"): a "red heart" has no red background. Of several emoji words the longest is taken, of equals the first.
    """
    v = load_vocabulary()
    text = " ".join(prompt.lower().split())
    background = None
    match = _background_forms().search(text)
    if match is not None:
        word = match["before"] or match["after"] or match["alone"]
        background = v.colour_words[word]
        text = f"{text[: match.start()]} , {text[match.end() :]}"
    found = [m[1] for m in _emoji_words().finditer(text)]
    emoji = v.synonyms[max(found, key=len)] if found else None
    return emoji, background


class PromptRow(TypedDict):
    """One picture: emoji and background that were asked for and shown, and whether they agree; ``None``: not asked for."""

    prompt: str
    asked: list[str | None]
    found: list[str]
    emoji: bool | None
    background: bool | None
    distance: float


class PromptAccuracy(TypedDict):
    """What :func:`prompt_accuracy` returns."""

    emoji: float
    background: float
    n: int
    n_background: int
    skipped: int
    distance: float
    per_prompt: list[PromptRow]


def prompt_accuracy(images: np.ndarray, prompts: Sequence[str]) -> PromptAccuracy:
    """Return how many pictures show the emoji and the background that their prompts ask for.

    Args:
        images: uint8 [N, 64, 64, 3].
        prompts: N prompts, in the same order.

    Returns:
        ``emoji`` and ``background``: shares in 0..1 over the prompts that state one (NaN if none does); ``n``: prompts
        with an emoji; ``n_background``: prompts that state a background as well; ``skipped``: prompts without a known
        emoji; ``distance``: mean distance of `classify`; ``per_prompt``: one dict a prompt.

    Raises:
        InputError: the lengths differ, or the images are of the wrong kind.
    """
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} images for {len(prompts)} prompts", "give one image a prompt")
    rows: list[PromptRow] = []
    for prompt, (emoji, background, distance) in zip(prompts, classify(images), strict=True):
        asked_emoji, asked_background = parse_prompt(prompt)
        rows.append(
            {
                "prompt": prompt,
                "asked": [asked_emoji, asked_background],
                "found": [emoji, background],
                "emoji": None if asked_emoji is None else emoji == asked_emoji,
                "background": None if asked_background is None else background == asked_background,
                "distance": round(distance, 3),
            }
        )
    judged = [r for r in rows if r["emoji"] is not None]
    grounds = [r for r in judged if r["background"] is not None]
    return {
        "emoji": float(np.mean([r["emoji"] is True for r in judged])) if judged else float("nan"),
        "background": float(np.mean([r["background"] is True for r in grounds])) if grounds else float("nan"),
        "n": len(judged),
        "n_background": len(grounds),
        "skipped": len(rows) - len(judged),
        "distance": float(np.mean([r["distance"] for r in judged])) if judged else float("nan"),
        "per_prompt": rows,
    }


def default_prompts(n: int, seed: int = 0) -> list[str]:
    """Return ``n`` different prompts of varied form, each with an emoji's name and a stated background.

    Emoji come round-robin in a shuffled order, so that 207 prompts ask for each once. The same (n, seed) gives the same
    list, and a longer list of one seed starts with the shorter one.
    """
    v, rng = load_vocabulary(), random.Random(seed)
    prompts: list[str] = []
    order: list[str] = []
    used: set[str] = set()
    while len(prompts) < n:
        if not order:
            order = list(v.names)
            rng.shuffle(order)
        name, colour = order[-1], rng.choice(list(v.palette))
        thing = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        subject = rng.choice(v.templates["subjects"]).format(name=name, thing=thing)
        prompt = rng.choice(v.templates["joined"]).format(subject=subject, colour=colour)
        if prompt not in used:
            prompts.append(prompt)
            used.add(prompt)
            order.pop()
    return prompts
