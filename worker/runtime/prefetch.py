"""How many messages to hold: as many as run, and as many more as will start within a moment."""

from __future__ import annotations

from worker.pool import Pool
from worker.runtime.attempts import Attempts
from worker.runtime.consumer import Consumer

PREFETCH_MAX = 200
AHEAD_SECONDS = 0.1
AVERAGE_SECONDS_MIN = 1e-4


class Prefetch:
    """Used by one thread at a time is not asked for: two that adapt at once agree."""

    def __init__(
        self, consumer: Consumer, pool: Pool, attempts: Attempts, *, concurrency: int
    ) -> None:
        self._consumer = consumer
        self._pool = pool
        self._attempts = attempts
        self._concurrency = concurrency
        self._current = concurrency
        self._paused = False

    def pause(self) -> None:
        """No messages at all until `resume`."""
        self._paused = True
        self.adapt()

    def resume(self) -> None:
        self._paused = False
        self.adapt()

    def adapt(self) -> None:
        """None for the slots whose long attempts have given theirs back. Changed only when it
        matters: it costs the consumer a new subscription."""
        slots = self._concurrency - self._attempts.detached
        average = max(self._pool.average_run_seconds, AVERAGE_SECONDS_MIN)
        wanted = min(slots + int(slots * AHEAD_SECONDS / average), max(PREFETCH_MAX, slots))
        if self._paused:
            wanted = 0
        small = wanted <= self._concurrency and wanted != self._current
        if small or not self._current / 2 <= wanted <= self._current * 2:
            self._current = wanted
            self._consumer.set_prefetch(wanted)
