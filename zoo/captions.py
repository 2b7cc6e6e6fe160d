"""The words: captions of many forms for one (emoji, background) pair.

A text encoder trained on one form of sentence knows only that form: other prompts came out as noise. So a caption is
put together from a subject ("an emoji of a rocket"), a place for the background ("in front of blue"), and an order of
the two. Letter case carries no meaning: the tokenizer lowers it.

About one caption in four states no background: the picture then has the white one, so that such a prompt has one answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TEMPLATES: dict[str, list[str]] = {
    # {name} alone, {thing} = a/the/one + name
    "subjects": [
        "{thing}", "{thing}", "{thing}", "{name}", "{name}", "{name} emoji", "{thing} emoji", "emoji of {thing}",
        "an emoji of {thing}", "the emoji of {thing}", "a picture of {thing}", "picture of {thing}",
        "an image of {thing}", "image of {thing}", "an icon of {thing}", "{name} icon", "a drawing of {thing}",
        "an illustration of {thing}", "a photo of {thing}", "a sticker of {thing}", "a small {name}", "a cute {name}",
        "a single {name}", "this is {thing}", "show me {thing}", "draw {thing}", "please draw {thing}",
    ],
    "joined": [
        "{subject} on {colour}", "{subject} on a {colour} background", "{subject} on a {colour} background",
        "{subject} on {colour} background", "{subject} on the {colour} background", "{subject}, {colour} background",
        "{subject} {colour} background", "{subject} with a {colour} background", "{subject} with {colour} background",
        "{subject} in front of {colour}", "{subject} in front of a {colour} background",
        "{subject} against a {colour} background", "{subject} against {colour}", "{subject} over a {colour} background",
        "{subject} before a {colour} background", "{subject} on a plain {colour} background",
        "{subject} on a solid {colour} background", "{subject} on a flat {colour} background",
        "{subject}, the background is {colour}", "{subject}. the background is {colour}.",
        "{subject} and a {colour} background", "{subject}, background: {colour}", "{subject} in front of a {colour} wall",
        "{colour} background with {subject}", "a {colour} background with {subject}", "{colour} background, {subject}",
        "a {colour} background and {subject}", "on a {colour} background, {subject}", "on {colour}: {subject}",
        "on a {colour} background there is {subject}", "{subject} on a {colour} backdrop",
    ],
    "endings": ["", "", "", "", "", "", ".", "!", ", emoji style", ", flat design", ", simple", ", high quality"],
}  # fmt: skip


MOVING = (
    "{thing}",
    "{thing}",
    "{thing}",
    "{name}",
    "{thing} emoji",
    "an emoji of {thing}",
    "a video of {thing}",
    "a clip of {thing}",
)
"""Subjects of captions that go on with what the subject does."""


def article(name: str) -> str:
    """Give "an" before a vowel, else "a"."""
    return "an" if name[0] in "aeiou" else "a"


def caption(names: Sequence[str], colour: str | None, rng: random.Random) -> str:
    """Return a random caption.

    Args:
        names: the emoji's name, then its synonyms. The name is taken two times in three.
        colour: the stated background, or None to state none.
        rng: the source of chance.
    """
    name = names[0] if len(names) == 1 or rng.random() < 0.67 else rng.choice(names[1:])
    which = rng.random()
    thing = f"the {name}" if which < 0.15 else f"one {name}" if which < 0.2 else f"{article(name)} {name}"
    text = rng.choice(TEMPLATES["subjects"]).format(name=name, thing=thing)
    if colour is not None:
        text = rng.choice(TEMPLATES["joined"]).format(subject=text, colour=colour)
    return text + rng.choice(TEMPLATES["endings"])


def clip_caption(names: Sequence[str], words: str, colour: str, rng: random.Random) -> str:
    """Return a random caption of a clip: who, what it does (``words``, such as "moves up"), on which background."""
    name = names[0] if len(names) == 1 or rng.random() < 0.8 else rng.choice(names[1:])
    subject = rng.choice(MOVING).format(
        name=name, thing=f"the {name}" if rng.random() < 0.2 else f"{article(name)} {name}"
    )
    text = rng.choice(TEMPLATES["joined"]).format(subject=f"{subject} {words}", colour=colour)
    return text + rng.choice(TEMPLATES["endings"])


def all_words(rows: Sequence[dict[str, object]], colours: Sequence[str]) -> list[str]:
    """Return every text a caption is made of, for the tokenizer: templates, names, synonyms, shared keywords,
    colours.
    """
    texts = [part for group in TEMPLATES.values() for part in group]
    texts = [t.format(name="", thing="", subject="", colour="") for t in texts] + ["a an the one", *colours]
    for row in rows:
        texts.append(str(row["name"]))
        for key in ("synonyms", "keywords"):
            texts.extend(row[key])  # type: ignore[arg-type]
    return texts
