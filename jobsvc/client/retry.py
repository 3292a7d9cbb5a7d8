"""When to try again, and when to give up."""

from __future__ import annotations

from collections.abc import Callable

from jobsvc.client.clock import Clock
from jobsvc.client.errors import CallFailed

BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 10.0


class Backoff:
    """Full jitter: each wait is random between 0 and a bound that doubles from 0.1 s to 10 s.

    What the server asked for is added to it, so that those whom it sent away together do not come
    back together.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._bound = BACKOFF_SECONDS_MIN

    def next(self, failed: CallFailed) -> float:
        seconds = self._random() * self._bound
        self._bound = min(2 * self._bound, BACKOFF_SECONDS_MAX)
        return seconds + (failed.retry_after or 0.0)

    def reset(self) -> None:
        self._bound = BACKOFF_SECONDS_MIN


class Outage:
    """Decides for a stream that broke whether and when it is opened again.

    Until the first message it has `first` seconds, so that an address where nobody answers is
    soon reported; later `longest` seconds since the last message.
    """

    def __init__(
        self, clock: Clock, random: Callable[[], float], first: float, longest: float
    ) -> None:
        self._clock = clock
        self._backoff = Backoff(random)
        self._limit = first
        self._longest = longest
        self._heard = clock.time()
        self._opened = self._heard

    def heard(self) -> None:
        self._heard = self._clock.time()
        self._limit = self._longest

    def progressed(self) -> None:
        self._backoff.reset()

    def wait(self, failed: CallFailed) -> None:
        """Sleeps until the next try; raises `failed` if there is to be none."""
        if not _resumable(failed):
            raise failed
        if self._heard - self._opened >= BACKOFF_SECONDS_MAX:  # a stream that did its duty
            self._backoff.reset()
        delay = self._backoff.next(failed)
        if self._clock.time() + delay - self._heard > self._limit:
            raise failed
        self._clock.sleep_for(delay)
        self._opened = self._clock.time()


def _resumable(failed: CallFailed) -> bool:
    # ABORTED: we read too slowly. DEADLINE_EXCEEDED: the stream outlived the age that servers
    # allow, so that this one must have been forgotten.
    return failed.transient or failed.code in {"ABORTED", "DEADLINE_EXCEEDED"}
