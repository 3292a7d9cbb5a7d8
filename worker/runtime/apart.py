"""Jobs that ran in a worker when it died, each of which may be why: they run again alone in one, so
that the next death tells, and costs no other.

A worker that gets the message of such a job lets what runs come to its end, and takes no other
messages until it has run those it has, one at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from worker.runtime.attempts import Attempts
from worker.runtime.consumer import Consumer, Delivery
from worker.runtime.inbox import Inbox
from worker.runtime.prefetch import Prefetch


class Apart:
    """Used by the claiming thread alone."""

    def __init__(self, attempts: Attempts, consumer: Consumer, prefetch: Prefetch | None) -> None:
        """`prefetch` None: this worker is alone, and what it has waits."""
        self._attempts = attempts
        self._consumer = consumer
        self._prefetch = prefetch
        self._waiting: deque[Delivery] = deque()
        self.under_way = False  # nothing else is to be claimed

    @property
    def ready(self) -> bool:
        """Whether `take` has something to say: nothing runs any more."""
        return self.under_way and self._attempts.idle

    def add(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        self._waiting.extend(deliveries)
        self.under_way = True
        if self._prefetch is not None:
            self._prefetch.pause()

    def take(self) -> Delivery | None:
        """The next; None after the last, and all others have their turn again."""
        if self._waiting:
            return self._waiting.popleft()
        self.under_way = False
        if self._prefetch is not None:
            self._prefetch.resume()
        return None

    def pass_on(self, inbox: Inbox) -> None:
        """To other workers, what has come beside them."""
        if self._prefetch is not None:
            self._consumer.give_back(inbox.take_late(time.monotonic()))

    def close(self) -> list[Delivery]:
        """Answers what is left."""
        left, self._waiting = list(self._waiting), deque()
        return left
