"""The scenarios: plain functions of a Scene, each independent of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.conformance.scene import Scene

MARKS = "conformance_marks"

Play = Callable[["Scene"], None]


def scenario(
    *, needs: Literal["", "queue", "tokens", "open"] = "", alone: bool = False
) -> Callable[[Play], Play]:
    """Marks a function as a scenario; see runner.Scenario."""

    def mark(play: Play) -> Play:
        setattr(play, MARKS, {"needs": needs, "alone": alone})
        return play

    return mark
