"""Orders, tilings, lists and masks: where tokens lie and what is read."""

from __future__ import annotations

import pytest
import torch

from qdiff.allocation.attention_masks import allocate_blocks
from qdiff.attention import masks
from qdiff.attention.lists import NOTHING, BlockLists, Tiling
from qdiff.attention.orders import candidates, order_named
from qdiff.attention.packing import at_places, from_places
from qdiff.attention.schedule import Schedule, edges_of, one_timestep
from qdiff.attention.sparse import load_masks, save_masks
from qdiff.errors import InputError, IntegrityError
from qdiff.plan.attention_plan import AttentionPlan

GRIDS = ((17, 8, 8), (1, 16, 16), (3, 5, 7), (2, 1, 9), (5, 30, 45))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
def test_every_candidate_is_a_permutation_and_none_comes_twice(grid):
    found = candidates(grid, 64)
    count = grid[0] * grid[1] * grid[2]
    for name, order in found.items():
        assert torch.equal(order.sort().values, torch.arange(count)), name
        assert torch.equal(order, order_named(name, grid)), "a name says all"
    assert len({tuple(order.tolist()) for order in found.values()}) == len(found)


def test_orders_put_together_what_their_names_say():
    grid = (4, 4, 4)
    assert torch.equal(order_named("fhw", grid), torch.arange(64))
    assert order_named("hwf", grid)[:4].tolist() == [0, 16, 32, 48], "one place in every frame"
    assert sorted(order_named("box2x2x2", grid)[:8].tolist()) == [0, 1, 4, 5, 16, 17, 20, 21]
    assert sorted(order_named("morton", grid)[:8].tolist()) == [0, 1, 4, 5, 16, 17, 20, 21]


@pytest.mark.parametrize(("tokens", "text"), [(256, 0), (300, 0), (333, 17), (65, 64)])
def test_tokens_come_back_from_where_they_were_put(tokens, text):
    tiling = Tiling(tokens, text, 64, 32)
    order = torch.stack([torch.randperm(tiling.ordered, generator=torch.Generator().manual_seed(h)) for h in range(3)])
    x = random(2, 3, tokens, 8)
    for block in (tiling.block_q, tiling.block_k):
        places = tiling.places(order, block)
        assert places.shape[1] % block == 0
        placed = at_places(x, places)
        assert not placed[:, places < 0].any()
        assert torch.equal(from_places(placed, places, tokens), x)
    assert torch.equal(tiling.places(order, 64)[:, :text], torch.arange(text).expand(3, -1)), "text stays in front"


def test_lists_are_masks_and_masks_are_lists():
    given = random(3, 5, 7) < 0.4
    given[1, 2] = False  # a row that reads nothing
    lists = BlockLists.of_masks(given)
    assert torch.equal(lists.masks(7), given)
    assert lists.density(7).tolist() == pytest.approx(given.double().mean(dim=(1, 2)).tolist())
    both = BlockLists.joined([lists, lists])
    assert both.heads == 6 and torch.equal(both.masks(7)[3:], given)
    assert BlockLists.full(3, Tiling(7 * 16, 0, 24, 16)).masks(7).all()


def test_rows_for_a_kernel_count_text_in():
    tiling = Tiling(70 + 7 * 16, 70, 32, 16)
    given = random(2, tiling.rows, 7) < 0.5
    offsets, entries = BlockLists.of_masks(given).by_row(tiling)
    assert offsets.shape == (2, tiling.text_rows + tiling.rows + 1)
    everything = list(range(tiling.text_columns + 7))
    assert entries[offsets[1, 0] : offsets[1, 1]].tolist() == everything, "text reads everything"
    row = entries[offsets[1, tiling.text_rows + 1] : offsets[1, tiling.text_rows + 2]].tolist()
    wanted = [tiling.text_columns + int(column) for column in given[1, 1].nonzero()]
    assert row == [*range(tiling.text_columns), *wanted], "everything reads text"


def test_lists_that_do_not_fit_are_refused():
    tiling = Tiling(256, 0, 64, 64)
    lists, order = BlockLists.full(2, tiling), torch.arange(256).expand(2, -1)
    tiling.check(order, lists)
    for wrong, message in (
        ((order[:1], lists), "shape"),
        ((order.clone().fill_(3), lists), "permutation"),
        ((order, BlockLists(lists.blocks + 1, lists.bounds)), "outside"),
        ((order, BlockLists(lists.blocks[:2], lists.bounds)), "rows"),
    ):
        with pytest.raises(InputError, match=message):
            tiling.check(*wrong)
    with pytest.raises(InputError, match="bounds"):
        BlockLists(lists.blocks, torch.tensor([0, 5, 3]))
    with pytest.raises(InputError):
        Tiling(5, 5)


def test_a_mask_holds_what_is_always_kept_and_as_many_as_asked():
    grid, tiling = (17, 8, 8), Tiling(1088, 0, 64, 64)
    order = order_named("fhw", grid)
    kept = masks.always(order, grid, tiling)
    assert kept.diagonal().all() and kept[:, 0].all() and kept.sum() == 17 + 16, "diagonal and first frame"
    mass = random(17, 17)
    before = None
    for width in masks.widths(tiling):
        chosen = masks.choose_blocks(mass, kept, width)
        assert (chosen.sum(dim=1) == width).all()
        if width >= 2:
            assert chosen[kept].all()
        if before is not None:
            assert chosen[before].all(), "what fits a small budget fits a large one"
        before = chosen
    assert masks.recall(mass, chosen) == pytest.approx(1.0)
    assert masks.always(order_named("hwf", grid), grid, tiling).sum(dim=1).max() < 17, (
        "a spread first frame is no block"
    )


def test_blocks_go_where_they_are_missed_most():
    options = [2, 4, 8, 16]
    errors = torch.tensor([[[[8.0, 4.0, 2.0, 0.0], [0.8, 0.4, 0.2, 0.0]]]])
    found = allocate_blocks(errors, options, 16, 0.375)
    assert found.shape == (1, 1, 2) and int(found.sum()) <= 12
    assert found[0, 0, 0] > found[0, 0, 1]
    totals = [int(allocate_blocks(errors, options, 16, density).sum()) for density in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert totals == sorted(totals) and totals[-1] == 32
    with pytest.raises(InputError, match="one block"):
        allocate_blocks(errors, options, 16, 0.1)


def test_groups_go_by_the_value_of_the_timestep():
    edges = edges_of([999.0, 950, 800, 700, 600, 500, 400, 300, 100], 0.9, 3)
    assert edges[0] == 0.9 and edges == sorted(edges, reverse=True) and len(edges) == 3
    schedule = Schedule(edges, [])
    assert [schedule.group(t) for t in (999, 900, 899, 100)] == [0, 0, 1, 3]
    assert one_timestep(torch.tensor([5.0, 5.0])) == 5.0
    with pytest.raises(InputError, match="several timesteps"):
        one_timestep(torch.tensor([5.0, 6.0]))


def test_masks_are_kept_as_bits(tmp_path):
    chosen = random(2, 3, 5, 11) < 0.5
    chosen[..., 0] = True
    plan = AttentionPlan(
        numerics="float", asked=0.5, density=0.5, overall=0.6, tokens=11 * 16, text=0, block_q=36, block_k=16,
        grid=(1, 11, 16), edges=[0.9, 0.5],
        layers=[{"name": "a", "heads": [{"order": "fhw", "density": [], "recall": [], "error": []}] * 3}],
    )  # fmt: skip
    path = tmp_path / "attention.safetensors"
    save_masks(chosen, path)
    assert path.stat().st_size < 500
    assert torch.equal(load_masks(plan, path), chosen)
    with pytest.raises(IntegrityError, match="shape"):
        load_masks(plan.model_copy(update={"edges": [0.9]}), path)
    chosen[0, 0, 0] = False
    save_masks(chosen, path)
    with pytest.raises(IntegrityError, match="read nothing"):
        load_masks(plan, path)


def test_nothing_is_no_block():
    lists = BlockLists(torch.tensor([[0, NOTHING]], dtype=torch.int32), torch.tensor([0, 2]))
    assert lists.masks(3).tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("name", ["zigzag", "fh", "ffh", "box0x2x2", "box2x2", ""])
def test_orders_that_do_not_exist_are_refused(name):
    with pytest.raises(InputError, match="unknown order of tokens"):
        order_named(name, (2, 4, 4))
