"""Every limit is one of the service: it holds for callers that never saw a slider."""

from __future__ import annotations

import pytest

from qdiff.app.settings import Settings
from qdiff.errors import InputError

REFUSED = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "  \n"}, "prompt is empty"),
    ({"prompt": "x" * 501}, "501 characters"),
    ({"prompt": "a", "negative_prompt": "x" * 501}, "negative prompt has 501"),
    ({"prompt": "a\x00"}, "not text"),
    ({"prompt": "a\ud800"}, "not text"),
    ({"prompt": "a", "steps": 0}, "Steps 0"),
    ({"prompt": "a", "steps": 101}, "Steps 101"),
    ({"prompt": "a", "guidance": 31.0}, "Guidance 31"),
    ({"prompt": "a", "guidance": -1.0}, "Guidance -1"),
    ({"prompt": "a", "pictures": 5}, "Pictures 5"),
    ({"prompt": "a", "pictures": 0}, "Pictures 0"),
    ({"prompt": "a", "seed": -1}, "Seed -1"),
    ({"prompt": "a", "seed": 2**32}, "Seed"),
    ({"prompt": "a", "width": 1040}, "Width 1,040"),
    ({"prompt": "a", "height": 16}, "Height 16"),
    ({"prompt": "a", "width": 70}, "no multiple of 16"),
    ({"prompt": "a", "model": "../../etc/passwd"}, "unknown model"),
    ({"prompt": "a", "model": "owner/name"}, "unknown model"),
    ({"prompt": "a", "engine": "/tmp/engine"}, "unknown engine"),
    ({"prompt": "a", "engine": "tensorrt_rtx"}, "cannot run here"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_beyond_a_limit_nothing_is_admitted(service, settings, words):
    before = service.metrics.text().decode()
    with pytest.raises(InputError, match=words) as caught:
        service.generate(Settings.make(**settings), "test")
    assert caught.value.fix and service.queue_length == 0
    assert service.metrics.text().decode() != before, "a refused request is counted"


def test_the_area_is_bounded_apart_from_the_sides(make_service):
    from qdiff.app.limits import Limits

    service = make_service(Limits(area=64 * 1024))
    with pytest.raises(InputError, match="pixels"):
        service.generate(Settings.make(prompt="a", width=512, height=512), "test")


def test_a_comparison_is_bounded_too(service):
    names = ["openvino", "onnxruntime", "eager", "float"]
    with pytest.raises(InputError, match="unknown engine"):
        service.compare(Settings.make(prompt="a"), ["openvino", "nothing"], "test")
    with pytest.raises(InputError, match="Steps"):
        service.compare(Settings.make(prompt="a", steps=1000), names, "test")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 5000, "not JSON"),
        ("[]", "not a group"),
        ('"a"', "not a group"),
        ('{"prompt": 3}', "'prompt'"),
        ('{"prompt": "a", "steps": "2"}', "'steps'"),
        ('{"prompt": "a", "guidance": NaN}', "'guidance'"),
        ('{"prompt": "a", "path": "/etc/passwd"}', "'path'"),
        ('{"prompt": "' + "a" * 9000 + '"}', "characters"),
    ],
)
def test_pasted_settings_are_strict(text, words):
    with pytest.raises(InputError, match=words):
        Settings.parse(text, 8000)


def test_settings_go_round():
    settings = Settings.make(prompt="ä <b>", seed=4, guidance=2.5)
    assert (
        Settings.parse('{"settings": {"prompt": "ä <b>", "seed": 4, "guidance": 2.5}, "seconds": 3}', 8000) == settings
    )


@pytest.mark.parametrize("value", ["many", "4", [4], float("nan")])
def test_a_field_that_gives_no_number_is_refused_by_its_name(value):
    from qdiff.app.tab_generate import _whole

    assert (_whole(4.0), _whole(4.5), _whole(None)) == (4, 4.5, None)
    with pytest.raises(InputError, match="'steps'"):
        Settings.make(prompt="a", steps=_whole(value))
