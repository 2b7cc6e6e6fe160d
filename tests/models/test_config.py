"""A config comes from a file: what is read of it is checked."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import InputError
from qdiff.models import FAMILIES
from qdiff.models.config import integer, integers, number
from qdiff.models.given import added_conditions, tensor_of

CONFIG = {"in_channels": 4, "patch_size": [1, 2, 2], "whole": 2.0, "half": 0.5, "text": "4", "nothing": None}


def test_entries_are_read():
    assert (integer(CONFIG, "in_channels"), integer(CONFIG, "whole"), number(CONFIG, "half")) == (4, 2, 0.5)
    assert integers(CONFIG, "patch_size") == (1, 2, 2) and integers(CONFIG, "in_channels") == (4,)


@pytest.mark.parametrize("read", [integer, integers, number])
@pytest.mark.parametrize("name", ["text", "nothing", "missing"])
def test_another_type_is_named(read, name):
    with pytest.raises(InputError, match=name):
        read(CONFIG, name)


@pytest.mark.parametrize(("read", "name"), [(integer, "half"), (integer, "patch_size"), (integers, "half")])
def test_what_is_not_whole_is_named(read, name):
    with pytest.raises(InputError, match=name):
        read(CONFIG, name)


def test_a_family_names_the_entry():
    with pytest.raises(InputError, match="in_channels"):
        FAMILIES["wan"].inputs({"in_channels": "sixteen", "text_dim": 64})


def test_an_argument_that_is_no_tensor_is_named():
    with pytest.raises(InputError, match="hidden_states"):
        tensor_of({"hidden_states": [1.0]}, "hidden_states")
    given = {"added_cond_kwargs": {"time_ids": torch.ones(1, 6, dtype=torch.float16), "resolution": None}}
    assert {name: value.dtype for name, value in added_conditions(given).items()} == {"time_ids": torch.float32}
