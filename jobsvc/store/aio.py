"""Single statements that an event loop runs by itself, on PostgreSQL.

A thread between costs a lone caller more than the statement does: the interpreter is handed over
and both are woken, twice. So what is small and short goes this way; what takes a while to prepare
or to read is better done beside the loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.database import CONFLICT_RETRIES, CommitUnknown, Database, conflict_pause
from jobsvc.store.dialects import prepared
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.dialects.sockets import SILENCE_SECONDS_MAX, has_input, silence, wait

# One that writes, one that reads: each caller has one statement under way.
LOOP_CONNECTIONS = 2

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


class AsyncStatements:
    """Belongs to one event loop. Connects when it is first used."""

    def __init__(self, database: Database, in_thread: InThread) -> None:
        """`in_thread` runs what blocks."""
        self._database = database
        self._in_thread = in_thread
        self._idle: list[_Connection] = []
        self._free = asyncio.Semaphore(LOOP_CONNECTIONS)

    async def once(self, statement: Statement, *parameters: object) -> list[tuple[Any, ...]]:
        """As `Database.once`. A caller that is cancelled leaves it open what became of it."""
        async with self._free:
            for attempt in range(CONFLICT_RETRIES + 1):
                try:
                    return await self._once(statement, parameters)
                except psycopg2.Error as error:
                    self._judge(error, attempt)
                await asyncio.sleep(conflict_pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _judge(self, error: psycopg2.Error, attempt: int) -> None:
        try:
            self._database.raise_unless_conflict(error, attempt)
        except DatabaseUnavailable:
            self.close()  # the others lead to the same server
            raise

    async def _once(
        self, statement: Statement, parameters: tuple[object, ...]
    ) -> list[tuple[Any, ...]]:
        connection = await self._connection()
        try:
            rows = await connection.run(statement, parameters, prepare=self._database.prepare)
        except psycopg2.Error as error:
            if connection.closed:
                raise CommitUnknown(self._database.told(error)) from error
            self._idle.append(connection)
            raise
        except BaseException:
            connection.close()  # the answer is still to come
            raise
        self._idle.append(connection)
        return rows

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_ending():
                return connection
            connection.close()
        return _Connection(await self._in_thread(self._connect))

    def _connect(self) -> Any:
        """In a thread, as names are looked up."""
        arguments = self._database.connect_arguments
        try:
            connection = psycopg2.connect(**{**arguments, **_place(arguments)}, async_=True)
            wait(connection)
            if self._database.prepare:
                with connection.cursor() as cursor:
                    cursor.execute(prepared.PLAN_BY_INDEX)
                    wait(connection)
        except psycopg2.Error as error:
            raise DatabaseUnavailable(self._database.told(error)) from error
        return connection


def _place(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the server that they lead to. An asynchronous connection knows no connect_timeout: of
    several hosts, or addresses of one, it would wait for a silent one for ever."""
    with closing(psycopg2.connect(**arguments)) as found:
        place = {"host": found.info.host, "port": found.info.port}
        with socket.socket(fileno=os.dup(found.fileno())) as line:
            if line.family != socket.AF_UNIX:
                place["hostaddr"] = line.getpeername()[0]
    return place


class _Connection:
    """Of psycopg2's asynchronous kind, which commits each statement by itself."""

    def __init__(self, connection: Any) -> None:
        self._raw = connection
        self._loop = asyncio.get_running_loop()
        self._socket = connection.fileno()
        self._prepared: set[str] = set()
        self._answer: asyncio.Future[None] | None = None
        self._loop.add_reader(self._socket, self._on_input)

    @property
    def closed(self) -> bool:
        return bool(self._raw.closed)

    def is_ending(self) -> bool:
        """Closed, or the server has said something that it was not asked for."""
        return self.closed or has_input(self._raw)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._raw.close()

    async def run(
        self, statement: Statement, parameters: tuple[object, ...], *, prepare: bool
    ) -> list[tuple[Any, ...]]:
        with self._raw.cursor() as cursor:
            if prepare and statement.name not in self._prepared:
                await self._execute(cursor, statement.prepare)
                self._prepared.add(statement.name)
            await self._execute(
                cursor, statement.execute if prepare else statement.in_full, parameters
            )
            return list(cursor.fetchall()) if cursor.description else []

    async def _execute(
        self, cursor: Any, text: str, parameters: tuple[object, ...] | None = None
    ) -> None:
        cursor.execute(text, parameters)
        self._answer = self._loop.create_future()
        timer = self._loop.call_later(SILENCE_SECONDS_MAX, self._give_up)
        try:
            self._poll()
            await self._answer
        finally:
            timer.cancel()
            self._answer = None

    def _on_input(self) -> None:
        if self._answer is None:
            self.close()  # unasked for: the server is going away
        else:
            self._poll()

    def _poll(self) -> None:
        answer = self._answer
        if answer is None or answer.done():
            return
        try:
            state = self._raw.poll()
        except psycopg2.Error as error:
            if self.closed:
                self.close()
            answer.set_exception(error)
            return
        if state == POLL_WRITE:
            self._loop.add_writer(self._socket, self._poll)
        else:
            self._loop.remove_writer(self._socket)
        if state == POLL_OK:
            answer.set_result(None)

    def _give_up(self) -> None:
        if self._answer is not None and not self._answer.done():
            self.close()
            self._answer.set_exception(silence())
