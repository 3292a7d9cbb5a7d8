"""Writing to a database that may be away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from jobsvc.core.backoff import Backoff
from jobsvc.errors import DatabaseUnavailable

T = TypeVar("T")


def persist(write: Callable[[], T], keep_trying: Callable[[float], bool]) -> T:
    """Calls `write` again and again while the database is out of reach, as long as `keep_trying`
    says so when it is told for how many seconds that has been.

    Raises DatabaseUnavailable when it does not, and whatever else the database has against what
    is written.
    """
    began = time.monotonic()
    backoff = Backoff()
    while True:
        try:
            return write()
        except DatabaseUnavailable:  # which the database's own log has told
            if not keep_trying(time.monotonic() - began):
                raise
        time.sleep(backoff.next())
