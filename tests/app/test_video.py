"""Clips on the page: the service, its limits, and a browser that plays them."""

from __future__ import annotations

import json

import pytest

from qdiff.app.settings import Settings
from qdiff.errors import InputError
from qdiff.evaluation.video import read_metadata

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cinema(make_service, filmed):
    return make_service(runs=[filmed])


def test_a_preview_is_the_middle_frame():
    import torch

    from qdiff.app.previews import Previewer
    from qdiff.models import FAMILIES

    previewer = Previewer(FAMILIES["wan"].load("random:wan-tiny"))
    latents = torch.randn(2, 16, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    shown = previewer(latents)
    assert shown.size == (6, 8)
    assert shown.tobytes() == previewer(latents[:, :, 1]).tobytes() != previewer(latents[:, :, 0]).tobytes()


def test_a_clip_is_drawn_with_its_facts(cinema):
    job = cinema.generate(Settings.make(prompt="a cat moves up", steps=2, seed=1, frames=5), "visitor")
    update = job.wait(120)
    assert update.error is None
    made = update.result
    assert made.settings.frames == 5 and made.files[0].suffix == ".mp4" and made.paths[0].suffix == ".png"
    assert read_metadata(made.files[0]).prompt == "a cat moves up"
    usual = cinema.generate(Settings.make(prompt="a cat", steps=1, seed=1), "visitor").wait(120).result
    assert usual.settings.frames == 9, "the model's own"


def test_a_comparison_has_both_clips_in_one_file(cinema):
    import av

    job = cinema.compare(Settings.make(prompt="a cat", steps=1, seed=1), ["eager"], "visitor")
    rows = job.wait(120).result
    assert [row.engine for row in rows] == ["float", "eager"] and not rows[0].images and not rows[1].images
    assert 5 < rows[1].psnr_db < 100 and rows[0].beside is None
    with av.open(str(rows[1].beside)) as container:
        stream = container.streams.video[0]
        assert stream.width == 2 * stream.height and stream.frames == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 1}, "out of range"),
        ({"frames": 1000}, "out of range"),
        ({"frames": 81, "width": 1024, "height": 1024}, "frames of"),
    ],
)
def test_too_many_frames_are_refused(cinema, settings, words):
    with pytest.raises(InputError, match=words):
        cinema.generate(Settings.make(prompt="a cat", **settings), "visitor")


def test_frames_of_a_picture_are_refused(service):
    with pytest.raises(InputError, match="pictures, not clips"):
        service.generate(Settings.make(prompt="a cat", frames=5), "visitor")


def test_the_page_plays_clips(make_service, filmed, finished, browser, serve):
    site = serve(make_service(runs=[filmed, finished.path]))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(site.url)
    page.wait_for_selector("#prompt textarea")
    page.get_by_text("More settings").click()
    page.wait_for_selector("#frames input")
    page.get_by_role("button", name="Rocket").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('flies up')")
    page.wait_for_selector("#canvas .done video", timeout=60_000)
    page.wait_for_function("document.querySelector('#canvas video').readyState >= 2")
    with page.expect_download() as download:
        page.click("#png")
    assert download.value.suggested_filename.endswith(".mp4")
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    page.wait_for_selector("#compare-canvas .qd-pair", timeout=60_000)
    page.wait_for_function("document.querySelector('#compare-canvas video').readyState >= 2")
    assert "PSNR" in page.inner_text("#cards") and not page.is_visible("#slider")
    page.get_by_role("tab", name="Generate").click()  # pictures have no frames
    page.get_by_text("Paste settings (JSON)").click()
    page.wait_for_timeout(500)
    pictures = next(source.name for source in site.service.sources.all() if source.family.media == "image")
    page.fill("#pasted textarea", json.dumps({"prompt": "a cat", "model": pictures}))
    page.click("#apply")
    page.wait_for_selector("#frames", state="hidden")
    page.close()
