"""Rows that did nothing, or the same as another, are bugs of the benchmark and not results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOAT = "float"


class EqualRowsError(Exception):
    """Two rows gave the same predictions: one of them has not done what its name says."""


def check_different(predictions: Mapping[str, Tensor], twins: Mapping[str, str | None] | None = None) -> None:
    """Compare every row's predictions on the held-out calls with float's and with every other row's.

    Args:
        predictions: by row; float's under :data:`FLOAT`.
        twins: for a row the one other row that may equal it, since both say the same in two libraries.

    Raises:
        EqualRowsError: naming both rows.
    """
    twins = twins or {}
    names = list(predictions)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if twins.get(first) == second or twins.get(second) == first:
                continue
            if torch.equal(predictions[first], predictions[second]):
                raise EqualRowsError(f"the predictions of {first!r} and {second!r} are equal in every bit")
