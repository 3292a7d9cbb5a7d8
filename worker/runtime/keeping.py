"""What the lease thread may do to attempts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from jobsvc import metrics, telemetry
from worker.pool import Pool
from worker.runtime.attempts import Attempt, Attempts
from worker.runtime.consumer import Consumer
from worker.runtime.inbox import Inbox
from worker.runtime.lease import Leased
from worker.runtime.prefetch import Prefetch
from worker.runtime.records import ids

# Longer than this an attempt keeps its message: the lease protects it, and the broker gives up on
# consumers that acknowledge nothing for long (30 min by default).
DETACH_SECONDS = 600.0


class AttemptKeeper:
    """Implements the lease thread's Keeper."""

    def __init__(
        self,
        attempts: Attempts,
        inbox: Inbox,
        pool: Pool,
        consumer: Consumer,
        prefetch: Prefetch | None,
        *,
        worker_id: str,
    ) -> None:
        self._attempts = attempts
        self._inbox = inbox
        self._pool = pool
        self._consumer = consumer
        self._prefetch = prefetch
        self._worker_id = worker_id
        self._log = telemetry.get_logger("worker")

    def leased(self) -> Sequence[Attempt]:
        return self._attempts.leased()

    def on_lease_lost(self, attempt: Leased, reason: str) -> None:
        assert isinstance(attempt, Attempt)
        if self._attempts.lose(attempt):
            metrics.LEASES_LOST.inc()
            fields = ids(attempt.claimed, self._worker_id)
            self._log.warning("attempt stopped", reason=reason, **fields)
            self._pool.abandon(attempt.claimed.key)

    def on_cancel_requested(self, attempt: Leased) -> None:
        assert isinstance(attempt, Attempt)
        self._pool.cancel(attempt.claimed.key)

    def standing(self) -> tuple[float | None, Counter[str]]:
        held = self._inbox.deliveries() + self._attempts.deliveries()
        return self._attempts.seconds_since_claim(), held

    def on_beat(self) -> None:
        """Long attempts give their message back, and take up none of the prefetch."""
        long = self._attempts.detach(time.monotonic() - DETACH_SECONDS)
        self._consumer.acknowledge([attempt.delivery for attempt in long])
        if self._prefetch is not None:
            self._prefetch.adapt()
