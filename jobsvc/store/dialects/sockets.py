"""A limit on how long psycopg2 waits for an answer.

libpq itself waits for ever for a server that is frozen, or beyond a link that went silent while
something on it still acknowledges every packet: neither keepalives nor TCP_USER_TIMEOUT see that.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, set_wait_callback

# Twice what the server itself grants a statement.
SILENCE_SECONDS_MAX = 10.0
_EVENTS = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
_patience = threading.local()


def limit_waiting() -> None:
    """For every connection of this process. One that stays silent for longer is closed, and what
    waited raises OperationalError."""
    set_wait_callback(_wait)


@contextmanager
def waiting_long() -> Iterator[None]:
    """Meanwhile the calling thread waits without a limit."""
    _patience.endless = True
    try:
        yield
    finally:
        _patience.endless = False


def has_input(connection: Any) -> bool:
    """Whether there is something to read from the server, or the connection is closed."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _wait(connection: Any) -> None:
    limit_ms = None if getattr(_patience, "endless", False) else SILENCE_SECONDS_MAX * 1000
    while (state := connection.poll()) != POLL_OK:
        poll = select.poll()
        poll.register(connection.fileno(), _EVENTS[state])
        if not poll.poll(limit_ms):
            raise silence()


def silence() -> psycopg2.OperationalError:
    """What a connection that stayed silent for too long is ended with."""
    return psycopg2.OperationalError(f"no answer for {SILENCE_SECONDS_MAX:g} s")
