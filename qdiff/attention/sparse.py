"""A backbone whose self-attentions follow block lists: the lists beside the plan, and their way into a model.

The plan (:class:`qdiff.plan.attention_plan.AttentionPlan`, made by :mod:`qdiff.allocation.attention_masks`) says what was
decided and how good it is, for people. The masks
themselves are bits in ``attention.safetensors`` beside it; lists are made from them when a model is built.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff import device
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.operator import sparse_attention
from qdiff.attention.orders import order_named
from qdiff.attention.schedule import Schedule, ScheduleState, one_timestep
from qdiff.errors import IntegrityError, option
from qdiff.files import open_tensors, save_tensors
from qdiff.plan.attention_plan import AttentionPlan
from qdiff.routing.blocks import branches_of, in_branches

if TYPE_CHECKING:
    from qdiff.models.base import Family

SIDECAR = "attention.safetensors"


def tiling_of(plan: AttentionPlan) -> Tiling:
    """Return how the tokens of a plan are cut."""
    return Tiling(plan.tokens, plan.text, plan.block_q, plan.block_k)


def save_masks(chosen: Tensor, path: Path) -> None:
    """Write bool masks ``[groups, heads, rows, columns]`` as bits."""
    padded = torch.nn.functional.pad(chosen.to(torch.uint8), (0, -chosen.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    bits = (padded.unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)
    save_tensors(path, {"masks": bits}, {"qdiff": "attention"})


def load_masks(plan: AttentionPlan, path: Path) -> Tensor:
    """Return what :func:`save_masks` wrote beside a plan.

    Raises:
        InputError: missing.
        IntegrityError: damaged, or masks of another plan.
    """
    tiling = tiling_of(plan)
    with open_tensors(path, "the masks of attention") as file:
        bits = file.get_tensor("masks")
    wanted = [len(plan.edges), plan.heads, tiling.rows, -(-tiling.columns // 8)]
    if list(bits.shape) != wanted or bits.dtype != torch.uint8:
        raise IntegrityError(
            f"{path} holds masks of the shape {list(bits.shape)}, the plan wants {wanted}",
            f"quantize again with {option('force', True)}",
        )
    shifts = torch.arange(8, dtype=torch.uint8)
    chosen = (bits[..., None] >> shifts & 1).flatten(-2)[..., : tiling.columns].bool()
    if not bool(chosen.any(dim=-1).all()):
        raise IntegrityError(f"{path} holds rows that read nothing", f"quantize again with {option('force', True)}")
    return chosen


def schedule_of(plan: AttentionPlan, chosen: Tensor) -> Schedule:
    """Return the lists of a plan from bool masks ``[groups, heads, rows, columns]``."""
    everything = BlockLists.full(plan.heads, tiling_of(plan))
    return Schedule(plan.edges, [everything, *(BlockLists.of_masks(group) for group in chosen)])


def load_schedule(plan: AttentionPlan, folder: Path) -> Schedule:
    """Return the lists of a plan from the masks beside it. Raises as :func:`load_masks`."""
    return schedule_of(plan, load_masks(plan, folder / SIDECAR))


def schedule_state_of(backbone: nn.Module) -> ScheduleState | None:
    """Return where the lists of a backbone hang, or ``None`` where its attentions are dense."""
    return next(
        (module.schedule_state for module in backbone.modules() if isinstance(module, SparseSelfAttention)), None
    )


class SparseSelfAttention(nn.Module):
    """What takes the place of the two products of one self-attention.

    Args:
        orders: ``[heads, ordered]``.
        first: number of its first head among those of all sparse attentions.
    """

    def __init__(
        self, orders: Tensor, first: int, tiling: Tiling, numerics: str, schedule_state: ScheduleState
    ) -> None:
        super().__init__()
        self.register_buffer("orders", orders.to(torch.int32), persistent=False)
        self.first, self.tiling, self.numerics, self.schedule_state = first, tiling, numerics, schedule_state

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention ``[batch, heads, tokens, size]`` of queries, keys and values of that shape."""
        blocks, bounds = self.schedule_state.read()
        tiling = self.tiling
        cut = (tiling.text, tiling.block_q, tiling.block_k)
        return sparse_attention(
            q, k, v, self.orders, blocks, bounds, self.first, *cut, self.numerics, q.shape[-1] ** -0.5
        )


def install(family: Family, backbone: nn.Module, plan: AttentionPlan, schedule: Schedule) -> ScheduleState:
    """Put the lists into ``backbone``: its attentions of the plan follow them, by the value of its ``timestep``
    argument, in every branch of their block.

    Args:
        family: of the backbone.
        backbone: which is changed in place.
        plan: the self-attentions and their lists.
        schedule: which lists hold at which timestep.

    Raises:
        IntegrityError: an attention that the model does not have.
    """
    schedule_state, first, branches = ScheduleState(schedule), 0, branches_of(backbone)
    known = family.self_attentions(backbone)
    for layer in plan.layers:
        if layer.name not in known:
            raise IntegrityError(
                f"the plan names the attention {layer.name!r}, which the model does not have",
                f"quantize again with {option('force', True)}",
            )
        orders = torch.stack([order_named(head.order, plan.grid) for head in layer.heads]).to(device.of(backbone))
        for name in in_branches(layer.name, branches):
            module: Any = backbone.get_submodule(name)
            module.sparse = SparseSelfAttention(orders, first, tiling_of(plan), plan.numerics, schedule_state)
            module.set_processor(family.attention_processor(module.sparse))
        first += len(layer.heads)
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]

    def follow(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if schedule_state.pinned is None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            schedule_state.set(one_timestep(torch.as_tensor(given["timestep"])))

    backbone.register_forward_pre_hook(follow, with_kwargs=True)
    return schedule_state
