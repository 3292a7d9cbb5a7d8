"""SIGTERM and SIGINT: the first stops cleanly, a second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from jobsvc import telemetry

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_stop(stop: Callable[[], object]) -> None:
    """Calls `stop` at the first signal, in the main thread between two of its instructions."""
    stopping = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            telemetry.flush()
            os._exit(128 + number)
        stopping = True
        stop()

    for number in SIGNALS:
        signal.signal(number, handle)
