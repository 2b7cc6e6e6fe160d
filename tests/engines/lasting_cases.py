"""Run by test_lasting.py, in a process of its own (:mod:`tests.fake_device`)."""

from __future__ import annotations

import gc

import torch

from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.schedule import Schedule
from qdiff.engines.base import Runner
from qdiff.engines.hoisted import HoistedRunner
from qdiff.engines.inputs import Copies, TensorSpec, conform
from qdiff.engines.scheduled import ScheduledRunner
from qdiff.plan.attention_plan import BLOCKS, BOUNDS
from tests.fake_device import watched


class DeviceRunner(Runner):
    """A graph on a device that is not the host's, as :class:`qdiff.engines.trt_run.TensorRTRunner` hands its inputs over."""

    inputs = (
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec(BLOCKS, "int32", (None, None)),
        TensorSpec(BOUNDS, "int64", (None,)),
    )

    def __init__(self, there):
        self.copies, self.given, self.there = Copies(), [], there

    def __call__(self, inputs):
        tensors = conform(inputs, self.inputs)
        moved = {name: self.copies.of(inputs[name], x, self.there, name in self.lasting) for name, x in tensors.items()}
        self.given.append(moved)
        return torch.zeros(1)


def _schedule():
    tiling = Tiling(256, 0, 64, 64)
    return Schedule([0.8, 0.4], [BlockLists.full(2, tiling) for _ in range(3)])


def _call_twice(runner):
    for _ in range(2):
        for timestep in (999.0, 700.0, 650.0, 300.0):
            runner({"timestep": torch.tensor([timestep])})


def test_lists_are_copied_once_for_each_group(monkeypatch):
    with watched(monkeypatch) as there:
        inner = DeviceRunner(there)
        _call_twice(ScheduledRunner(inner, _schedule()))
        for name in (BLOCKS, BOUNDS):
            assert all(given[name].device.type == there.type for given in inner.given)
            assert len({id(given[name]) for given in inner.given}) == 3, "three groups, eight steps"
        assert len({id(given["timestep"]) for given in inner.given}) == 8


def test_also_behind_parts_that_are_computed_once(monkeypatch):
    with watched(monkeypatch) as there:
        inner = DeviceRunner(there)
        _call_twice(ScheduledRunner(HoistedRunner(inner, []), _schedule()))
        assert len({id(given[BLOCKS]) for given in inner.given}) == 3


def test_a_copy_lives_as_long_as_what_it_is_of(monkeypatch):
    with watched(monkeypatch) as there:
        copies, given = Copies(), torch.ones(3)
        copy = copies.of(given, given, there, True)
        assert copies.of(given, given, there, True) is copy
        assert copies.of(given, given, there, False) is not copy
        assert copies.of(given, given, given.device, True) is given
        del given
        gc.collect()
        assert not list(copies._copies.keys())


def test_torch_attention_keeps_its_lists_too(monkeypatch):
    with watched(monkeypatch) as there:
        from qdiff.attention.operator import _on_device

        blocks = torch.zeros(4, 8, dtype=torch.int32)
        copy = _on_device(blocks, there)
        assert _on_device(blocks, there) is copy
        blocks += 1
        assert _on_device(blocks, there) is not copy, "another content is copied again"
