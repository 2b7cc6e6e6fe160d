"""The clips that the bundled video model knows: one emoji that moves, turns, grows, shrinks or fades on a flat background.

What training shows and what the metric looks for is drawn here, so that the two cannot drift apart. A clip is a function of
(emoji, motion, background): position, size, angle and opacity of the sprite at every instant from 0 to 1.

Sprites and colours: :mod:`qdiff.evaluation.prompt_accuracy`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np

from qdiff.errors import InputError
from qdiff.evaluation.prompt_accuracy import BORDER, load_vocabulary, parse_prompt

SIZE = 34  # side of a sprite that neither grows nor shrinks, in pixels of a 64x64 frame
REACH = 15  # pixels from the middle to where a moving sprite starts and ends
SMALL, LARGE = 16, 46
LOOKED_AT = 9  # frames of a clip that the metric looks at

EMOJI = (
    "rocket balloon heart star moon sun planet earth rainbow fire snowman lightning umbrella cloud cactus mushroom rose "
    "sunflower tulip clover apple banana watermelon cherries strawberry pineapple carrot corn cheese pizza doughnut cake "
    "coffee car bus train airplane helicopter ufo sailboat fish whale octopus crab butterfly bee ladybug frog turtle "
    "penguin owl parrot dog cat fox lion panda elephant trophy gift bell guitar robot ghost"
).split()
"""Names of the emoji that move: the ones that are told apart best when they are small."""


@dataclass(frozen=True)
class Pose:
    """Where a sprite is: centre as an offset from the frame's, side of the sprite (both in pixels of a 64x64 frame), clockwise
    angle in degrees, opacity in 0..1.
    """

    x: float = 0.0
    y: float = 0.0
    size: float = SIZE
    angle: float = 0.0
    opacity: float = 1.0


@dataclass(frozen=True)
class Motion:
    """A pose for every instant from 0 to 1, and the words for it."""

    pose: Callable[[float], Pose]
    words: tuple[str, ...]


MOTIONS: dict[str, Motion] = {
    "up": Motion(lambda t: Pose(y=REACH * (1 - 2 * t)), ("moves up", "moving up", "goes up", "rises", "flies up")),
    "down": Motion(lambda t: Pose(y=REACH * (2 * t - 1)), ("moves down", "moving down", "goes down", "falls", "sinks")),
    "left": Motion(lambda t: Pose(x=REACH * (1 - 2 * t)), ("moves left", "moving left", "goes left", "moves to the left")),
    "right": Motion(lambda t: Pose(x=REACH * (2 * t - 1)), ("moves right", "moving right", "goes right", "moves to the right")),
    "turn": Motion(lambda t: Pose(angle=360 * t), ("turns", "turning", "turns around", "rotates", "spins")),
    "grow": Motion(lambda t: Pose(size=SMALL + (LARGE - SMALL) * t), ("grows", "growing", "gets bigger", "comes closer")),
    "shrink": Motion(lambda t: Pose(size=LARGE - (LARGE - SMALL) * t), ("shrinks", "shrinking", "gets smaller")),
    "fade": Motion(lambda t: Pose(opacity=1 - t), ("fades", "fading", "fades away", "fades out", "disappears")),
}  # fmt: skip


def draw(name: str, colour: str, motion: str, frames: int, which: Sequence[int] | None = None) -> np.ndarray:
    """Return the frames that training showed.

    Args:
        name: an emoji's name, as in :data:`EMOJI` (any of the atlas works).
        colour: a palette colour's name.
        motion: a key of :data:`MOTIONS`.
        frames: how many the clip has, at even distances from the first instant to the last.
        which: draw these alone, counted from 0; all if None.

    Returns:
        float32 [frames or len(which), 64, 64, 3] in 0..255.
    """
    background = np.array(load_vocabulary().palette[colour], np.float32)
    instants = [index / (frames - 1) for index in (range(frames) if which is None else which)]
    opaque, alpha = _layers(name, motion, instants)
    return (opaque + (1 - alpha) * background).clip(0, 255)


def _layers(name: str, motion: str, instants: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sprite at each instant: RGB times opacity, float32 [T, 64, 64, 3] in 0..255, and opacity [T, 64, 64,
    1] in 0..1.
    """
    vocabulary = load_vocabulary()
    sprite = vocabulary.sprites[vocabulary.names.index(name)]
    layers = np.stack([_layer(sprite, MOTIONS[motion].pose(instant), vocabulary.size) for instant in instants])
    return layers[..., :3], layers[..., 3:] / 255


def _layer(sprite: np.ndarray, pose: Pose, size: int) -> np.ndarray:
    """Return a sprite [S, S, 4] (straight RGBA, uint8) in a pose: premultiplied RGBA, float32 [size, size, 4] in
    0..255.
    """
    from PIL import Image

    side = max(1, round(pose.size))
    premultiplied = Image.fromarray(sprite).convert("RGBa")
    small = np.asarray(premultiplied.resize((side, side), Image.Resampling.LANCZOS))
    radians, middle = np.deg2rad(pose.angle), (size - 1) / 2
    scale = side / pose.size
    cosine, sine = scale * np.cos(radians), scale * np.sin(radians)
    # from a frame's pixel back to the sprite's: undo the shift, turn back, scale, and count from the sprite's corner
    x, y = middle + pose.x, middle + pose.y
    matrix = _pixel_centres(
        (cosine, sine, (side - 1) / 2 - cosine * x - sine * y, -sine, cosine, (side - 1) / 2 + sine * x - cosine * y)
    )
    planes = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(small, 2, 0)]
    bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
    return pose.opacity * np.stack([np.asarray(p.transform((size, size), affine, matrix, bilinear)) for p in planes], 2)


def _pixel_centres(matrix: tuple[float, ...]) -> tuple[float, ...]:
    """Return the same map for Pillow, whose coordinates have a pixel's centre at .5."""
    a, b, c, d, e, f = matrix
    return a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e)


def parse_motion(prompt: str) -> str | None:
    """Return the motion that a prompt asks for, a key of :data:`MOTIONS`; of several the one whose words are
    longest.
    """
    text = " ".join(prompt.lower().split())
    found = [
        (len(words), motion)
        for motion, known in MOTIONS.items()
        for words in known.words
        if re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", text)
    ]
    return max(found)[1] if found else None


def classify(clips: np.ndarray) -> list[tuple[str, str, str, float]]:
    """Return the nearest known clip of each.

    The background is the palette colour nearest to the median of the frames' borders; emoji and motion are those whose frames,
    drawn on it, have the least mean squared error to :data:`LOOKED_AT` of the clip's frames at half the size.

    Args:
        clips: uint8 [N, T, 64, 64, 3].

    Returns:
        per clip (emoji, background, motion, distance); distance is the root mean squared error in units of 0..255.

    Raises:
        InputError: another shape or dtype.
    """
    vocabulary = load_vocabulary()
    side = vocabulary.size
    if clips.ndim != 5 or clips.shape[2:] != (side, side, 3) or clips.dtype != np.uint8 or clips.shape[1] < LOOKED_AT:
        form = f"{clips.dtype} {list(clips.shape)}"
        raise InputError(
            f"clips must be uint8 [N, T, {side}, {side}, 3] of {LOOKED_AT} frames or more, not {form}", "resize them"
        )
    which = np.linspace(0, clips.shape[1] - 1, LOOKED_AT).round().astype(int)
    colours = np.array(list(vocabulary.palette.values()), np.float32)
    found = []
    for clip in clips:
        border = np.concatenate([clip[:, :BORDER].reshape(-1, 3), clip[:, -BORDER:].reshape(-1, 3)])
        nearest = int(np.square(np.median(border, 0) - colours).sum(1).argmin())
        colour = list(vocabulary.palette)[nearest]
        # relative to the background: then |x - c|^2 = |x|^2 - 2 x.c + |c|^2 loses nothing in float32
        given = _halved(clip[which].astype(np.float32) - colours[nearest]).ravel()
        known = _known(colours[nearest], clips.shape[1])
        errors = np.square(given).sum() - 2 * known @ given + np.square(known).sum(1)
        emoji, motion = divmod(int(errors.argmin()), len(MOTIONS))
        distance = max(0.0, float(errors.min())) / given.size
        found.append((EMOJI[emoji], colour, list(MOTIONS)[motion], distance**0.5))
    return found


@lru_cache(maxsize=2)
def _shapes(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every emoji in every motion, halved: RGB times opacity [emoji x motions, LOOKED_AT x 32 x 32, 3], and
    opacity [.., 1].
    """
    instants = [round(index) / (frames - 1) for index in np.linspace(0, frames - 1, LOOKED_AT)]
    drawn = [_layers(name, motion, instants) for name in EMOJI for motion in MOTIONS]
    return np.stack([_halved(opaque) for opaque, _ in drawn]), np.stack([_halved(alpha) for _, alpha in drawn])


def _known(colour: np.ndarray, frames: int) -> np.ndarray:
    """Return every known clip on a colour [3], less the colour: float32 [emoji x motions, LOOKED_AT x 32 x 32 x 3]."""
    opaque, alpha = _shapes(frames)
    return (opaque - alpha * colour).reshape(len(opaque), -1)


def _halved(frames: np.ndarray) -> np.ndarray:
    """Return the means of 2x2 pixels: ``[T x H/2 x W/2, C]`` for ``[T, H, W, C]``."""
    count, height, width, channels = frames.shape
    return frames.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4)).reshape(-1, channels)


class MotionRow(TypedDict):
    """One clip: emoji, background and motion that were asked for and shown, and whether they agree; ``None``: not asked for."""

    prompt: str
    asked: list[str | None]
    found: list[str]
    distance: float
    emoji: bool | None
    background: bool | None
    motion: bool | None


class MotionAccuracy(TypedDict):
    """What :func:`motion_accuracy` returns."""

    emoji: float
    background: float
    motion: float
    n: int
    distance: float
    per_prompt: list[MotionRow]


def motion_accuracy(clips: np.ndarray, prompts: Sequence[str]) -> MotionAccuracy:
    """Return how many clips show the emoji, the motion and the background that their prompts ask for.

    Args:
        clips: uint8 [N, T, 64, 64, 3].
        prompts: N prompts, in the same order.

    Returns:
        ``emoji``, ``motion``, ``background``: shares in 0..1 over the prompts that state one (NaN if none does);
        ``n``: prompts with a known emoji and motion; ``distance``: mean distance of `classify`; ``per_prompt``.

    Raises:
        InputError: the lengths differ, or the clips are of the wrong kind.
    """
    if len(clips) != len(prompts):
        raise InputError(f"{len(clips)} clips for {len(prompts)} prompts", "give one clip a prompt")
    rows: list[MotionRow] = []
    for prompt, shown in zip(prompts, classify(clips), strict=True):
        emoji, background = parse_prompt(prompt)
        asked = (emoji if emoji in EMOJI else None, background, parse_motion(prompt))
        right = [None if wanted is None else wanted == got for wanted, got in zip(asked, shown[:3], strict=True)]
        rows.append(
            {
                "prompt": prompt,
                "asked": list(asked),
                "found": list(shown[:3]),
                "distance": shown[3],
                "emoji": right[0],
                "background": right[1],
                "motion": right[2],
            }
        )
    return {
        "emoji": _share([row["emoji"] for row in rows]),
        "background": _share([row["background"] for row in rows]),
        "motion": _share([row["motion"] for row in rows]),
        "n": sum(row["emoji"] is not None and row["motion"] is not None for row in rows),
        "distance": float(np.mean([row["distance"] for row in rows])) if rows else float("nan"),
        "per_prompt": rows,
    }


def _share(right: Sequence[bool | None]) -> float:
    """Return the share of the right ones among those that were asked for; NaN where none was."""
    judged = [each for each in right if each is not None]
    return float(np.mean(judged)) if judged else float("nan")


def default_prompts(n: int, seed: int = 0) -> list[str]:
    """Return ``n`` different prompts of varied form, each with an emoji's name, a motion and a background.

    Emoji and motions come round-robin in shuffled orders. The same (n, seed) gives the same list, and a longer list of one seed
    starts with the shorter one.
    """
    vocabulary, rng = load_vocabulary(), random.Random(seed)
    prompts: list[str] = []
    names: list[str] = []
    motions: list[str] = []
    while len(prompts) < n:
        names = names or rng.sample(EMOJI, len(EMOJI))
        motions = motions or rng.sample(list(MOTIONS), len(MOTIONS))
        name, words, colour = names[-1], rng.choice(MOTIONS[motions[-1]].words), rng.choice(list(vocabulary.palette))
        subject = f"{'an' if name[0] in 'aeiou' else 'a'} {name} {words}"
        prompt = rng.choice(vocabulary.templates["joined"]).format(subject=subject, colour=colour)
        if prompt not in prompts:
            prompts.append(prompt)
            names.pop()
            motions.pop()
    return prompts
