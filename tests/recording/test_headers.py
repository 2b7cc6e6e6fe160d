"""Files of tensors with any header: read, or refused with an error of qdiff and never with another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qdiff.attention.statistics import AttentionStatistics
from qdiff.errors import QdiffError
from qdiff.recording.activation_statistics import TABLES, Statistics
from qdiff.recording.trajectory import Trajectory, require_shard

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats(width=16) | st.text("a|", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a", max_size=2), inner, max_size=3),
    max_leaves=6,
)
quickly = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def read_trajectory(path: Path) -> object:
    """Read the file as a shard of a trajectory."""
    shard = path.with_name("trajectory-00000.safetensors")
    path.replace(shard)
    return list(Trajectory(path.parent))


READERS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "statistics": (Statistics.load, {"timesteps": [1.0], "groups": {"a": ["a"]}, "tokens": {}}),
    "attention": (
        AttentionStatistics.load,
        {"layers": [], "grid": [1, 1, 1], "tiling": [1, 0, 1, 1], "edges": [], "orders": [], "options": {}},
    ),
    "trajectory": (read_trajectory, {"timesteps": [1.0], "varying": ["a|x"]}),
    "shard": (lambda path: require_shard(path, "me"), {"owner": "me"}),
}


def read_any(folder: Path, reader: Callable[[Path], object], text: str | None) -> None:
    """Read a file whose header is ``text``; what is raised is an error of qdiff."""
    path = folder / "x.safetensors"
    tensors = {f"a|{table}": torch.ones(1) for table in TABLES} | {"a|x": torch.ones(1), "mass": torch.ones(1)}
    save_file(tensors, path, None if text is None else {"qdiff": text})
    try:
        reader(path)
    except QdiffError:
        pass


@pytest.mark.parametrize("name", READERS)
@quickly
@given(data=st.data())
def test_an_entry_of_another_type(tmp_path_factory, name, data):
    """The header of a good file with one entry that is anything, or nothing."""
    reader, header = READERS[name]
    entry = data.draw(st.sampled_from(sorted(header)))
    value = data.draw(JSON | st.just("without"))
    changed = {key: old for key, old in header.items() if key != entry} | ({} if value == "without" else {entry: value})
    read_any(tmp_path_factory.mktemp("x"), reader, json.dumps(changed))


@pytest.mark.parametrize("name", READERS)
@quickly
@given(text=st.none() | st.text(max_size=20) | JSON.map(json.dumps))
def test_any_header(tmp_path_factory, name, text):
    read_any(tmp_path_factory.mktemp("x"), READERS[name][0], text)


@pytest.mark.parametrize("name", READERS)
def test_a_header_deeper_than_the_stack(tmp_path, name):
    read_any(tmp_path, READERS[name][0], "[" * 100_000)


@quickly
@given(size=st.integers(0, 2**64 - 1), header=st.binary(max_size=40), pad=st.integers(0, 8))
def test_any_bytes(tmp_path_factory, size, header, pad):
    """The length of the header, which stands first, need not be its length."""
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes((size if size % 2 else len(header)).to_bytes(8, "little") + header + bytes(pad))
    with pytest.raises(QdiffError):
        Statistics.load(path)
