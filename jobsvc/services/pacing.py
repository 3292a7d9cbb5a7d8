"""Work that can wait a little, done so that what cannot has its share of the process."""

from __future__ import annotations

import asyncio
import time


class Pace:
    """Turns with pauses in between, long enough for the process to use no more than `share` of a
    core, but no longer than `seconds_max` each: what is paced goes on however busy the process is
    with others."""

    def __init__(self, share: float, seconds_max: float) -> None:
        self._share = share
        self._seconds_max = seconds_max
        self._turn = asyncio.Lock()
        self._began, self._used = time.monotonic(), time.process_time()

    async def turn(self) -> None:
        """Returns when it is the caller's turn."""
        async with self._turn:
            elapsed, used = time.monotonic() - self._began, time.process_time() - self._used
            await asyncio.sleep(min(max(used / self._share - elapsed, 0.0), self._seconds_max))
            self._began, self._used = time.monotonic(), time.process_time()
