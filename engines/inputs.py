"""What an engine's graph wants to be given, and the check and cast that every runner does before it runs.

A wrong name or shape reaches a backend as a message about internal node numbers (or, with shared memory, as a wrong
picture). So the check is made here, once, against the graph's own declaration, in the words of the model.

Only casts that keep the value's meaning are made: int → float (diffusers' integer timesteps), float → float (an FP16
graph), bool ↔ int (masks). A float where the graph wants an integer is an error: it would cut off digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdiff.errors import InputError, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """One input of a graph.

    Args:
        name: its name in the graph.
        dtype: torch's name of its element type, e.g. ``"float32"``.
        shape: a number is fixed, a string is a symbol (equal symbols are equal sizes), ``None`` is any size.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype}[{sizes}]"


def conform(inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors in the order and the element types of ``specs``, contiguous; values and devices unchanged.

    Raises:
        InputError: a missing or unknown name, a wrong rank or size, two sizes for one symbol, a float for an integer.
    """
    known = [spec.name for spec in specs]
    for name in inputs:
        if name not in known:
            raise unknown_name("engine input", name, known, InputError)
    symbols: dict[str, tuple[int, str]] = {}
    result = {}
    for spec in specs:
        if spec.name not in inputs:
            raise InputError(f"the engine's input {spec} was not given", f"give all of: {', '.join(known)}")
        tensor = inputs[spec.name]
        _check_shape(tuple(tensor.shape), spec, symbols)
        result[spec.name] = _cast(tensor, spec)
    return result


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, symbols: dict[str, tuple[int, str]]) -> None:
    fix = "export and build for this size, or resize the input"
    if len(shape) != len(spec.shape):
        raise InputError(f"{spec} was given {len(shape)} axes: {list(shape)}", fix)
    for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            raise InputError(f"{spec} was given {list(shape)}: axis {axis} has to be {wanted}", fix)
        if isinstance(wanted, str):
            first, owner = symbols.setdefault(wanted, (size, spec.name))
            if first != size:
                raise InputError(f"{spec} was given {list(shape)}, but {wanted!r} is {first} in {owner!r}", fix)


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    import torch

    wanted: torch.dtype = getattr(torch, spec.dtype)
    if tensor.is_floating_point() and not wanted.is_floating_point:
        raise InputError(
            f"{spec} was given {tensor.dtype} values", f"cast it on purpose: {spec.name}.to(torch.{spec.dtype})"
        )
    return tensor.detach().to(wanted).contiguous()


class Copies:
    """Inputs on the device of an engine. One that lasts (:attr:`~.base.Runner.lasting`) is copied once, not at every step; its
    copy lives as long as itself.
    """

    def __init__(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        self._copies = WeakIdKeyDictionary()

    def of(self, given: Tensor, conformed: Tensor, device: torch.device, lasts: bool) -> Tensor:
        """Return ``conformed`` on ``device``.

        Args:
            given: what the caller gave, of which ``conformed`` has the values: the same object is the same input.
            conformed: the values, in the order and the element type that the engine takes.
            device: on which the result lies.
            lasts: whether nobody changes ``given``.
        """
        if conformed.device == device or not lasts:
            return conformed.to(device)
        if given not in self._copies:
            self._copies[given] = conformed.to(device)
        copy: Tensor = self._copies[given]
        return copy

    def clear(self) -> None:
        """Let all copies go."""
        self._copies.clear()
