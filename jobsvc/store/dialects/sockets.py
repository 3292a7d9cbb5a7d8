"""A limit on how long our own connections of psycopg2 wait for an answer.

libpq itself waits for ever for a server that is frozen, or beyond a link that went silent while
something on it still acknowledges every packet: neither keepalives nor TCP_USER_TIMEOUT see that.
A thread shuts the socket of a connection that waits for too long. psycopg2 has a hook for waiting,
but one for the whole process: with it no connection can COPY, those of handlers in threads neither.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg2
from psycopg2 import extensions

from jobsvc import vital

# Twice what the server itself grants a statement.
SILENCE_SECONDS_MAX = 10.0

_LOOKS = 20  # in that time

P = ParamSpec("P")
T = TypeVar("T")

_patience = threading.local()
_numbers = count()
# Who waits, by a number of its own: until when, and on what. Whoever takes an entry out has it.
_waiting: dict[int, tuple[float, _Line]] = {}
_start_lock = threading.Lock()
_thread: threading.Thread | None = None


class _Line:
    """The socket of a connection, by a descriptor of our own, which no other can come to have."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def shut(self) -> None:
        """Whoever waits for it hears that it has ended, if it has not by itself meanwhile."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as end:
            end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


def _limited(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Have a method of a connection or cursor wait no longer than the limit."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if getattr(_patience, "endless", False):
            return method(self, *args, **kwargs)
        number = next(_numbers)
        _waiting[number] = time.monotonic() + SILENCE_SECONDS_MAX, self.line
        try:
            return method(self, *args, **kwargs)
        except psycopg2.OperationalError as error:
            if number not in _waiting:
                raise silence() from error
            raise
        finally:
            _waiting.pop(number, None)

    return call


class _Cursor(extensions.cursor):
    @property
    def line(self) -> _Line:
        line: _Line = self.connection.line  # type: ignore[attr-defined]
        return line

    execute = _limited(extensions.cursor.execute)
    executemany = _limited(extensions.cursor.executemany)


class LimitedConnection(extensions.connection):
    """One that stays silent for longer than the limit is closed, and what waited raises
    OperationalError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = _Cursor
        self.line = _Line(self.fileno())
        _watch()

    def set_isolation_level(self, level: int | None) -> None:
        """What sessions have from their start is not set again: that would cost a statement after
        each use in autocommit, and an error of the driver's own where it fails."""
        default = extensions.ISOLATION_LEVEL_DEFAULT
        is_default = level == extensions.ISOLATION_LEVEL_READ_COMMITTED
        super().set_isolation_level(default if is_default else level)

    commit = _limited(extensions.connection.commit)
    rollback = _limited(extensions.connection.rollback)

    def close(self) -> None:
        super().close()
        self.line.close()


def _watch() -> None:
    global _thread
    with _start_lock:
        if _thread is None:
            _thread = vital.thread("silence", _shut_silent)
            _thread.start()


def _shut_silent() -> None:
    while True:
        time.sleep(SILENCE_SECONDS_MAX / _LOOKS)
        now = time.monotonic()
        for number, (until, line) in list(_waiting.items()):
            if now >= until and _waiting.pop(number, None) is not None:
                line.shut()


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


def wait(connection: Any) -> None:
    """Until an asynchronous connection has done what it is at. One that stays silent for too long
    is closed, and OperationalError raised."""
    while (state := connection.poll()) != extensions.POLL_OK:
        poll = select.poll()
        reads = state == extensions.POLL_READ
        poll.register(connection.fileno(), select.POLLIN if reads else select.POLLOUT)
        if not poll.poll(SILENCE_SECONDS_MAX * 1000):
            connection.close()
            raise silence()


def silence() -> psycopg2.OperationalError:
    """What a connection that stayed silent for too long is ended with."""
    return psycopg2.OperationalError(f"no answer for {SILENCE_SECONDS_MAX:g} s")
