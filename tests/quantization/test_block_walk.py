"""Block by block: each block is fitted on what the quantized blocks before it hand over, and a killed run goes on."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import InputError, IntegrityError
from qdiff.nn.quant_linear import TimestepIndex
from qdiff.quantization.block_walk import BlockWalk
from qdiff.quantization.quantize import quantize
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory
from qdiff.runs.partial import Scratch

LAYER = "transformer_blocks.1.attn1.to_q"  # the first of the second block
SEQUENTIAL = ["sequential.tokens=64"]


@pytest.fixture
def recorded(finished):
    folder = finished.path / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")


def quantized(model, recorded, scratch=None, overrides=SEQUENTIAL):
    trajectory, statistics = recorded
    plan = quantize(model, load_recipe("int8", overrides), statistics, trajectory, scratch)
    return plan, model.backbone.state_dict()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def read_by(backbone, family, step) -> torch.Tensor:
    """What LAYER reads when the whole backbone runs."""
    seen = []
    handle = backbone.get_submodule(LAYER).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        family.call(backbone, step.inputs)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def rows_of_a_walk(model, recorded, monkeypatch):
    """The rows that the walk gave the methods for LAYER, of the first call."""
    kept = {}
    observe = BlockWalk.observe

    def spy(self, block, *given):
        result = observe(self, block, *given)
        kept.update(result)
        kept["calls"] = len(self.calls)
        return result

    monkeypatch.setattr(BlockWalk, "observe", spy)
    quantized(model, recorded)
    rows = kept[LAYER].rows
    return rows[: len(rows) // kept["calls"]]


def test_a_block_is_fitted_on_what_the_quantized_model_gives_it(tiny, recorded, monkeypatch):
    model, floating = tiny(), tiny()
    rows = rows_of_a_walk(model, recorded, monkeypatch)
    step = next(iter(recorded[0]))
    deployed, original = (read_by(m.backbone, m.family, step) for m in (model, floating))

    def found_in(tokens):
        return torch.cdist(rows.double(), tokens.double()).amin(dim=1).max().item()

    assert found_in(deployed) <= 1e-5 < found_in(original) / 10


def test_a_walk_knows_the_mean_of_each_tokens_picture_where_no_padding_is_among_them(tiny, recorded):
    model, (trajectory, statistics) = tiny(), recorded
    walk = BlockWalk(model, TimestepIndex(), trajectory, statistics.timesteps, 64)
    first = walk.blocks[0]
    seen = walk.observe(first, statistics.inputs)
    read, text = seen[f"{first}.attn1.to_q"], seen[f"{first}.attn2.to_k"]
    assert len(read.rows_sample) == len(read.rows) and text.means is None and text.rows_sample is None
    assert read.rows_sample.unique().tolist() == list(range(len(read.means)))
    pictures = []
    layer = model.backbone.get_submodule(f"{first}.attn1.to_q")
    handle = layer.register_forward_pre_hook(lambda module, args: pictures.extend(args[0]))
    for call in walk.calls:
        walk.run(first, call)
    handle.remove()
    for row, mean in zip(read.rows, read.means[read.rows_sample], strict=True):
        own = next(picture for picture in pictures if (picture == row).all(dim=1).any())
        torch.testing.assert_close(mean, own.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, recorded, tmp_path, monkeypatch):
    whole_plan, whole = quantized(tiny(), recorded)
    scratch = Scratch(tmp_path / "blocks", "mine")
    advance = BlockWalk.advance

    def killed(self, block):
        if block.endswith(".1"):
            raise KeyboardInterrupt
        advance(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized(tiny(), recorded, scratch)
    assert len(list(scratch.folder.iterdir())) == 2, "the block that was done and the one whose walk was cut off"
    observed = []
    observe = BlockWalk.observe
    monkeypatch.setattr(BlockWalk, "observe", lambda self, *a: observed.append(a[0]) or observe(self, *a))
    plan, state = quantized(tiny(), recorded, scratch)
    assert not {"transformer_blocks.0", "transformer_blocks.1"} & set(observed), "finished blocks are not fitted again"
    assert plan == whole_plan and same(state, whole)


def test_parts_of_other_work_are_refused(tiny, recorded, tmp_path):
    quantized(tiny(), recorded, Scratch(tmp_path / "blocks", "mine"))
    with pytest.raises(IntegrityError, match="part of other work"):
        quantized(tiny(), recorded, Scratch(tmp_path / "blocks", "another's"))


def test_walking_changes_what_is_decided(tiny, recorded):
    """A walk that observes nothing would give the tensors of the float statistics."""
    _, walked = quantized(tiny(), recorded)
    _, direct = quantized(tiny(), recorded, overrides=None)
    assert not same(walked, direct)


def test_a_family_without_blocks_says_so(tiny, recorded, monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model.family), "block_list", None)
    with pytest.raises(InputError, match="no list of blocks"):
        quantized(model, recorded)
