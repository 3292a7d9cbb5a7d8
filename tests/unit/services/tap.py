"""The thread pool of the services with a tap on it: tests come between a read and its use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from jobsvc.errors import DatabaseUnavailable
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store.database import Connection, Database

T = TypeVar("T")


class Tap(AsyncDatabase):
    """`away`: the database does not answer. `then` is called after each read, before whoever reads
    has the answer. While `open` is not set, answers are kept back."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, 4)
        self.away = False
        self.reads = 0
        self.then: Callable[[], None] = lambda: None
        self.open = asyncio.Event()
        self.open.set()
        self.kept = asyncio.Event()  # an answer is being kept back

    async def read(self, body: Callable[[Connection], T]) -> T:
        self.reads += 1
        if self.away:
            raise DatabaseUnavailable
        found = await super().read(body)
        if not self.open.is_set():
            self.kept.set()
            await self.open.wait()
            self.kept.clear()
        self.then()
        return found
