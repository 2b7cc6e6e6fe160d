"""What a text-to-image model of the zoo is trained on: (latents, caption) pairs, and which pairs it never sees.

Latents of all (emoji, background) pairs are computed once, with a few jitters of the background. One pair in ten is held
out: the evaluation asks for those apart, to see whether the model combines or remembers. Pairs with the white background
are never held out, since captions without a colour need them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from zoo.autoencoder import encode
from zoo.captions import all_words, caption
from zoo.emoji import PALETTE, compose, load_table, sprites

HELD_OUT = 0.1
UNSTATED = "white"


def held_out(seed: int = 0) -> np.ndarray:
    """Return which pairs training never sees. Shape [emoji, backgrounds], bool; the same for every model of the zoo."""
    colours = list(PALETTE)
    chosen = np.random.default_rng(seed + 1234).random((len(load_table()), len(colours))) < HELD_OUT
    chosen[:, colours.index(UNSTATED)] = False
    return chosen


def pictures(jitters: int, seed: int) -> Iterator[np.ndarray]:
    """Yield all emoji on one background at a time: every colour, ``jitters`` shades of it (the first is exact).

    Yields:
        float32 [emoji, 64, 64, 3] in 0..255.
    """
    drawn, rng = sprites(), np.random.default_rng(seed)
    for rgb in PALETTE.values():
        for jitter in range(jitters):
            shift = rng.uniform(-5, 5, (len(drawn), 3)) if jitter else np.zeros((len(drawn), 3))
            yield compose(drawn, np.clip(np.array(rgb) + shift, 0, 255).astype(np.float32))


@dataclass
class Pairs:
    """Scaled latents of every (emoji, background, jitter), and the captions that go with them.

    ``latents`` is float32 [emoji, backgrounds, jitters, 4, 16, 16].
    """

    latents: Tensor
    names: list[list[str]]
    colours: list[str]
    seen: np.ndarray

    @classmethod
    def build(cls, vae: nn.Module | None, jitters: int = 2, seed: int = 0) -> Pairs:
        """Draw and encode everything (half a minute on two cores); captions alone, with empty latents, if ``vae`` is None."""
        table, colours = load_table(), list(PALETTE)
        if vae is None:
            latents = torch.empty(len(table), len(colours) * jitters, 0)
        else:
            found = [encode(vae, images).cpu() for images in pictures(jitters, seed)]
            latents = torch.stack(found, 1) * vae.config.scaling_factor  # type: ignore[union-attr, operator]
        names = [[str(row["name"]), *row["synonyms"]] for row in table]  # type: ignore[misc]
        shape = (len(table), len(colours), jitters, *latents.shape[2:])
        return cls(latents.reshape(shape), names, colours, ~held_out())

    def sample(self, size: int, rng: random.Random, empty: float = 0.1) -> tuple[Tensor, list[str]]:
        """Return ``size`` training pairs: latents [size, 4, 16, 16] and captions, of which a share ``empty`` is ""."""
        latents, captions = [], []
        while len(captions) < size:
            emoji, stated = rng.randrange(len(self.names)), rng.random() < 0.78
            colour = rng.randrange(len(self.colours)) if stated else self.colours.index(UNSTATED)
            if not self.seen[emoji, colour]:
                continue
            latents.append(self.latents[emoji, colour, rng.randrange(self.latents.shape[2])])
            text = caption(self.names[emoji], self.colours[colour] if stated else None, rng)
            captions.append("" if rng.random() < empty else text)
        return torch.stack(latents), captions

    def words(self) -> list[str]:
        """Return every text that a caption is made of, for the tokenizer."""
        return all_words(load_table(), self.colours)
