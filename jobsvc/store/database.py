"""Engine, transactions and the differences between PostgreSQL and SQLite.

Everything here blocks: the server calls it from a bounded thread pool, workers from their own
threads. A `Database` may be shared by threads; a `Transaction` belongs to one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg2
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import PoolProxiedConnection

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.dialects import prepared
from jobsvc.store.dialects.clock import CLOCK, CLOCK_NUMBERED, CLOCK_SQLITE, NUMBER
from jobsvc.store.dialects.engines import (
    SQLITE_WAIT_SECONDS,
    begin_sqlite,
    cause,
    database_url,
    postgresql_arguments,
    prepare_sqlite,
    sqlstate,
)
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.dialects.reading import BY_INDEX
from jobsvc.store.dialects.sockets import LimitedConnection, has_input
from jobsvc.store.tables import service
from jobsvc.store.trouble import Troubles

T = TypeVar("T")
Connection = sa.Connection  # what a reader is given; callers name it without knowing SQLAlchemy
CONFLICT_RETRIES = 3
# For single statements, beside those for transactions. They are short, and few threads have any.
SINGLE_CONNECTIONS = 3
# SQLSTATEs: serialization failure and deadlock are worth another try at once; lock_timeout too,
# since our own transactions hold row locks for milliseconds.
_CONFLICTS = {"40001", "40P01", "55P03"}
# The server is not (or no longer) one that takes writes: read-only after a failover, shutdown,
# crash recovery, too many connections, out of disk or memory. Or it does not let our role.
_OUT_OF_REACH = {"25006", "53100", "53200", "53300", "57P01", "57P02", "57P03", "57P05", "42501"}
# Of these every pooled connection is suspect: a demoted primary still answers a ping.
_DISPOSE = {"25006", "57P01", "57P02", "57P03"}


def conflict_pause(attempt: int) -> float:
    """In seconds, before another try."""
    return random.uniform(0, 0.02 * 2**attempt)


class CommitUnknown(DatabaseUnavailable):
    """The connection was lost while COMMIT was under way: it may or may not have happened.

    Whoever can must look it up by what it wrote (job id, lease token) before trying again.
    """


class Refused(Exception):
    """The database has something against what a single statement was given: `sqlstate` says what.

    The driver's own words are left out, as they may hold what was given: payloads, results, keys.
    """

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__(f"the statement was refused, SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate


@dataclass(slots=True)
class Transaction:
    """A write transaction under way. `now` is the database's clock at its start: all times that
    are stored or compared come from it, never from the caller's machine. `limited`: some queue is
    paused or has a limit. `waits`: for rows that somebody else has locked."""

    connection: sa.Connection
    now: datetime
    registry_revision: int
    limited: bool = False
    x_base: int = 0
    number: int | None = None
    waits: bool = True

    def learn_number(self, number: int | None) -> None:
        """That of this transaction, which came along with something else; None: it did not."""
        if self.number is None:
            self.number = number

    def advance(self, now: datetime) -> None:
        """It has waited for others, whose end is not to be after what it does."""
        self.now = max(self.now, now)

    @property
    def x(self) -> int:
        """Where this transaction's events stand in one order of all events.

        On PostgreSQL it grows with the transaction's number, so that what has committed below
        the oldest number that is still under way is complete. A job's later event never stands
        before an earlier one: it takes the greater of this and `jobs.last_x`. On SQLite, which
        has one writer, it is a count.
        """
        if self.number is None:
            if self.connection.dialect.name == "sqlite":
                self.number = 1
                self.execute(sa.update(service).values(x_base=service.c.x_base + 1))
            else:
                self.number = self.execute(sa.select(NUMBER)).scalar_one()
        return self.x_base + self.number

    def execute(self, statement: sa.Executable, parameters: Any = None) -> sa.CursorResult[Any]:
        return self.connection.execute(statement, parameters)


class Database:
    def __init__(self, url: str | sa.URL, *, pool_size: int = 10, prepare: bool = True) -> None:
        """Connects to nothing yet. `pool_size` bounds the connections and so the threads that can
        use them side by side; `once` has a few of its own. `prepare`: connections keep what is
        prepared on them, which those of a pooler in transaction mode do not. Raises CannotStart for
        a URL that cannot be one."""
        self.url = database_url(url)
        self._troubles = Troubles()
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._writer = threading.Lock() if self.sqlite else nullcontext()
        # hide_parameters: what SQLAlchemy says of a failed statement must not tell payloads.
        if self.sqlite:
            self.engine = sa.create_engine(
                self.url,
                pool_size=pool_size,
                max_overflow=0,
                hide_parameters=True,
                connect_args={
                    "isolation_level": None,
                    "timeout": SQLITE_WAIT_SECONDS,
                    "check_same_thread": False,
                },
            )
            sa.event.listen(self.engine, "connect", prepare_sqlite)
            sa.event.listen(self.engine, "begin", begin_sqlite)
        else:
            arguments = {**postgresql_arguments(self.url), "connection_factory": LimitedConnection}
            self.engine = sa.create_engine(
                self.url,
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=10,
                hide_parameters=True,
                connect_args=arguments,
            )
            self._single = sa.create_engine(
                self.url,
                pool_size=SINGLE_CONNECTIONS,
                max_overflow=0,
                pool_timeout=10,
                pool_reset_on_return=None,  # nothing is ever left open on them
                hide_parameters=True,
                connect_args=arguments,
            )
            made = prepared.plan_by_index if prepare else prepared.autocommit
            sa.event.listen(self._single, "connect", made)
        self.prepare = prepare

        # On PostgreSQL one statement is one round trip then, with no BEGIN and ROLLBACK around it.
        self._reader = (
            self.engine
            if self.sqlite
            else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._snapshots = (
            self.engine
            if self.sqlite
            else self.engine.execution_options(isolation_level="REPEATABLE READ")
        )

    def write(self, body: Callable[[Transaction], T], *, numbered: bool = False) -> T:
        """Runs `body` in one transaction and commits it. `numbered`: it will want `Transaction.x`
        and locks no jobs before, so that the number is fetched together with the clock.

        `body` may run more than once: again after a deadlock, or on a new connection when the old
        one turns out to be dead before COMMIT was sent. Raises DatabaseUnavailable, and
        CommitUnknown where the outcome of COMMIT was lost.
        """
        reconnected = False
        for attempt in range(CONFLICT_RETRIES + 1):
            try:
                return self._write_once(body, numbered)
            except DBAPIError as error:
                state = sqlstate(error)
                if state in _CONFLICTS and attempt < CONFLICT_RETRIES:
                    time.sleep(conflict_pause(attempt))
                    continue
                if error.connection_invalidated and not reconnected:
                    reconnected = True
                    continue
                raise self.translated(error) from error
            except PoolTimeoutError as error:
                raise self._no_connection() from error
        raise AssertionError("the last attempt returns or raises")

    def read(self, body: Callable[[sa.Connection], T]) -> T:
        """Runs `body`, which only reads. On PostgreSQL each of its statements sees a snapshot of
        its own; on SQLite all see one. May run twice, as in `write`. Raises DatabaseUnavailable."""
        return self._read(body, self._reader)

    def _read(self, body: Callable[[sa.Connection], T], engine: sa.Engine) -> T:
        for last in (False, True):
            try:
                with engine.connect() as connection:
                    return body(connection)
            except DBAPIError as error:
                if error.connection_invalidated and not last:
                    continue
                raise self.translated(error) from error
            except PoolTimeoutError as error:
                raise self._no_connection() from error
        raise AssertionError("the last attempt returns or raises")

    def scan(self, body: Callable[[sa.Connection], T]) -> T:
        """As `read`, on one snapshot, and on PostgreSQL with a planner that goes by indexes alone,
        in their order, whatever it believes of the tables."""
        if self.sqlite:
            return self.read(body)

        def by_index(connection: sa.Connection) -> T:
            connection.exec_driver_sql(BY_INDEX)
            return body(connection)

        return self._read(by_index, self._snapshots)

    def once(self, statement: Statement, *parameters: object) -> list[tuple[Any, ...]]:
        """One statement in a transaction of its own, on PostgreSQL alone: one round trip, and its
        rows as the driver gives them. It may write, and guards itself what it writes.

        Runs again after a deadlock. Raises CommitUnknown where the connection was lost while it
        ran, DatabaseUnavailable, and Refused for what is the caller's fault.
        """
        for attempt in range(CONFLICT_RETRIES + 1):
            try:
                return self._once(statement, parameters)
            except psycopg2.Error as error:
                self.raise_unless_conflict(error, attempt)
            except PoolTimeoutError as error:
                raise self._no_connection() from error
            time.sleep(conflict_pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def raise_unless_conflict(self, error: psycopg2.Error, attempt: int) -> None:
        """What `once` raises for an error of the driver. Returns where its statement is to be run
        again, after `conflict_pause`."""
        away = self._is_away(error.pgcode, isinstance(error, psycopg2.OperationalError))
        if error.pgcode in _CONFLICTS and attempt < CONFLICT_RETRIES:
            return
        if away:
            raise DatabaseUnavailable(self.told(error)) from error
        raise Refused(error.pgcode) from None

    def _once(self, statement: Statement, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
        connection = self._single_connection()
        try:
            return prepared.run(connection, statement, parameters, prepare=self.prepare)
        except psycopg2.Error as error:
            if connection.driver_connection is not None and connection.driver_connection.closed:
                connection.invalidate()
                raise CommitUnknown(self.told(error)) from error
            raise
        finally:
            connection.close()

    def _single_connection(self) -> PoolProxiedConnection:
        """One on which the server has said nothing since it was last used: not that it is gone."""
        while True:
            connection = self._single.raw_connection()
            if not has_input(connection):
                return connection
            connection.invalidate()
            connection.close()

    @property
    def connect_arguments(self) -> dict[str, Any]:
        """With which the driver connects to PostgreSQL."""
        _, arguments = self.engine.dialect.create_connect_args(self.url)
        return {**arguments, **postgresql_arguments(self.url)}

    @property
    def connections_in_use(self) -> int:
        pools = (engine.pool for engine in self._engines)
        return sum(pool.checkedout() for pool in pools if isinstance(pool, sa.QueuePool))

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()

    def _write_once(self, body: Callable[[Transaction], T], numbered: bool) -> T:
        with self._writer, self.engine.connect() as connection:
            connection.execution_options(jobsvc_write=True)
            clock = CLOCK_SQLITE if self.sqlite else CLOCK_NUMBERED if numbered else CLOCK
            result = body(Transaction(connection, *connection.execute(clock).one()))
            with self._commit_errors():
                connection.commit()
            return result

    @contextmanager
    def _commit_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if error.connection_invalidated:
                raise CommitUnknown(self.told(error.orig)) from error
            raise

    @property
    def _engines(self) -> tuple[sa.Engine, ...]:
        return (self.engine,) if self.sqlite else (self.engine, self._single)

    def translated(self, error: DBAPIError) -> Exception:
        """DatabaseUnavailable where that is what it says, else the error itself."""
        if error.connection_invalidated or self._is_away(
            sqlstate(error), isinstance(error, OperationalError)
        ):
            return DatabaseUnavailable(self.told(error.orig))
        return error

    def _no_connection(self) -> DatabaseUnavailable:
        told = "all connections of this process are in use"
        self._troubles.tell(told)
        return DatabaseUnavailable(told)

    def told(self, error: BaseException | None) -> str:
        """The cause that a driver's error tells, of which the log hears, too."""
        told = cause(error)
        on_the_way = self.url.host and getattr(error, "pgcode", None) is None
        if on_the_way and not told.startswith("connection to server"):  # which names it
            told += f" (at {self.url.host}:{self.url.port or 5432})"
        self._troubles.tell(told)
        return told

    def _is_away(self, state: str | None, operational: bool) -> bool:
        """Whether an error says that the database cannot do it now. Lets go of all connections
        where they are of no more use."""
        if state in _DISPOSE:
            for engine in self._engines:
                engine.dispose()
        return (
            state in _OUT_OF_REACH
            or state in _CONFLICTS
            or state == "57014"  # statement_timeout
            or (operational and (state or "08").startswith("08"))
        )
