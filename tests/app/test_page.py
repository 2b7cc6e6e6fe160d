"""The page in a real browser: the journeys that a visitor makes. What can be asked without a browser is asked elsewhere."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from playwright.sync_api import TimeoutError

from tests.waiting import wait_until

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> **bold** & a cat"


def settle(page, **settings: object) -> None:
    """Pastes settings, as a visitor who has some, and waits until the page has taken them.

    A visitor looks at a panel before typing into it; a browser that is driven is fast enough to type while Gradio still fills the
    field that has just appeared, which then holds the older settings. So it looks, and types again if it must.
    """
    words = json.dumps(settings)
    if not page.is_visible("#pasted textarea"):
        page.get_by_text("Paste settings (JSON)").click()
    for _ in range(3):
        page.fill("#pasted textarea", words)
        page.wait_for_timeout(300)
        if page.input_value("#pasted textarea") != words:
            continue
        page.click("#apply")
        with contextlib.suppress(TimeoutError):
            shown = f"document.querySelector('#prompt textarea').value == {json.dumps(settings['prompt'])}"
            page.wait_for_function(shown, timeout=10_000)
            return
    raise AssertionError(f"the page did not take {words}")


def test_a_prompt_becomes_a_picture_and_stays_text(page):
    page.fill("#prompt textarea", HOSTILE)
    page.click("#generate")
    page.wait_for_selector("#canvas .done img", timeout=60_000)
    assert page.get_attribute("#canvas img", "alt") == HOSTILE
    assert page.title() != "owned" and page.locator("#canvas img").count() == 1
    with page.expect_download() as download:
        page.click("#png")
    assert download.value.suggested_filename.endswith(".png")
    with page.expect_download() as download:
        page.click("#json")
    facts = json.loads(download.value.path().read_text())
    assert facts["settings"]["prompt"] == HOSTILE
    settle(page, prompt="a red apple", seed=5, steps=3)
    page.locator("#history button").first.click()  # the first picture of this visit gives its settings back
    page.wait_for_function(f"document.querySelector('#prompt textarea').value == {json.dumps(HOSTILE)}")


def test_an_example_runs_in_one_click_and_can_be_cancelled(page, site):
    settle(page, prompt="x", steps=100, width=512, height=512, engine="float")
    page.get_by_role("button", name="Rocket").click()
    page.wait_for_selector("#canvas .qd-preview", timeout=60_000)
    assert re.search(r"Step \d+ of 100", page.inner_text("#canvas"))
    assert page.is_disabled("#generate")
    page.click("#cancel")
    page.wait_for_selector("#canvas >> text=Cancelled", timeout=60_000)
    assert page.is_enabled("#generate") and not site.service.busy


def test_a_closed_page_gives_its_place_back(browser, site):
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url)
    settle(page, prompt="a cat", steps=100, width=512, height=512, engine="float")
    page.click("#generate")
    page.wait_for_selector("#canvas .qd-preview", timeout=60_000)
    context.close()
    wait_until(lambda: not site.service.busy, 20)


def test_a_bad_input_is_explained(page):
    page.click("#generate")
    page.wait_for_selector("#canvas .error >> text=The prompt is empty")
    page.get_by_text("Paste settings (JSON)").click()
    page.fill("#pasted textarea", '{"prompt": "a", "steps": "many"}')
    page.click("#apply")
    page.wait_for_selector("text=The setting 'steps' does not fit")


def test_compare_and_guess(page):
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompt textarea", "a cat")
    page.click("#compare")
    page.wait_for_selector("#cards .qd-card", timeout=60_000)
    page.wait_for_selector("#slider img")
    cards = page.inner_text("#cards")
    assert all(words in cards for words in ("float", "One step", "PSNR", "Memory", "On disk")) and " dB" in cards
    page.get_by_label("Blind").check()
    page.click("#compare")
    page.wait_for_selector("#compare-canvas .qd-blind", timeout=60_000)
    assert not page.is_visible("#cards .qd-card")
    page.click("#guess-a")
    page.wait_for_selector("#compare-canvas .qd-answer >> text=of 1 right so far")
    assert page.is_visible("#cards .qd-card")


def test_inspect_shows_the_plan(page):
    page.get_by_role("tab", name="Inspect").click()
    page.wait_for_selector("#inspect .qd-map span", timeout=60_000)
    words = page.inner_text("#inspect")
    assert "have the precision that was asked for" in words and "Error over the timesteps" in words
    assert page.locator("#inspect svg.plot.wide").count() == 3


def test_a_phone_needs_no_sideways_scrolling(browser, site):
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme="dark")
    page = context.new_page()
    page.goto(site.url)
    for tab in ("Generate", "Compare", "Inspect", "Build"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, tab
    context.close()


def test_a_build_survives_a_reload_and_joins_the_lists(page, site):
    page.get_by_role("tab", name="Build").click()
    page.get_by_label("Model").last.click()
    page.get_by_role("option", name="pixart random:pixart-tiny").click()
    page.click("#build")
    page.wait_for_selector("#build-state >> text=Building")
    page.reload()
    page.get_by_role("tab", name="Build").click()
    page.wait_for_selector("#build-state >> text=Building pixart-random-pixart-tiny-int8-quick")
    assert page.is_disabled("#build")
    page.wait_for_selector("#build-state >> text=is ready", timeout=240_000)
    names = [source.name for source in site.service.sources.all()]
    assert "pixart-random-pixart-tiny-int8-quick · int8" in names
    page.get_by_role("tab", name="Generate").click()
    page.click("#model input")
    page.get_by_role("option", name="pixart-random-pixart-tiny-int8-quick").click()
    page.fill("#prompt textarea", "a cat")
    page.click("#generate")
    page.wait_for_selector("#canvas .done img", timeout=60_000)
