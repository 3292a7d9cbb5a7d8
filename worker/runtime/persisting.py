"""Writing to a database that may be away for a while."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from jobsvc import telemetry
from jobsvc.errors import DatabaseUnavailable

T = TypeVar("T")

DATABASE_BACKOFF_SECONDS = 0.2, 5.0


def persist(write: Callable[[], T], keep_trying: Callable[[float], bool]) -> T:
    """Calls `write` again and again while the database is out of reach, as long as `keep_trying`
    says so when it is told for how many seconds that has been.

    Raises DatabaseUnavailable when it does not, and whatever else the database has against what
    is written.
    """
    began = time.monotonic()
    for tries in itertools.count():
        try:
            return write()
        except DatabaseUnavailable as error:
            if not tries:
                telemetry.get_logger("worker").warning("database out of reach", reason=str(error))
            if not keep_trying(time.monotonic() - began):
                raise
        low, high = DATABASE_BACKOFF_SECONDS
        time.sleep(random.uniform(low, min(high, low * 2 ** min(tries, 8))))
    raise AssertionError("count() does not end")
