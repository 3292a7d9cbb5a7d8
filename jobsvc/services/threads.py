"""The event loop's way to the database: a bounded pool of threads, and connections of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from jobsvc import metrics
from jobsvc.store.aio import AsyncStatements
from jobsvc.store.database import Connection, Database, Transaction
from jobsvc.store.dialects.prepared import Statement

T = TypeVar("T")

_Call = tuple["asyncio.Future[_Outcome]", Callable[..., Any], tuple[object, ...]]
_Outcome = tuple[Any, BaseException | None]


class AsyncDatabase:
    """A `Database` for the coroutines of one event loop. As many threads as connections, so that
    none waits for one.

    An executor of the standard library wakes the loop for each call; this one once for all that
    have ended meanwhile, at a fifth of the cost.
    """

    def __init__(self, database: Database, threads: int) -> None:
        self.database = database
        self._statements = AsyncStatements(database, self.run)
        self._threads_max = threads
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._ended: deque[tuple[asyncio.Future[_Outcome], _Outcome]] = deque()
        self._waking = False
        self._calls = 0  # that run or wait; only the event loop's thread counts
        metrics.DATABASE_WAITING.set_function(lambda: max(self._calls - threads, 0))

    async def write(self, body: Callable[[Transaction], T], *, numbered: bool = False) -> T:
        return await self.run(partial(self.database.write, numbered=numbered), body)

    async def read(self, body: Callable[[Connection], T]) -> T:
        return await self.run(self.database.read, body)

    async def once(self, statement: Statement, *parameters: object) -> list[tuple[Any, ...]]:
        """`Database.once` by the event loop itself: for what is small and short."""
        return await self._statements.once(statement, *parameters)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """A call whose caller is cancelled while it waits is not begun."""
        future: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        self._calls += 1
        try:
            if len(self._threads) < min(self._calls, self._threads_max):
                self._start_thread()
            self._queue.put((future, function, arguments))
            result, error = await future
        finally:
            self._calls -= 1
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """What waits is cancelled, what runs in a thread is waited for."""
        self._statements.close()
        with suppress(Empty):
            while call := self._queue.get_nowait():
                self._end(call[0], (None, asyncio.CancelledError()))
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _start_thread(self) -> None:
        name = f"db_{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while call := self._queue.get():
            future, function, arguments = call
            if future.cancelled():
                continue
            outcome: _Outcome
            try:
                outcome = function(*arguments), None
            except BaseException as error:  # noqa: BLE001 - handed to whoever asked
                outcome = None, error
            self._end(future, outcome)
            del call, future, outcome  # not to be kept until the next call

    def _end(self, future: asyncio.Future[_Outcome], outcome: _Outcome) -> None:
        """On any thread."""
        self._ended.append((future, outcome))
        if not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                future.get_loop().call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._waking = False  # first: what ends from now on may come too late for this time
        while self._ended:
            future, outcome = self._ended.popleft()
            if not future.done():
                future.set_result(outcome)
