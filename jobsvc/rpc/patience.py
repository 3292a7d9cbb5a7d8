"""How long a stream waits for its client to read."""

from __future__ import annotations

import asyncio
from typing import Any, Self, TypeAlias

import grpc.aio

from jobsvc.errors import WatcherTooSlow

# Generic to the type checker alone.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

WRITE_SECONDS_MAX = 20.0


class ClientGone(Exception):
    """A write failed: nobody is left to tell."""


class Patience:
    """With a stream's client: a write that is blocked for too long ends the stream.

    Most writes are over at once, so that they have one timer between them, which looks how long
    the one that is under way has been. It belongs to the task that makes it.
    """

    __slots__ = (
        *("_cancelling", "_is_over", "_loop", "_seconds_max", "_task", "_timer"),
        *("_writing_since", "blocked", "caller"),
    )

    def __init__(self, seconds_max: float, caller: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._seconds_max = seconds_max
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writing_since: float | None = None
        self._is_over = False
        self.caller = caller
        self.blocked = 0  # bytes of the message that is being written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, data: bytes, context: Context) -> None:
        """Raises WatcherTooSlow, and ClientGone."""
        self._writing_since = self._loop.time()
        self.blocked = len(data)
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds_max, self._look)
        try:
            await context.write(data)
        except asyncio.CancelledError:
            # Unless the client has left at the same moment, which is told by another cancel.
            if self._is_over and self._task.uncancel() <= self._cancelling:
                raise WatcherTooSlow from None
            raise
        except grpc.aio.BaseError as error:
            raise ClientGone from error
        finally:
            self._writing_since = None
            self.blocked = 0

    def give_up(self) -> None:
        """Ends the write that is under way, as if it had been blocked for too long."""
        if self._writing_since is not None and not self._is_over:
            self._is_over = True
            self._task.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._writing_since is None:
            return  # the next write begins anew
        left = self._writing_since + self._seconds_max - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.give_up()
