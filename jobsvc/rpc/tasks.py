"""The tasks of calls: how a call is ended whose client does not let it end.

grpc.aio has two tasks for each call: one serves it, the other waits until it is over, and keeps it
alive meanwhile. It offers no way to cancel a call from this side; but a call that nobody holds any
more is cancelled by gRPC's core, with all that it had buffered. (grpc.aio also holds the call that
came last, until another comes.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

_SERVING = "_handle_exceptions"  # grpc.aio's coroutine that serves a call


class _Serving(asyncio.Task[Any]):
    __slots__ = ("holder",)

    holder: asyncio.Task[Any] | None


def know_calls(loop: asyncio.AbstractEventLoop) -> None:
    """From now on the tasks of calls on this loop know who holds them."""
    loop.set_task_factory(_make_task)


def holder() -> asyncio.Task[Any] | None:
    """Who holds the call that the running task serves; None on a loop that knows no calls. Ends
    when the call is over; cancelled it lets go of the call, once the serving task has ended."""
    return getattr(asyncio.current_task(), "holder", None)


def _make_task(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    **options: Any,
) -> asyncio.Task[Any]:
    if getattr(coro, "__name__", "") != _SERVING:
        return asyncio.Task(coro, loop=loop, **options)
    task = _Serving(coro, loop=loop, **options)
    task.holder = asyncio.current_task()
    return task
