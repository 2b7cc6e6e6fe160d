"""Progress for people: a time that is left is told when enough is done to estimate it."""

from __future__ import annotations

import io

from qdiff.events import Event, TerminalListener


def test_the_first_unit_tells_no_time_that_is_left():
    assert [Event("calibrate", done, 10, 8.0).remaining for done in (0, 1, 2, 4)] == [None, None, 32.0, 12.0]
    shown = []
    for done in (0, 1, 2, 10):
        stream = io.StringIO()
        TerminalListener(stream)(Event("calibrate", done, 10, 8.0, finished=done == 10))
        shown.append(stream.getvalue().strip())
    assert shown == [
        "calibrate: 0/10, estimating", "calibrate: 1/10, estimating", "calibrate: 2/10, 32s left", "calibrate: 10/10 in 8.0s"
    ]  # fmt: skip
