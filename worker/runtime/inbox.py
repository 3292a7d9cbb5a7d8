"""What was received and not claimed yet: the most urgent first, then as it came."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from worker.runtime.attempts import Attempts
from worker.runtime.consumer import Delivery


class Inbox:
    """Implements the consumer's Receiver. Safe to use from any thread."""

    def __init__(
        self,
        claimable: threading.Event,
        attempts: Attempts,
        *,
        redelivered: bool,
    ) -> None:
        """`claimable` is set when something comes and nothing was there. `redelivered`: what
        a lost channel has delivered comes again."""
        self._claimable = claimable
        self._attempts = attempts
        self._redelivered = redelivered
        self._lock = threading.Lock()
        self._heap: list[tuple[int, int, Delivery]] = []
        self._arrivals = itertools.count()
        self._open = True

    def __len__(self) -> int:
        return len(self._heap)

    def on_deliveries(self, deliveries: Sequence[Delivery]) -> bool:
        with self._lock:
            if not self._open:
                return False
            was_empty = not self._heap
            for delivery in deliveries:
                heapq.heappush(self._heap, (-delivery.priority, next(self._arrivals), delivery))
        if was_empty:  # else room is what it waits for
            self._claimable.set()
        return True

    def on_channel_lost(self, epoch: int) -> None:
        if self._redelivered:
            with self._lock:
                self._keep(lambda delivery: delivery.epoch > epoch)

    def on_cancel_told(self, job_id: str) -> None:
        self._attempts.on_cancel_told(job_id)

    def take(self, most: int) -> tuple[dict[str, Delivery], list[Delivery]]:
        """The next messages by job, one each, and those that only repeat one of them.

        Of two with different priorities one is out of date, which only the claim will tell: the
        second stays for the next round.
        """
        batch: dict[str, Delivery] = {}
        repeated = []
        second = []
        with self._lock:
            for _ in range(min(most, len(self._heap))):
                entry = heapq.heappop(self._heap)
                delivery = entry[2]
                first = batch.setdefault(delivery.job_id, delivery)
                if first.priority != delivery.priority:
                    second.append(entry)
                elif first is not delivery:
                    repeated.append(delivery)
            for entry in second:
                heapq.heappush(self._heap, entry)
        return batch, repeated

    def take_late(self, received_before: float) -> list[Delivery]:
        """Those that have waited since before then."""
        with self._lock:
            return self._keep(lambda delivery: delivery.received >= received_before)

    def close(self) -> list[Delivery]:
        """Takes no more; answers what is left."""
        with self._lock:
            self._open = False
            return self._keep(lambda _: False)

    def deliveries(self) -> Counter[str]:
        """How many wait, by queue."""
        with self._lock:
            return Counter(entry[2].queue for entry in self._heap)

    def _keep(self, wanted: Callable[[Delivery], bool]) -> list[Delivery]:
        """Drops and answers the others; called with the lock held."""
        others = [entry[2] for entry in self._heap if not wanted(entry[2])]
        if others:
            self._heap = [entry for entry in self._heap if wanted(entry[2])]
            heapq.heapify(self._heap)
        return others
