"""Masks as a picture: what each head reads, a row for each head and a column for each group of timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, GAP = 96, 8  # pixels of a mask, at least, and between masks
READ, LEFT_OUT, PAPER = (31, 78, 121), (222, 226, 232), (255, 255, 255)
MOST_HEADS = 24


def draw_masks(masks: Tensor) -> Image:
    """Return one picture of bool masks ``[groups, heads, rows, columns]``; heads beyond :data:`MOST_HEADS` are left
    out, evenly.

    Heads run from left to right, groups from top to bottom, the noisiest first. In a mask, queries run down and keys across.
    """
    from PIL import Image

    heads = torch.linspace(0, masks.shape[1] - 1, min(MOST_HEADS, masks.shape[1])).round().long()
    shown = masks[:, heads]
    scale = max(1, -(-SIDE // shown.shape[-1]))
    colours = torch.tensor([LEFT_OUT, READ], dtype=torch.uint8)[shown.long()]  # [groups, heads, rows, columns, 3]
    tiles = colours.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    groups, count, height, width, _ = tiles.shape
    sheet = (
        torch.tensor(PAPER, dtype=torch.uint8)
        .expand(groups * (height + GAP) - GAP, count * (width + GAP) - GAP, 3)
        .clone()
    )
    for group in range(groups):
        for head in range(count):
            top, left = group * (height + GAP), head * (width + GAP)
            sheet[top : top + height, left : left + width] = tiles[group, head]
    return Image.fromarray(sheet.numpy())
