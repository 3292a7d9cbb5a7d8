"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.05, 0.5


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Asks until the answer is true and returns it; an AssertionError says what did not happen."""
    low, high = POLL_SECONDS
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if answer := condition():
            return answer
        now = time.monotonic()
        if now >= deadline:
            raise AssertionError(f"not within {seconds:g} s: {what} (last answer: {answer!r})")
        # To ask may be work, of many jobs say: not at the cost of what is waited for.
        time.sleep(min(high, max(low, 10 * (now - asked))))
