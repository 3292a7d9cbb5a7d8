"""The bounded pool of threads in which the event loop's database work runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from jobsvc import metrics
from jobsvc.store.database import Connection, Database, Transaction

T = TypeVar("T")


class AsyncDatabase:
    """A `Database` for coroutines. As many threads as connections, so that none waits for one."""

    def __init__(self, database: Database, threads: int) -> None:
        self._database = database
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="db")
        self._calls = 0  # that run or wait; only the event loop's thread counts
        metrics.DATABASE_WAITING.set_function(lambda: max(self._calls - threads, 0))

    async def write(self, body: Callable[[Transaction], T], *, numbered: bool = False) -> T:
        return await self.run(partial(self._database.write, numbered=numbered), body)

    async def read(self, body: Callable[[Connection], T]) -> T:
        return await self.run(self._database.read, body)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        self._calls += 1
        try:
            return await loop.run_in_executor(self._executor, function, *arguments)
        finally:
            self._calls -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
