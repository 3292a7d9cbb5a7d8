"""Time as the client uses it: a seam, so that tests need not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    def cancel(self) -> object: ...


class Clock(Protocol):
    def time(self) -> float: ...

    def sleep_for(self, duration: float) -> object: ...

    def call_in(self, behavior: Callable[[], None], delay: float) -> Timer:
        """Calls `behavior` after `delay` seconds, on a thread of the clock's choice."""


class SystemClock:
    def time(self) -> float:
        return time.monotonic()

    def sleep_for(self, duration: float) -> None:
        time.sleep(duration)

    def call_in(self, behavior: Callable[[], None], delay: float) -> Timer:
        timer = threading.Timer(delay, behavior)
        timer.daemon = True
        timer.start()
        return timer


class Watchdog:
    """Calls `cancel` if a wait lasts longer than its limit.

    One timer at a time, whatever the number of waits: it looks at the deadline when it fires, and
    is set again if that has moved.
    """

    def __init__(self, clock: Clock, cancel: Callable[[], object]) -> None:
        self._clock = clock
        self._cancel = cancel
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._timer: Timer | None = None
        self.fired = False

    def start(self, limit: float) -> None:
        with self._lock:
            self._deadline = self._clock.time() + limit
            if self._timer is None:
                self._timer = self._clock.call_in(self._check, limit)

    def pause(self) -> None:
        with self._lock:
            self._deadline = None

    def stop(self) -> None:
        with self._lock:
            self._deadline = None
            if self._timer is not None:
                self._timer.cancel()

    def _check(self) -> None:
        with self._lock:
            self._timer = None
            if self._deadline is None:
                return
            left = self._deadline - self._clock.time()
            if left > 0:
                self._timer = self._clock.call_in(self._check, left)
                return
            self.fired = True
        self._cancel()
