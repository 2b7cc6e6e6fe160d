"""What the video model of the zoo is trained on: (latents, caption) of short clips, and of their first frames alone.

A clip shows one emoji in one motion on one background (`qdiff.evaluation.motion`). Its first latent frame depends on its
first frame alone, as the autoencoder is causal: so a model can learn from pictures what is where before it learns how that moves.

Clips are encoded once, in parts of `PART` that are kept in the work folder: stop at any time, the same command goes on.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdiff.evaluation.motion import EMOJI, MOTIONS, draw
from zoo.captions import MOVING, all_words, clip_caption
from zoo.data import held_out
from zoo.emoji import PALETTE, load_table
from zoo.video_autoencoder import FRAMES, encode

PART = 64
Clip = tuple[str, str, str]  # emoji, colour, motion


def all_clips(unseen: bool = False) -> list[Clip]:
    """Return every clip of the training set, or every clip of an (emoji, colour) pair that is held out; in a fixed
    random order.
    """
    names, apart = [str(row["name"]) for row in load_table()], held_out()
    found = [
        (name, colour, motion)
        for name in EMOJI
        for index, colour in enumerate(PALETTE)
        if apart[names.index(name), index] == unseen
        for motion in MOTIONS
    ]
    random.Random(0).shuffle(found)
    return found


def caption_of(clip: Clip, rng: random.Random) -> str:
    """Return a random caption of a clip."""
    name, colour, motion = clip
    row = next(row for row in load_table_once() if row["name"] == name)
    return clip_caption([name, *row["synonyms"]], rng.choice(MOTIONS[motion].words), colour, rng)  # type: ignore[misc]


_TABLE: list[dict[str, object]] = []


def load_table_once() -> list[dict[str, object]]:
    """Return the table of emoji, read once."""
    if not _TABLE:
        _TABLE.extend(load_table())
    return _TABLE


@dataclass
class Clips:
    """Normalised latents with their clips; :meth:`sample` draws first frames until :attr:`moving`, whole clips then.

    ``stills`` is [clips, C, 1, h, w]; ``moved`` is [fewer, C, T, h, w], both float16, of the first clips of ``clips``.
    """

    clips: list[Clip]
    stills: Tensor
    moved: Tensor
    moving: bool = False

    @classmethod
    def build(cls, vae: nn.Module | None, folder: Path, moving: int) -> Clips:
        """Encode all first frames and ``moving`` whole clips, or read them; captions alone if ``vae`` is None."""
        clips = all_clips()
        if vae is None:
            return cls(clips, torch.empty(len(clips), 0), torch.empty(0, 0))
        stills = encoded(vae, clips, folder / "stills", [0])
        return cls(clips, stills, encoded(vae, clips[:moving], folder / "clips", range(FRAMES)))

    def sample(self, size: int, rng: random.Random, empty: float = 0.1) -> tuple[Tensor, list[str]]:
        """Return ``size`` latents [size, C, T, h, w] and captions, of which a share ``empty`` is ""."""
        latents = self.moved if self.moving else self.stills
        chosen = [rng.randrange(len(latents)) for _ in range(size)]
        captions = ["" if rng.random() < empty else caption_of(self.clips[index], rng) for index in chosen]
        return latents[chosen].float(), captions

    def words(self) -> list[str]:
        """Return every text that a caption is made of, for the tokenizer."""
        motions = [words for motion in MOTIONS.values() for words in motion.words]
        rows = [row for row in load_table() if row["name"] in EMOJI]
        return [*all_words(rows, list(PALETTE)), *motions, *(subject.format(name="", thing="") for subject in MOVING)]


def encoded(vae: nn.Module, clips: list[Clip], folder: Path, which: range | list[int]) -> Tensor:
    """Return the normalised latents of the frames ``which`` of each clip, float16 [N, C, T, h, w]; read where
    ``folder`` has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(clips), PART):
        path = folder / f"{start:06d}.safetensors"
        part = clips[start : start + PART]
        if not path.exists() or len(latents := load_file(path)["latents"]) < len(part):
            frames = np.stack([draw(*clip, FRAMES, which) for clip in part])
            latents = encode(vae, frames).half()
            save_file({"latents": latents.contiguous()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            print(f"{folder.name} {start + len(part)}/{len(clips)}", file=sys.stderr, flush=True)
        parts.append(latents[: len(part)])
    return torch.cat(parts)
