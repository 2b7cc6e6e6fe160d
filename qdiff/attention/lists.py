"""Where tokens lie, and which blocks of keys each block of queries reads.

The lists of a whole model are one matrix. Every block of queries of a head reads equally many blocks, so heads lie side by
side, each as wide as it needs: ``blocks[row, bounds[head]:bounds[head + 1]]``. No head pays for another's density, every program
of a kernel has the same work within a head, and an engine takes all lists of all layers as two inputs that can be bound anew
at every step.

A mask with rows of unequal length is a matrix with :data:`NOTHING` at the ends of the shorter ones. The plain ONNX graph takes
no such entries; lists that :mod:`qdiff.attention` makes itself have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import InputError

NOTHING = -1


@dataclass(frozen=True)
class Tiling:
    """How the tokens of one attention are cut.

    Text tokens come first, in their own blocks: they read everything, and everything reads them. The rest is put in a head's
    order and cut into blocks of queries and blocks of keys.

    Args:
        tokens: all of them.
        text: how many of them are text.
        block_q, block_k: tokens of a block; the last block of either part may be short.

    Raises:
        InputError: sizes that make no sense.
    """

    tokens: int
    text: int = 0
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        if not (0 <= self.text < self.tokens and self.block_q > 0 and self.block_k > 0):
            raise InputError(
                f"{self.tokens} tokens, {self.text} of text, in blocks of {self.block_q} x {self.block_k}",
                "there must be tokens beside the text, and blocks of at least one",
            )

    @property
    def ordered(self) -> int:
        """Return tokens that are not text."""
        return self.tokens - self.text

    @property
    def rows(self) -> int:
        """Return blocks of queries, without those of text."""
        return -(-self.ordered // self.block_q)

    @property
    def columns(self) -> int:
        """Return blocks of keys, without those of text."""
        return -(-self.ordered // self.block_k)

    @property
    def text_rows(self) -> int:
        """Return blocks of queries that are text."""
        return -(-self.text // self.block_q)

    @property
    def text_columns(self) -> int:
        """Return blocks of keys that are text."""
        return -(-self.text // self.block_k)

    def places(self, order: Tensor, block: int) -> Tensor:
        """Return which token lies where when the sequence is cut into whole blocks of ``block``: int64 ``[heads,
        places]``, text first, -1 where nothing lies.

        Args:
            order: ``[heads, ordered]``: the tokens that are not text, counted from the first of them, in each head's order.
            block: tokens of a block.
        """
        heads = len(order)
        text = torch.arange(self.text, device=order.device).expand(heads, -1)
        padded = [_fill(text, block), _fill(order.long() + self.text, block)]
        return torch.cat(padded, dim=1)

    def check(self, order: Tensor, lists: BlockLists) -> None:
        """Refuse orders and lists that do not fit.

        Raises:
            InputError: shapes, blocks that do not exist, or an order that is no permutation.
        """
        if order.shape != (lists.heads, self.ordered):
            raise InputError(f"the token order has the shape {list(order.shape)}, wanted {[lists.heads, self.ordered]}")
        if not torch.equal(
            order.long().sort(dim=1).values, torch.arange(self.ordered, device=order.device).expand(lists.heads, -1)
        ):
            raise InputError("a token order names a token twice", "it must be a permutation")
        if len(lists.blocks) != self.rows:
            raise InputError(f"the block lists have {len(lists.blocks)} rows, wanted {self.rows}")
        if lists.blocks.numel() and not NOTHING <= int(lists.blocks.min()) <= int(lists.blocks.max()) < self.columns:
            raise InputError(f"the block lists name a block outside 0 to {self.columns - 1}")


def _fill(tokens: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % block), value=-1)


@dataclass(frozen=True)
class BlockLists:
    """The lists of one or many attentions with equally many blocks of queries.

    Args:
        blocks: int32 ``[rows, total]``: numbers of key blocks, or :data:`NOTHING`.
        bounds: int64 ``[heads + 1]`` in host memory, from 0 to ``total``: the columns of ``blocks`` that belong to each head.

    Raises:
        InputError: bounds that fall or do not span ``blocks``.
    """

    blocks: Tensor
    bounds: Tensor

    def __post_init__(self) -> None:
        bounds = self.bounds
        spans = self.blocks.ndim == 2 and bounds.ndim == 1 and len(bounds) > 1
        if not spans or bounds[0] != 0 or bounds[-1] != self.blocks.shape[1] or bool((bounds.diff() < 0).any()):
            raise InputError(f"the bounds {bounds.tolist()} do not cut lists of the shape {list(self.blocks.shape)}")

    @property
    def heads(self) -> int:
        """Return how many heads have lists here."""
        return len(self.bounds) - 1

    def of(self, head: int) -> Tensor:
        """Return the lists of one head: int32 ``[rows, its blocks]``."""
        return self.blocks[:, int(self.bounds[head]) : int(self.bounds[head + 1])]

    def density(self, columns: int) -> Tensor:
        """Return the share of the block pairs that are read, by head: float64 ``[heads]``."""
        read = torch.stack([(self.of(head) != NOTHING).double().sum() for head in range(self.heads)])
        return read / (len(self.blocks) * columns)

    def masks(self, columns: int) -> Tensor:
        """Return the same as bits: bool ``[heads, rows, columns]``."""
        masks = self.blocks.new_zeros(self.heads, len(self.blocks), columns + 1, dtype=torch.bool)
        for head in range(self.heads):
            masks[head].scatter_(
                1, self.of(head).long().remainder(columns + 1), True
            )  # NOTHING falls into the spare column
        return masks[..., :columns]

    def by_row(self, tiling: Tiling) -> tuple[Tensor, Tensor]:
        """Return what kernels read: for every head and every block of queries, text included, where its list begins and
        the list, with text blocks counted in and without :data:`NOTHING` or repetitions.

        Returns:
            int32 ``[heads, text_rows + rows + 1]`` of offsets, the last one the end, and int32 ``[entries]``.
        """
        masks = self.masks(tiling.columns)
        masks = torch.cat([masks.new_ones(self.heads, len(self.blocks), tiling.text_columns), masks], dim=2)
        masks = torch.cat([masks.new_ones(self.heads, tiling.text_rows, masks.shape[2]), masks], dim=1)
        counts = masks.sum(dim=2).flatten().cumsum(0)
        ends = counts.view(self.heads, -1)
        starts = torch.cat([ends.new_zeros(1), counts[:-1]]).view(self.heads, -1)[:, :1]
        return torch.cat([starts, ends], dim=1).int(), masks.nonzero()[:, 2].int()

    @classmethod
    def of_masks(cls, masks: Tensor) -> BlockLists:
        """Return lists of bool masks ``[heads, rows, columns]``, in rising order; short rows end with
        :data:`NOTHING`.
        """
        counts = masks.sum(dim=2)
        widths = counts.amax(dim=1).cpu()
        ranked = torch.argsort(masks.int(), dim=2, descending=True, stable=True).int()
        ranked = ranked.masked_fill(torch.arange(masks.shape[2], device=masks.device) >= counts[..., None], NOTHING)
        blocks = torch.cat([ranked[head, :, : int(width)] for head, width in enumerate(widths)], dim=1)
        return cls(blocks, torch.cat([widths.new_zeros(1), widths.cumsum(0)]))

    @classmethod
    def full(cls, heads: int, tiling: Tiling) -> BlockLists:
        """Return every block of keys for every block of queries."""
        row = torch.arange(tiling.columns, dtype=torch.int32).repeat(heads)
        return cls(row.expand(tiling.rows, -1).contiguous(), torch.arange(heads + 1) * tiling.columns)

    @classmethod
    def joined(cls, parts: list[BlockLists]) -> BlockLists:
        """Return lists of several attentions as one matrix; heads are counted through."""
        widths = torch.cat([part.bounds.diff() for part in parts])
        return cls(
            torch.cat([part.blocks for part in parts], dim=1), torch.cat([widths.new_zeros(1), widths.cumsum(0)])
        )
