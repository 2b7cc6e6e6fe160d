"""The modules: blocks with several branches, and the branch_state on which their routes hang.

    out    = branch_r(in)          or, where the block is not computed,   in + delta
    delta  = out - in
    change = |delta|_1 / |in|_1                  (6Bit-Diffusion, arXiv 2603.18742: Gamma)
    drift  = |delta - delta_before|_1 / |delta_before|_1

In torch a route is read on the host and only its branch runs. In a traced graph all branches are there, joined by the op
``qdiff::choose``; export turns each of them into an ONNX ``If`` that holds its branches (:mod:`qdiff.export.branches`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, option
from qdiff.routing import ops

if TYPE_CHECKING:
    from qdiff.routing.router import Router

TINY = 1e-20  # no block's input or delta sums to less, unless there is none yet


class BranchState:
    """Routes, deltas and reports of the blocks of one backbone.

    ``routes`` (a list, or in a traced graph a tensor ``[blocks]``) and ``deltas [blocks, batch, ..., width]`` (tokens on one
    axis, or on several) are set before a call; ``reports`` is filled by it. Without deltas nothing is reused.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.routes: Sequence[int] | Tensor = [0] * blocks
        self.deltas: Tensor | None = None
        self.router: Router | None = None  # who sets the routes of calls in torch
        self.caching = False  # whether deltas are kept
        self.noise = 0.0  # of what blocks add, relative: to find out what becomes of errors
        self.pinned = False  # whether routes are set from outside: no router is asked
        self._reports: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def clear(self) -> None:
        """Forget what the last call reported."""
        self._reports.clear()

    def previous(self, index: int, states: Tensor) -> Tensor | None:
        """Return the cached delta of a block, in the shape of its input ``[batch, tokens, width]``."""
        if self.deltas is None:
            return None
        return ops.shaped_like(self.deltas[index].to(states.dtype), states)

    def choose_branch(self, index: int, alternatives: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Return what the route of a block says."""
        if isinstance(self.routes, Tensor):
            return ops.choose(self.routes[index], [alternative() for alternative in alternatives])
        return alternatives[self.routes[index]]()

    def report(self, index: int, states: Tensor, out: Tensor, previous: Tensor | None) -> None:
        """Keep what a block changed."""
        delta = (out - states).float()
        change = _sizes(delta) / _sizes(states.float()).clamp(min=TINY)
        if not self.caching:
            self._reports[index] = change, None, None
            return
        before = torch.zeros_like(delta) if previous is None else previous.float()
        drift = _sizes(delta - before) / _sizes(before).clamp(min=TINY)
        self._reports[index] = change, drift, delta

    def changes(self) -> Tensor:
        """Return the changes ``[blocks, batch]`` of the last call."""
        return torch.stack([self._reports[index][0] for index in range(self.blocks)])

    def drifts(self) -> Tensor:
        """Return the drifts ``[blocks, batch]`` of the last call; huge where there was no delta before."""
        return torch.stack([_there(self._reports[index][1]) for index in range(self.blocks)])

    def new_deltas(self) -> Tensor:
        """Return the new deltas ``[blocks, batch, tokens, width]`` of the last call."""
        return torch.stack([_there(self._reports[index][2]) for index in range(self.blocks)])


def _there(value: Tensor | None) -> Tensor:
    assert value is not None  # only asked for with caching
    return value


def _sizes(x: Tensor) -> Tensor:
    """Return the sum of magnitudes of each sample: ``[batch]``."""
    return x.abs().flatten(1).sum(dim=1)


class BranchedBlock(nn.Module):
    """A block of a chain with its branches.

    Args:
        branches: modules of one signature, whose first argument and result are hidden states ``[batch, tokens, width]``.
        index: of this block on the branch_state.
    """

    def __init__(self, branches: Sequence[nn.Module], index: int, branch_state: BranchState) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.index, self.branch_state = index, branch_state

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block with the arguments of its own ``forward``."""
        previous = self.branch_state.previous(self.index, hidden_states)
        alternatives: list[Callable[[], Tensor]] = [
            _Call(branch, hidden_states, args, kwargs) for branch in self.branches
        ]
        if previous is not None:
            alternatives.append(lambda: hidden_states + previous)
        out = self.branch_state.choose_branch(self.index, alternatives)
        if self.branch_state.noise:
            out = disturbed(hidden_states, out, self.branch_state.noise, self.index)
        self.branch_state.report(self.index, hidden_states, out, previous)
        return out


def disturbed(states: Tensor, out: Tensor, noise: float, seed: int) -> Tensor:
    """Return a block's output with white noise, ``noise`` times as large as what the block added (root mean square)."""
    random = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return out + noise * (out - states).square().mean().sqrt() * random.to(out)


class _Call:
    """One branch, waiting."""

    def __init__(self, branch: nn.Module, states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.branch, self.states, self.args, self.kwargs = branch, states, args, kwargs

    def __call__(self) -> Tensor:
        return self.branch(self.states, *self.args, **self.kwargs)


def branch_name(block: str, branch: int) -> str:
    """Return the module of a branch."""
    return f"{block}.branches.{branch}"


def in_branches(layer: str, branches: Mapping[str, int]) -> list[str]:
    """Return what a module of the float backbone is called in every branch of its block; its own name where that has
    none.

    Args:
        layer: name in the float backbone.
        branches: how many, by block.
    """
    for block, count in branches.items():
        if layer.startswith(f"{block}."):
            return [f"{branch_name(block, branch)}{layer.removeprefix(block)}" for branch in range(count)]
    return [layer]


def install_branches(backbone: nn.Module, branches: dict[str, int]) -> BranchState:
    """Give blocks copies of themselves as branches, in place.

    Args:
        backbone: which is changed in place.
        branches: how many, by block, in the order of the chain.

    Raises:
        InputError: a block that the backbone does not have.
    """
    branch_state = BranchState(len(branches))
    for index, (name, count) in enumerate(branches.items()):
        try:
            block = backbone.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"the model has no block {name!r} to route",
                f"the plan is of another model: quantize again with {option('force', True)}",
            ) from None
        copies = [block, *(copy.deepcopy(block) for _ in range(count - 1))]
        backbone.set_submodule(name, BranchedBlock(copies, index, branch_state))
    return branch_state


def branches_of(backbone: nn.Module) -> dict[str, int]:
    """Return how many branches each block of a backbone has, by name; empty where they have none."""
    return {
        name: len(module.branches) for name, module in backbone.named_modules() if isinstance(module, BranchedBlock)
    }


def branch_state_of(backbone: nn.Module) -> BranchState | None:
    """Return the branch_state of a backbone's blocks, or ``None`` where they have no branches."""
    return next((module.branch_state for module in backbone.modules() if isinstance(module, BranchedBlock)), None)
