"""The first token of text states, where it is the same for every prompt (:mod:`qdiff.nn.surgery`), kept apart from the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qdiff.events import log
from qdiff.recording.activation_statistics import InputStatistics

_SAME = 1e-3  # of its norm: float16 text encoders repeat it to about 1e-3


class FirstToken:
    """Sees the first token of every call, ``[in]``.

    A token of zeros (an empty prompt of SDXL) says nothing. If two others differ, the first token is not constant, and its values
    go back into the tables.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.token, self.low, self.high = torch.zeros(3, channels, device=device).unbind()
        self.constant = torch.ones(1, device=device)
        self.tokens = torch.zeros(1, device=device)

    def take(self, x: Tensor) -> Tensor:
        """Return everything of ``x [B, tokens, in]`` but the first tokens, and keep those."""
        first = x[:, 0]
        self.tokens.fill_(x.shape[1])
        self.low, self.high = torch.minimum(self.low, first.amin(0)), torch.maximum(self.high, first.amax(0))
        for token in first[first.square().sum(dim=1) > 0]:
            if not self.token.any():
                self.token = token.clone()
            elif (token - self.token).norm() > _SAME * self.token.norm():
                self.constant.zero_()
        return x[:, 1:]

    def state(self) -> Tensor:
        """Return everything that is needed to go on later, in one row."""
        return torch.cat([self.token, self.low, self.high, self.constant, self.tokens])

    def restore(self, state: Tensor) -> None:
        """Take back what :meth:`state` gave."""
        *tables, rest = state.split([len(self.token)] * 3 + [2])
        self.token, self.low, self.high = (table.clone() for table in tables)
        self.constant, self.tokens = rest[:1].clone(), rest[1:].clone()

    def into(self, entry: InputStatistics) -> InputStatistics:
        """Return the statistics of the other tokens, with the constant token; without one, with the range of the first
        tokens.
        """
        if self.constant.item() and self.token.any():
            return replace(entry, first=self.token, tokens=int(self.tokens.item()))
        log.warning("collect: the first token that %s reads is not the same for every prompt", entry.layers[0])
        return replace(entry, low=torch.minimum(entry.low, self.low), high=torch.maximum(entry.high, self.high))
