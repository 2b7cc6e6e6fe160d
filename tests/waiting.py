"""Wait for something that another thread or process does, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 60, what: str = "") -> T:
    """Return the first true value of ``condition()``.

    Raises:
        AssertionError: the value is still false after ``seconds``; the message is ``what``.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.005)
    return value
