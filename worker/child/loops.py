"""Running `async def` handlers: one event loop for each thread that runs handlers, kept from job to
job, so that a client which one job has opened serves the next. Loaded with the first such handler.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

# For tasks that a handler has left, once they are cancelled.
_LEAVE_SECONDS_MAX: Final = 1.0

OnStop = Callable[[Callable[[], object] | None], None]

_of_thread = threading.local()


def run(coroutine: Coroutine[Any, Any, Any], on_stop: OnStop) -> Any:
    """Run a handler's coroutine to its end, and answer what it returns or raise what it raises.

    `on_stop` is given what cancels it, from any thread, and None once that is over. Other tasks
    that it leaves are cancelled.
    """
    runner: asyncio.Runner | None = getattr(_of_thread, "runner", None)
    if runner is None:
        runner = _of_thread.runner = asyncio.Runner()
    try:
        answer, leaving = runner.run(
            _attempt(_keep_in(coroutine), on_stop), context=contextvars.copy_context()
        )
    except (SystemExit, KeyboardInterrupt):  # by another task of the handler's
        close()
        raise
    if asyncio.all_tasks(runner.get_loop()):  # they heed no cancellation: it is never run again
        _of_thread.runner = None
        runner.get_loop().close()
    if leaving is not None:
        raise leaving
    return answer


def close() -> None:
    """Close this thread's loop, if it has one."""
    runner: asyncio.Runner | None = getattr(_of_thread, "runner", None)
    if runner is not None:
        _of_thread.runner = None
        runner.close()


async def _keep_in(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """Have what would break out of the loop in the middle of its work returned."""
    try:
        return await coroutine, None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


async def _attempt(coroutine: Coroutine[Any, Any, Any], on_stop: OnStop) -> Any:
    loop = asyncio.get_running_loop()
    handler = loop.create_task(coroutine)
    executor = ThreadPoolExecutor(thread_name_prefix="asyncio")  # its threads are the attempt's
    loop.set_default_executor(executor)
    on_stop(lambda: loop.call_soon_threadsafe(handler.cancel))
    try:
        await asyncio.wait((handler,))
        return handler.result()
    finally:
        on_stop(None)
        executor.shutdown(wait=False, cancel_futures=True)
        await _cancel_others()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if not others:
        return
    for task in others:
        task.cancel()
    await asyncio.wait(others, timeout=_LEAVE_SECONDS_MAX)
