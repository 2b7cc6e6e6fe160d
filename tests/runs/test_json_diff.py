"""What changed between two JSON values, in words."""

from __future__ import annotations

import pytest

from qdiff.runs.json_diff import differences

LONG = [f"transformer_blocks.{i}.attn1.*" for i in range(9)]


@pytest.mark.parametrize(
    ("recorded", "wanted", "phrases"),
    [
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 2}]}}, []),
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "a": 1}, ["b.c was 2 and is now 3"]),
        ({"a": None}, {"a": 7.5}, ["a was null and is now 7.5"]),
        ({}, {"a": None}, []),
        ({"a": {"b": None}}, {"a": {}}, []),
        ({}, {"a": {"b": 1}}, ['a was not there and is now {"b": 1}']),
        ({"a": "ä"}, {}, ['a was "ä" and is no longer there']),
        ({"a": [0.5]}, {"a": [0.3, 0.5]}, ["a was [0.5] and is now [0.3, 0.5]"]),
        ({"a": LONG}, {"a": LONG[1:]}, [f'a lost ["{LONG[0]}"]']),
        ({"a": LONG}, {"a": [*LONG[:-1], "proj_out"]}, [f'a lost ["{LONG[-1]}"] and gained ["proj_out"]']),
        ({"a": LONG}, {"a": LONG[::-1]}, ["a has another order"]),
        (3, 4, [" was 3 and is now 4"]),
    ],
)  # fmt: skip
def test_every_change_is_named_by_its_path(recorded, wanted, phrases):
    assert differences(recorded, wanted) == phrases


def test_long_values_are_cut():
    (phrase,) = differences({"a": "x" * 1000}, {"a": 1})
    assert len(phrase) < 100 and "…" in phrase
