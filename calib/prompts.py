"""Prompts from a file, one a line, or from Python: text of sane length. Refused early, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdiff.errors import InputError, option
from qdiff.files import read_user_text

LONGEST = 2_000  # characters; text encoders keep some hundred tokens and cut the rest
MOST = 10_000


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a UTF-8 file, one for each non-empty line; lines that begin with ``#`` are comments.

    Raises:
        InputError: missing, empty, binary, a line that is too long, or too many lines; says which line.
    """
    text = read_user_text(path, "the prompts file")
    prompts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > LONGEST:
            raise InputError(
                f"line {number} of {path} has {len(line):,} characters",
                f"a prompt has at most {LONGEST:,}; is it one prompt a line?",
            )
        prompts.append(line)
    if not prompts:
        raise InputError(f"{path} holds no prompt", "write one prompt on each line")
    if len(prompts) > MOST:
        raise InputError(f"{path} holds {len(prompts):,} prompts", f"calibration takes at most {MOST:,}")
    return prompts


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts that were given as texts.

    Raises:
        InputError: none, too many, an empty one, or one that is too long; says which.
    """
    if isinstance(prompts, str):
        raise InputError(
            f"prompts is one text ({prompts[:40]!r})", "give a list of texts, or the pathlib.Path of a file"
        )
    if not 0 < len(prompts) <= MOST:
        raise InputError(f"{len(prompts):,} prompts were given", f"calibration takes 1 to {MOST:,}")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not 0 < len(prompt.strip()) <= LONGEST:
            raise InputError(
                f"prompt {number} is {str(prompt)[:40]!r}", f"a prompt is a text of 1 to {LONGEST:,} characters"
            )
    return [prompt.strip() for prompt in prompts]


def choose_prompts(prompts: list[str], samples: int | None) -> list[str]:
    """Return the first ``samples`` prompts (all when ``None``).

    Raises:
        InputError: more samples than prompts: repeating a prompt would only look like more data.
    """
    if samples is None:
        return prompts
    if samples > len(prompts):
        raise InputError(
            f"{samples} samples were asked of {len(prompts)} prompts",
            f"give more prompts or {option('samples', len(prompts))}",
        )
    return prompts[:samples]
