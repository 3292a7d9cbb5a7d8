"""The table of the attempts that a worker holds: from their claim until their ending is recorded.

Every room of the runtime looks in here; whoever adds, ends or takes out an attempt says so here
first. It knows nothing of the database, the broker or the pool.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobsvc import metrics
from jobsvc.core.attempts import AttemptKey, Claimed, Ending
from worker.runtime.consumer import Delivery

# So many of the last cancels that were told are remembered: those of the time that a claim takes.
TOLD_MAX = 1000


@dataclass(slots=True, eq=False)
class Attempt:
    """One job under one lease. Times are monotonic seconds."""

    claimed: Claimed
    delivery: Delivery
    renewed: float
    ended: bool = False  # its ending is known, and waits to be recorded
    lost: bool = False
    detached: bool = False
    started: float | None = None
    span: Any = None  # of tracing
    log_bytes: int = 0
    output_bytes: int = 0

    @property
    def job_id(self) -> str:
        return self.claimed.job_id

    @property
    def token(self) -> str:
        return self.claimed.token


class Attempts:
    """Safe to use from any thread; no call waits for more than the table's own lock."""

    def __init__(self, claimable: threading.Event, beat: threading.Event) -> None:
        """`claimable` is set when no more than `wake_at` are left unended, and again as they are
        recorded; `beat`, to have the leases renewed at once, when one is to be cancelled."""
        self._claimable = claimable
        self._beat = beat
        self.wake_at = 0
        self._lock = threading.Lock()
        self._held: dict[AttemptKey, Attempt] = {}
        self._ended = 0
        self._told: dict[str, None] = {}  # jobs to be cancelled, latest last: not ours, or not yet
        self._claimed_at: float | None = None
        metrics.RUNNING.set_function(lambda: len(self))

    def __len__(self) -> int:
        return len(self._held)

    @property
    def unended(self) -> int:
        """How many run, or wait for a slot."""
        return len(self._held) - self._ended

    @property
    def ended(self) -> int:
        """How many wait to be recorded."""
        return self._ended

    @property
    def idle(self) -> bool:
        """Nothing runs, nor waits to be recorded, but for what has no message any more: somebody
        else has locked it."""
        with self._lock:
            return all(each.ended and each.detached for each in self._held.values())

    @property
    def detached(self) -> int:
        """How many run on without a message."""
        with self._lock:
            return sum(each.detached and not each.ended for each in self._held.values())

    def add(self, attempts: Sequence[Attempt], claimed_at: float) -> None:
        with self._lock:
            self._held.update((attempt.claimed.key, attempt) for attempt in attempts)
            if attempts:
                self._claimed_at = claimed_at
            told = any(attempt.job_id in self._told for attempt in attempts)
        if told:
            self._beat.set()

    def find(self, claimed: Iterable[Claimed]) -> list[Attempt]:
        """Of those that are held."""
        with self._lock:
            found = [self._held.get(each.key) for each in claimed]
        return [attempt for attempt in found if attempt is not None]

    def get(self, claimed: Claimed) -> Attempt | None:
        return self._held.get(claimed.key)

    def end(self, endings: Iterable[tuple[Claimed, Ending]]) -> dict[Attempt, Ending]:
        """Marks them as ended; answers those that are held."""
        ended: dict[Attempt, Ending] = {}
        with self._lock:
            for claimed, ending in endings:
                if (attempt := self._held.get(claimed.key)) is not None:
                    self._ended += not attempt.ended
                    attempt.ended = True
                    ended[attempt] = ending
        self._tell_room()
        return ended

    def remove(self, attempts: Iterable[Attempt]) -> None:
        """Of what has ended, once that is recorded or given up."""
        with self._lock:
            for attempt in attempts:
                del self._held[attempt.claimed.key]
                self._ended -= 1
        self._tell_room()

    def _tell_room(self) -> None:
        if self.unended <= self.wake_at and not self._claimable.is_set():
            self._claimable.set()

    def lose(self, attempt: Attempt) -> bool:
        """Gives up an attempt whose lease is gone; false if there is nothing to give up.

        With its ending known it is no more ours to stop; the token decides. A lease that is missing
        is then most likely the one that just ended by being recorded.
        """
        with self._lock:
            if attempt.ended or attempt.claimed.key not in self._held:
                return False
            attempt.lost = True
            return True

    def detach(self, received_before: float) -> list[Attempt]:
        """Marks those whose message is older than that; answers them."""
        with self._lock:
            long = [
                attempt
                for attempt in self._held.values()
                if not attempt.detached and attempt.delivery.received < received_before
            ]
            for attempt in long:
                attempt.detached = True
        return long

    def leased(self) -> list[Attempt]:
        """Those whose lease is to be renewed."""
        with self._lock:
            return [attempt for attempt in self._held.values() if not attempt.lost]

    def on_cancel_told(self, job_id: str) -> None:
        """The cancel of a running job was requested, perhaps while the claim of it is under way."""
        with self._lock:
            held = any(attempt.job_id == job_id for attempt in self._held.values())
            if not held:
                self._told[job_id] = None
                if len(self._told) > TOLD_MAX:
                    del self._told[next(iter(self._told))]
        if held:
            self._beat.set()

    def deliveries(self) -> Counter[str]:
        """How many messages they hold, by queue."""
        with self._lock:
            held = [each.delivery.queue for each in self._held.values() if not each.detached]
        return Counter(held)

    def seconds_since_claim(self) -> float | None:
        """None before the first job was claimed."""
        return None if self._claimed_at is None else time.monotonic() - self._claimed_at
