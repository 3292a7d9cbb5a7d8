"""The services' way to the database with a tap on it: tests come between a read and its use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from jobsvc.errors import DatabaseUnavailable
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement

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

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        call = super().run(function, *arguments)
        return await (call if function == self._statements._connect else self._tapped(call))

    async def once(self, statement: Statement, *parameters: object) -> list[tuple[Any, ...]]:
        return await self._tapped(super().once(statement, *parameters))

    async def _tapped(self, call: Coroutine[Any, Any, T]) -> T:
        self.reads += 1
        if self.away:
            call.close()
            raise DatabaseUnavailable
        found = await call
        if not self.open.is_set():
            self.kept.set()
            await self.open.wait()
            self.kept.clear()
        self.then()
        return found
