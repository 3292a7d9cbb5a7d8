"""How long to wait for what is out of reach."""

from __future__ import annotations

import random

SECONDS_MIN, SECONDS_MAX = 0.2, 5.0


class Backoff:
    """The waits between tries, in seconds: each is random between 0.2 and a bound that doubles with
    every try up to 5, so that those who failed together do not come back together."""

    def __init__(self) -> None:
        self.failures = 0  # since the last success
        self._bound = SECONDS_MIN

    def next(self) -> float:
        """After one more failure."""
        self.failures += 1
        self._bound = min(2 * self._bound, SECONDS_MAX)
        return random.uniform(SECONDS_MIN, self._bound)

    def reset(self) -> None:
        """After a success."""
        self.failures = 0
        self._bound = SECONDS_MIN
