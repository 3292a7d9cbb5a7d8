"""Engine, transactions and the differences between PostgreSQL and SQLite.

Everything here blocks: the server calls it from a bounded thread pool, workers from their own
threads. A `Database` may be shared by threads; a `Transaction` belongs to one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.tables import JobId, UtcTime, service
from jobsvc.store.waiting import limit_waiting

T = TypeVar("T")
Connection = sa.Connection  # what a reader is given; callers name it without knowing SQLAlchemy

STATEMENT_TIMEOUT_MS = 5_000
LOCK_TIMEOUT_MS = 1_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000
SQLITE_WAIT_SECONDS = 2  # for another process that writes
CONFLICT_RETRIES = 3

# SQLSTATEs: serialization failure and deadlock are worth another try at once; lock_timeout too,
# since our own transactions hold row locks for milliseconds.
_CONFLICTS = {"40001", "40P01", "55P03"}
# The server is not (or no longer) one that takes writes: read-only after a failover, shutdown,
# crash recovery, too many connections, out of disk or memory.
_OUT_OF_REACH = {"25006", "53100", "53200", "53300", "57P01", "57P02", "57P03", "57P05"}
# Of these every pooled connection is suspect: a demoted primary still answers a ping.
_DISPOSE = {"25006", "57P01", "57P02", "57P03"}


# The number of the transaction that asks (which gives it one), or NULL where there is none to ask.
NUMBER = sa.literal_column("pg_current_xact_id()::text::bigint", sa.BigInteger).label("number")


# For one transaction. What is left to the planner are the indexes whose order the statement names.
_WAYS = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit")
BY_INDEX = "; ".join(f"SET LOCAL {way} = off" for way in _WAYS)


class CommitUnknown(DatabaseUnavailable):
    """The connection was lost while COMMIT was under way: it may or may not have happened.

    Whoever can must look it up by what it wrote (job id, lease token) before trying again.
    """


@dataclass(slots=True)
class Transaction:
    """A write transaction under way. `now` is the database's clock at its start: all times that
    are stored or compared come from it, never from the caller's machine. `limited`: some queue is
    paused or has a limit."""

    connection: sa.Connection
    now: datetime
    registry_revision: int
    limited: bool = False
    x_base: int = 0
    number: int | None = None

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
    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        """Connects to nothing yet. `pool_size` bounds the connections and so the threads that can
        use them side by side."""
        self.url = sa.make_url(url)
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
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        else:
            limit_waiting()
            self.engine = sa.create_engine(
                self.url,
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=10,
                hide_parameters=True,
                connect_args=_postgresql_arguments(self.url),
            )

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
                state = _sqlstate(error)
                if state in _CONFLICTS and attempt < CONFLICT_RETRIES:
                    time.sleep(random.uniform(0, 0.02 * 2**attempt))
                    continue
                if error.connection_invalidated and not reconnected:
                    reconnected = True
                    continue
                raise self._translate(error) from error
            except PoolTimeoutError as error:
                raise DatabaseUnavailable from error
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
                raise self._translate(error) from error
            except PoolTimeoutError as error:
                raise DatabaseUnavailable from error
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

    def execute(self, statement: sa.Executable) -> None:
        """One statement that may run twice, in a transaction of its own: on PostgreSQL one round
        trip, and no clock. Raises DatabaseUnavailable."""
        if self.sqlite:
            self.write(lambda tx: tx.execute(statement))
        else:
            self.read(lambda connection: connection.execute(statement))

    @property
    def connections_in_use(self) -> int:
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, sa.QueuePool) else 0

    def close(self) -> None:
        self.engine.dispose()

    def _write_once(self, body: Callable[[Transaction], T], numbered: bool) -> T:
        with self._writer, self.engine.connect() as connection:
            connection.execution_options(jobsvc_write=True)
            clock = _CLOCK_SQLITE if self.sqlite else _CLOCK_NUMBERED if numbered else _CLOCK
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
                raise CommitUnknown from error
            raise

    def _translate(self, error: DBAPIError) -> Exception:
        state = _sqlstate(error)
        if state in _DISPOSE:
            self.engine.dispose()
        if (
            error.connection_invalidated
            or state in _OUT_OF_REACH
            or state in _CONFLICTS
            or state == "57014"  # statement_timeout
            or (isinstance(error, OperationalError) and (state or "08").startswith("08"))
        ):
            return DatabaseUnavailable()
        return error


def update_many(
    tx: Transaction,
    table: sa.Table,
    guard: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> int:
    """Updates many rows in one statement, each to values of its own.

    All `rows` have the same keys: the columns to set, `id`, and for each column of `guard` a key
    `was_COLUMN`, the value that it must still have. Answers how many rows were written; SQLite,
    which has no arrays, loops inside the driver.
    """
    if not rows:
        return 0
    columns = tuple(k for k in rows[0] if k != "id" and not k.startswith("was_"))
    if tx.connection.dialect.name == "sqlite":
        statement = _update_one(table, tuple(guard), columns)
        bound = [{f"b_{key}": value for key, value in row.items()} for row in rows]
        return tx.execute(statement, bound).rowcount
    # A guard that the planner can read would lead it to an index over all rows in that state.
    guards = (f"was_{column}" for column in guard)
    varying, parameters = _parameters(rows, {"id", *guards})
    return tx.execute(_update_unnest(table, tuple(guard), columns, varying), parameters).rowcount


def insert_many(
    tx: Transaction,
    table: sa.Table,
    rows: Sequence[dict[str, Any]],
    returning: Sequence[sa.Column[Any]] = (),
) -> Sequence[sa.Row[Any]]:
    """Inserts rows that all have the same keys, in one statement; answers `returning` of each, in
    no particular order."""
    if not rows:
        return ()
    if tx.connection.dialect.name == "sqlite":
        statement = sa.insert(table)
        if not returning:
            tx.execute(statement, rows)
            return ()
        return tx.execute(statement.returning(*returning), rows).all()
    columns = tuple(rows[0])
    varying, parameters = _parameters(rows, {columns[0]})
    result = tx.execute(_insert_unnest(table, columns, varying, tuple(returning)), parameters)
    return result.all() if returning else ()


def _parameters(
    rows: Sequence[dict[str, Any]], always: Collection[str]
) -> tuple[frozenset[str], dict[str, Any]]:
    """Which columns differ between the rows (those of `always` count as such), and what to bind:
    an array for each of those, for the others the one value that all rows have. Most have, and
    quoting is what costs most."""
    first = rows[0]
    varying = frozenset(
        column
        for column, value in first.items()
        if column in always or any(row[column] != value for row in rows)
    )
    bound = {f"b_{c}": [row[c] for row in rows] if c in varying else first[c] for c in first}
    return varying, bound


@functools.cache
def _update_one(table: sa.Table, guard: tuple[str, ...], columns: tuple[str, ...]) -> sa.Update:
    return (
        sa.update(table)
        .where(table.c.id == sa.bindparam("b_id"))
        .where(*(table.c[g] == sa.bindparam(f"b_was_{g}") for g in guard))
        .values({c: sa.bindparam(f"b_{c}") for c in columns})
    )


@functools.lru_cache(maxsize=256)
def _update_unnest(
    table: sa.Table, guard: tuple[str, ...], columns: tuple[str, ...], varying: frozenset[str]
) -> sa.Update:
    source = {"id": "id", **{f"was_{g}": g for g in guard}, **{c: c for c in columns}}
    new = _given({name: table.c[column].type for name, column in source.items()}, varying)
    return (
        sa.update(table)
        .where(table.c.id == new["id"])
        .where(*(table.c[g] == new[f"was_{g}"] for g in guard))
        .values({c: new[c] for c in columns})
    )


@functools.lru_cache(maxsize=256)
def _insert_unnest(
    table: sa.Table,
    columns: tuple[str, ...],
    varying: frozenset[str],
    returning: tuple[sa.Column[Any], ...],
) -> Any:
    new = _given({c: table.c[c].type for c in columns}, varying)
    statement = sa.insert(table).from_select(columns, sa.select(*(new[c] for c in columns)))
    return statement.returning(*returning) if returning else statement


def _given(types: dict[str, sa.types.TypeEngine[Any]], varying: frozenset[str]) -> dict[str, Any]:
    """The bound parameters `b_NAME` as columns: of a table of unnested arrays where they vary, so
    that the statement is the same however many rows there are, else the value itself."""
    arrays = []
    for name in sorted(varying):
        array: ARRAY[Any] = ARRAY(types[name])
        arrays.append(sa.cast(sa.bindparam(f"b_{name}", type_=array), array))
    columns = (sa.column(name, types[name]) for name in sorted(varying))
    new = sa.func.unnest(*arrays).table_valued(*columns, name="new").render_derived()
    return {
        name: new.c[name]
        if name in varying
        else sa.cast(sa.bindparam(f"b_{name}", type_=kind), kind)
        for name, kind in types.items()
    }


_FACTS = service.c.registry_revision, service.c.limited, service.c.x_base
_CLOCK = sa.select(sa.func.clock_timestamp(type_=UtcTime).label("now"), *_FACTS)
_CLOCK_NUMBERED = sa.select(*_CLOCK.selected_columns, NUMBER)
_CLOCK_SQLITE = sa.select(sa.func.jobsvc_now(type_=UtcTime).label("now"), *_FACTS)


def clock(connection: sa.Connection) -> datetime:
    """The database's clock, for reads."""
    statement = _CLOCK_SQLITE if connection.dialect.name == "sqlite" else _CLOCK
    now: datetime = connection.execute(statement).one().now
    return now


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")  # an answered commit survives a power cut
    connection.create_function("jobsvc_now", 0, lambda: time.time_ns() // 1000)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers do not wait for the writer then."""
    # Of several processes that open a new file at once, SQLite lets one change its mode and
    # refuses the others without waiting.
    deadline = time.monotonic() + SQLITE_WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    # IMMEDIATE: a transaction that reads and then writes cannot be upgraded once another has
    # written in between, so a writer takes the write lock first.
    write = connection.get_execution_options().get("jobsvc_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _postgresql_arguments(url: sa.URL) -> dict[str, Any]:
    """Defaults that the URL's own query overrides: time limits on the server, and liveness checks
    of the connection, so that a vanished server is noticed within seconds."""
    arguments: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "application_name": "jobsvc",
        "options": (
            f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS} "
            f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_MS} "
            "-c timezone=UTC"
        ),
    }
    if isinstance(url.host, str) or "host" in url.query:
        arguments["target_session_attrs"] = "read-write"
    return {key: value for key, value in arguments.items() if key not in url.query}


def _sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE; for SQLite the one that PostgreSQL would give for the like."""
    if isinstance(error.orig, sqlite3.Error):
        text = str(error.orig)
        if "locked" in text:
            return "40001"
        return "53100" if re.search(r"disk|full|readonly|unable to open", text) else "XX000"
    return getattr(error.orig, "pgcode", None)


def pairs(connection: sa.Connection, ids: Sequence[str], numbers: Sequence[int]) -> sa.Subquery:
    """A table (id, number) of given rows, to join with; the same length each."""
    if connection.dialect.name == "sqlite":
        rows = json.dumps([[i.replace("-", ""), n] for i, n in zip(ids, numbers, strict=True)])
        each = sa.func.json_each(rows).table_valued("value")
        return sa.select(
            sa.type_coerce(sa.func.json_extract(each.c.value, "$[0]"), JobId).label("id"),
            sa.type_coerce(sa.func.json_extract(each.c.value, "$[1]"), sa.BigInteger).label(
                "number"
            ),
        ).subquery("given")
    kinds = ARRAY(JobId), ARRAY(sa.BigInteger)
    unnested = (
        sa.func.unnest(
            sa.cast(sa.bindparam("given_ids", list(ids), type_=kinds[0]), kinds[0]),
            sa.cast(sa.bindparam("given_numbers", list(numbers), type_=kinds[1]), kinds[1]),
        )
        .table_valued(sa.column("id", JobId), sa.column("number", sa.BigInteger), name="given")
        .render_derived()
    )
    return sa.select(unnested.c.id, unnested.c.number).subquery("given_rows")


def insert_or_ignore(tx: Transaction, table: sa.Table, key: str) -> Any:
    """INSERT … ON CONFLICT (key) DO NOTHING, waiting for a concurrent insert of the same key."""
    return _insert(tx, table).on_conflict_do_nothing(index_elements=[key])


def upsert(tx: Transaction, table: sa.Table, key: str) -> Any:
    """INSERT … ON CONFLICT (key) DO UPDATE of every other column to the new row's."""
    insert = _insert(tx, table)
    return insert.on_conflict_do_update(
        index_elements=[key],
        set_={c.name: insert.excluded[c.name] for c in table.c if c.name != key},
    )


def _insert(tx: Transaction, table: sa.Table) -> Any:
    if tx.connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def add_up(tx: Transaction, table: sa.Table, key: Sequence[str], column: str) -> Any:
    """INSERT … ON CONFLICT (key) DO UPDATE, which adds the new row's `column` to the old one's."""
    insert = _insert(tx, table)
    total = table.c[column] + insert.excluded[column]
    return insert.on_conflict_do_update(index_elements=list(key), set_={column: total})


def lock_names(tx: Transaction, names: Collection[str]) -> None:
    """Locks names of no row until the commit, all in one order. On SQLite a transaction that
    writes is alone anyway."""
    if tx.connection.dialect.name == "sqlite":
        return
    kind = ARRAY(sa.BigInteger)
    given = sa.bindparam("numbers", sorted({lock_number(n) for n in names}), type_=kind)
    number = sa.func.unnest(sa.cast(given, kind)).column_valued("number")
    tx.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


def lock_number(name: str) -> int:
    """What stands for a name among the advisory locks."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
