"""What a model's self-attentions look at: orders of tokens, masses of blocks, and what leaving blocks out costs.

Four passes over the recorded trajectory, all with the float model:

1. **Orders.** The probabilities of sampled queries are computed once and binned for every candidate order
   (:mod:`qdiff.attention.orders`). A head gets the order in which the fewest blocks hold 98 % of each row's mass: a row of
   probabilities is the same in every order, only its bins differ.
2. **Masses.** In that order every query's probabilities, a tile of queries at a time, are added up by block. The largest over all
   samples of a group of timesteps is kept, so that no prompt is forgotten.
3. **Errors.** What a head's output changes by when each row keeps only its heaviest blocks, for every number of blocks, seen
   through the head's part of the output projection.
4. **Weights.** One attention at a time is made sparse, and the change of the backbone's prediction says what those errors weigh.

So heads compete by what the picture loses, not by mass. Nothing of ``tokens x tokens`` is ever held: the largest thing is a tile
of queries times all keys.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qdiff.attention import gathered, masks
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import NUMERICS
from qdiff.attention.orders import Grid, candidates, order_named
from qdiff.attention.packing import at_places
from qdiff.attention.schedule import Schedule, edges_of
from qdiff.attention.statistics import AttentionStatistics
from qdiff.errors import InputError, option
from qdiff.events import Progress
from qdiff.models.model import Model
from qdiff.recording.inputs import latent_of
from qdiff.recording.trajectory import Step, Trajectory
from qdiff.runs.partial import Scratch

COVERED = 0.98  # of a row's mass, for choosing an order
SAMPLED_QUERIES = 2048
TILE_NUMBERS = 2**24  # scores in memory at once
PROBED_DENSITY = 0.25
FEWEST_PROTECTED = 6  # from so many self-attentions on, the first and the last stay dense

Seen = Callable[[str, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class AttentionOptions:
    """How self-attentions are looked at.

    Args:
        block: tokens of a block; ``None``: by the number of tokens (:func:`block_for`).
        dense: share of the noise schedule from which on everything is read.
        groups: of timesteps below that.
        steps: recorded calls of each group and shard whose masses are added up.
        shards: of the trajectory, at most.
        orders: names of those that a head may get (:mod:`qdiff.attention.orders`); empty: all candidates.
    """

    block: int | None = None
    dense: float = 0.9
    groups: int = 3
    steps: int = 2
    shards: int = 2
    orders: tuple[str, ...] = ()


def block_for(tokens: int) -> int:
    """Return the block size in tokens: 128 where there are many (kernels are fastest so), 64 below, and less where
    there would be fewer than 16 blocks.
    """
    largest = 128 if tokens >= 16384 else 64
    return next((block for block in (128, 64, 32) if block <= largest and tokens >= 16 * block), 16)


class AttentionCalibration:
    """The four passes; see the module's docstring.

    Args:
        model: float; put back as it was after every pass.
        scratch: where finished passes are kept, so that a killed calibration goes on with the next.

    Raises:
        InputError: a family without known self-attentions, or a trajectory without a step in the sparse groups.
    """

    def __init__(
        self, model: Model, trajectory: Trajectory, options: AttentionOptions, scratch: Scratch | None
    ) -> None:
        self.model, self.options, self.scratch = model, options, scratch
        names = model.family.self_attentions(model.backbone)
        if not names:
            raise InputError(
                f"no self-attentions of {model.family.title} are known",
                f"leave {option('attention')} out: this family runs dense",
            )
        self.layers = names[1:-1] if len(names) >= FEWEST_PROTECTED else names
        steps = list(trajectory.steps(0, once=True))
        self.edges = edges_of([step.timestep for step in steps], options.dense, options.groups)
        self.schedule = Schedule(self.edges, [])
        self.groups = len(self.edges)
        config = model.config
        latent = steps[0].inputs[latent_of(model.family.inputs(config)).name].shape
        self.grid: Grid = model.family.grid(config, latent)
        text, ordered = model.family.text_tokens(config), math.prod(self.grid)
        block = options.block or block_for(ordered)
        self.tiling = Tiling(text + ordered, text, block, block)
        self.shards = [
            self._chosen(trajectory.steps(shard)) for shard in range(min(options.shards, len(trajectory.paths)))
        ]
        if any(not group for group in self.shards[0]):
            raise InputError(
                f"no recorded timestep lies below {options.dense:g} of the noise schedule in one of {options.groups} groups",
                "calibrate with more steps",
            )
        self.orders = {name: order_named(name, self.grid) for name in options.orders} or candidates(self.grid, block)
        self.orders = {name: order.to(model.device) for name, order in self.orders.items()}
        self.positions = [torch.argsort(order) for order in self.orders.values()]

    def run(self) -> AttentionStatistics:
        """Return all passes."""
        with Progress("attention", self._calls()) as progress:
            self.progress = progress
            chosen = self._kept("orders", self._choose_orders)
            names = list(self.orders)
            self.heads = chosen["choice"].shape[1]
            orders = [[names[int(head)] for head in layer] for layer in chosen["choice"]]
            mass = self._kept("mass", lambda: self._add_up(orders))["mass"].to(self.model.device)
            options = masks.widths(self.tiling)
            errors = self._kept("errors", lambda: self._errors(orders, mass, options))["errors"]
            weights = self._kept("weights", lambda: self._weights(orders, mass, options, errors))["weights"]
        return AttentionStatistics(
            self.layers,
            self.grid,
            self.tiling,
            self.edges,
            orders,
            mass.half().cpu(),
            options,
            errors * weights[:, :, None, None],
        )

    def _chosen(self, steps: Iterator[Step]) -> list[list[Step]]:
        """Return steps of each group, evenly spread."""
        groups: list[list[Step]] = [[] for _ in range(self.groups)]
        for step in steps:
            group = self.schedule.group(step.timestep)
            if group:
                groups[group - 1].append(step)
        count = self.options.steps
        return [
            group if len(group) <= count else [group[round((i + 0.5) * len(group) / count - 0.5)] for i in range(count)]
            for group in groups
        ]

    def _calls(self) -> int:
        masses = sum(len(group) for shard in self.shards for group in shard)
        return self.groups * (2 + 1 + len(self.layers)) + masses

    def _kept(self, part: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = None if self.scratch is None else self.scratch.load(part)
        if found is not None:
            return found[0]
        made = work()
        if self.scratch is not None:
            self.scratch.save(part, made, None)
        return made

    def _middle(self) -> Iterator[tuple[int, Step]]:
        """Yield one step of each group, of the first shard."""
        for number, group in enumerate(self.shards[0]):
            yield number, group[len(group) // 2]

    def _replay(self, step: Step, seen: Seen | None = None, sparse: dict[str, gathered.Follow] | None = None) -> Tensor:
        with _watched(self.model, self.layers, seen, sparse or {}), torch.inference_mode():
            prediction = self.model.family.call(self.model.backbone, step.inputs)
        self.progress.advance()
        return prediction.float()

    def _choose_orders(self) -> dict[str, Tensor]:
        needed: dict[str, Tensor] = {}

        def observe(layer: str, q: Tensor, k: Tensor, v: Tensor) -> None:
            need = torch.stack(
                [
                    torch.stack([self._needed(q[sample, head], k[sample, head]) for head in range(q.shape[1])])
                    for sample in _both_branches(q)
                ]
            ).sum(dim=0)
            needed[layer] = needed.get(layer, 0) + need

        for _, step in self._middle():
            self._replay(step, observe)
        return {"choice": torch.stack([needed[layer].argmin(dim=1) for layer in self.layers])}

    def _needed(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the mean share of the blocks that hold :data:`COVERED` of a row's mass, for every candidate:
        ``[candidates]``. Text does not count: it is read in any case.
        """
        tiling = self.tiling
        q = q[tiling.text :]
        count = min(SAMPLED_QUERIES, len(q))
        queries = torch.randperm(len(q), generator=torch.Generator().manual_seed(0))[:count].to(q.device)
        found = [q.new_zeros(tiling.rows, tiling.columns) for _ in self.orders]
        ends = torch.nn.functional.pad
        for tile in queries.split(max(1, TILE_NUMBERS // len(k))):
            shares = torch.softmax(q[tile] @ k.T * q.shape[1] ** -0.5, dim=1)[:, tiling.text :]
            for mass, order, position in zip(found, self.orders.values(), self.positions, strict=True):
                row = position[tile] // tiling.block_q
                bins = ends(shares[:, order], (0, -len(order) % tiling.block_k))
                mass.index_add_(0, row, bins.unflatten(1, (-1, tiling.block_k)).sum(dim=2))
        needs = []
        for mass in found:
            there = mass[mass.sum(dim=1) > 0]
            falling = there.sort(dim=1, descending=True).values.cumsum(dim=1)
            needs.append((falling < COVERED * there.sum(dim=1, keepdim=True)).sum(dim=1).double().mean() + 1)
        return torch.stack(needs) / tiling.columns

    def _add_up(self, orders: list[list[str]]) -> dict[str, Tensor]:
        tiling = self.tiling
        shape = self.groups, len(self.layers), self.heads, tiling.rows, tiling.columns
        mass = torch.zeros(shape, device=self.model.device)
        for shard in self.shards:
            for group, steps in enumerate(shard):

                def observe(layer: str, q: Tensor, k: Tensor, v: Tensor, group: int) -> None:
                    number = self.layers.index(layer)
                    order = self._stacked(orders[number])
                    rows, columns = tiling.places(order, tiling.block_q), tiling.places(order, tiling.block_k)
                    rows = rows[:, tiling.text_rows * tiling.block_q :]
                    placed_q, placed_k = at_places(q, rows), at_places(k, columns)
                    for sample in range(len(q)):
                        for head in range(self.heads):
                            found = self._block_mass(placed_q[sample, head], placed_k[sample, head], columns[head] < 0)
                            torch.maximum(mass[group, number, head], found, out=mass[group, number, head])

                for step in steps:
                    self._replay(step, functools.partial(observe, group=group))
        return {"mass": mass}

    def _block_mass(self, q: Tensor, k: Tensor, empty: Tensor) -> Tensor:
        """Return probabilities added up over blocks of keys, averaged over blocks of queries: ``[rows, columns]``.

        Args:
            q: in the head's order, padded to whole blocks, without those of text.
            k: the same with those of text.
            empty: which keys are none.
        """
        tiling = self.tiling
        rows = []
        for tile in q.split(max(1, TILE_NUMBERS // len(k) // tiling.block_q) * tiling.block_q):
            scores = (tile @ k.T * q.shape[1] ** -0.5).masked_fill(empty, -torch.inf)
            by_key = (
                torch.softmax(scores, dim=1).unflatten(1, (-1, tiling.block_k)).sum(dim=2)[:, tiling.text_columns :]
            )
            rows.append(by_key.unflatten(0, (-1, tiling.block_q)).mean(dim=1))
        return torch.cat(rows)

    def _stacked(self, names: list[str]) -> Tensor:
        return torch.stack([self.orders[name] for name in names])

    def _lists(self, mass: Tensor, order: str, width: int) -> BlockLists:
        kept = masks.always(self.orders[order], self.grid, self.tiling)
        return BlockLists.of_masks(masks.choose_blocks(mass, kept, width)[None])

    def _errors(self, orders: list[list[str]], mass: Tensor, options: list[int]) -> dict[str, Tensor]:
        errors = torch.zeros(self.groups, len(self.layers), self.heads, len(options))
        numerics = NUMERICS["float"]

        def observe(layer: str, q: Tensor, k: Tensor, v: Tensor, group: int) -> None:
            number = self.layers.index(layer)
            projection = self.model.backbone.get_submodule(layer).to_out[0].weight.float()  # type: ignore[index,union-attr]
            size = q.shape[-1]
            samples = _both_branches(q)
            q, k, v = q[samples], k[samples], v[samples]
            whole = scaled_dot_product_attention(q, k, v)
            energy = (whole.transpose(1, 2).flatten(2) @ projection.T).square().sum()
            for head, order in enumerate(orders[number]):
                own = slice(head, head + 1)
                through = projection[:, head * size : (head + 1) * size]
                gram = through.T @ through  # an error e of the head costs e gram e
                for place, width in enumerate(options[:-1]):
                    lists = self._lists(mass[group, number, head], order, width)
                    sparse = gathered.attend(
                        q[:, own], k[:, own], v[:, own], self._stacked([order]), lists, self.tiling, numerics
                    )
                    change = sparse - whole[:, own]
                    errors[group, number, head, place] = ((change @ gram) * change).sum() / energy

        for group, step in self._middle():
            self._replay(step, functools.partial(observe, group=group))
        return {"errors": errors}

    def _weights(self, orders: list[list[str]], mass: Tensor, options: list[int], errors: Tensor) -> dict[str, Tensor]:
        """Return what the errors of an attention weigh in the prediction: ``[groups, layers]``."""
        weights = torch.ones(self.groups, len(self.layers))
        probe = min(range(len(options)), key=lambda place: abs(options[place] / self.tiling.columns - PROBED_DENSITY))
        for group, step in self._middle():
            goal = self._replay(step)
            for number, layer in enumerate(self.layers):
                lists = BlockLists.joined(
                    [
                        self._lists(mass[group, number, head], order, options[probe])
                        for head, order in enumerate(orders[number])
                    ]
                )
                follow = gathered.Follow(self._stacked(orders[number]), lists, self.tiling, NUMERICS["float"])
                change = self._replay(step, sparse={layer: follow}) - goal
                whole = float(errors[group, number, :, probe].sum())
                if whole > 0:
                    weights[group, number] = float(change.square().sum() / goal.square().sum()) / whole
        return {"weights": weights}


def _both_branches(x: Tensor) -> list[int]:
    """Return the first sample of each branch of guidance, or the only sample."""
    return sorted({0, len(x) // 2})


@contextlib.contextmanager
def _watched(model: Model, layers: list[str], seen: Seen | None, sparse: dict[str, gathered.Follow]) -> Iterator[None]:
    """Let self-attentions show ``seen`` what they compute with, and some of them follow lists, for the length of a
    block.
    """
    modules = {name: model.backbone.get_submodule(name) for name in layers}
    before = {name: module.processor for name, module in modules.items()}

    def attend_in(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if seen is not None:
                seen(name, q.float(), k.float(), v.float())
            return sparse[name](q, k, v) if name in sparse else scaled_dot_product_attention(q, k, v)

        return attend

    for name, module in modules.items():
        module.set_processor(model.family.attention_processor(attend_in(name)))  # type: ignore[operator]
    try:
        yield
    finally:
        for name, module in modules.items():
            module.set_processor(before[name])  # type: ignore[operator]
