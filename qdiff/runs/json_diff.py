"""What changed between two JSON values, in words: for people who are told that a stage does not fit what they ask for.

Every changed entry is named by its path, so that "the recipe differs" becomes the one number that does. An entry that is
not there equals one that is null: a manifest stays good when a later version adds an option that defaults to null.
"""

from __future__ import annotations

import json

SHORT = 60  # characters of a value in a message
_ABSENT = object()


def differences(recorded: object, wanted: object, path: str = "") -> list[str]:
    """Return one phrase for each changed entry: ``recipe.methods.smooth.strengths was [0.3] and is now [0.3, 0.5]``."""
    if recorded == wanted or {recorded is _ABSENT or recorded is None, wanted is _ABSENT or wanted is None} == {True}:
        return []
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return [
            phrase
            for key in sorted(recorded.keys() | wanted.keys())
            for phrase in differences(
                recorded.get(key, _ABSENT), wanted.get(key, _ABSENT), f"{path}.{key}" if path else key
            )
        ]
    if recorded is _ABSENT:
        return [f"{path} was not there and is now {shortened(wanted)}"]
    if wanted is _ABSENT:
        return [f"{path} was {shortened(recorded)} and is no longer there"]
    if isinstance(recorded, list) and isinstance(wanted, list) and len(json.dumps([recorded, wanted])) > 2 * SHORT:
        moved = {  # cut short, the two lists could look the same
            "lost": [value for value in recorded if value not in wanted],
            "gained": [value for value in wanted if value not in recorded],
        }
        parts = [f"{verb} {shortened(values)}" for verb, values in moved.items() if values]
        return [f"{path} {' and '.join(parts) or 'has another order'}"]
    return [f"{path} was {shortened(recorded)} and is now {shortened(wanted)}"]


def shortened(value: object) -> str:
    """Return the value as JSON, cut to :data:`SHORT` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"
