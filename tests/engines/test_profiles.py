"""Profiles from words."""

from __future__ import annotations

import pytest

from qdiff.engines import BuildOptions
from qdiff.engines.profiles import make_profile, parse_profile, parse_range
from qdiff.errors import UsageError

AXES = {
    "hidden_states": ("batch", 4, "height", "width"),
    "encoder_hidden_states": ("batch", "tokens", 64),
    "timestep": ("batch",),
}


def test_parse_range():
    assert [parse_range(text) for text in ("2", "1-4", "1-2-8")] == [(2, 2, 2), (1, 4, 4), (1, 2, 8)]
    for wrong in ("", "0", "4-1", "1-8-2", "a", "1-2-3-4", "-1", "1.5"):
        with pytest.raises(UsageError):
            parse_range(wrong)


def test_parse_profile():
    assert parse_profile("512") == {"height": (64,) * 3, "width": (64,) * 3}
    assert parse_profile("512x768") == {"height": (64,) * 3, "width": (96,) * 3}
    assert parse_profile("dyn-256-1024") == {"height": (32, 128, 128), "width": (32, 128, 128)}
    assert parse_profile("dyn-256-512-1024", scale=16)["width"] == (16, 32, 64)
    assert parse_profile("64, batch 1-4") == {"height": (8,) * 3, "width": (8,) * 3, "batch": (1, 4, 4)}
    assert parse_profile("batch=1-2-8,tokens=77") == {"batch": (1, 2, 8), "tokens": (77,) * 3}


@pytest.mark.parametrize(
    "wrong", ["", "100", "dyn-512", "dyn-1024-256", "512,512", "batch=", "batch=1,batch=2", "5 12", "x" * 9]
)
def test_parse_profile_refuses(wrong):
    with pytest.raises(UsageError) as caught:
        parse_profile(wrong)
    assert caught.value.exit_code == 2 and caught.value.fix


def test_make_profile():
    sizes = {"batch": (1, 2, 8), "tokens": (300,) * 3, **parse_profile("dyn-256-1024")}
    profile = make_profile("p", AXES, sizes)
    assert profile.ranges["hidden_states"] == ((1, 4, 32, 32), (2, 4, 128, 128), (8, 4, 128, 128))
    assert profile.ranges["encoder_hidden_states"] == ((1, 300, 64), (2, 300, 64), (8, 300, 64))
    options = BuildOptions((profile,), "12.0", 3, {"level": "2"})
    assert BuildOptions.from_json(options.to_json(), threads=3) == options
    with pytest.raises(UsageError, match="did you mean tokens"):
        make_profile("p", AXES, {**sizes, "token": (1, 1, 1)})
    with pytest.raises(UsageError, match="says nothing about tokens"):
        make_profile("p", AXES, {key: value for key, value in sizes.items() if key != "tokens"})
    with pytest.raises(UsageError, match="min <= usual"):
        make_profile("p", AXES, {**sizes, "batch": (2, 1, 8)})
