"""Statements that PostgreSQL and SQLite say in different ways."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY


def update_many(
    connection: sa.Connection,
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
    if connection.dialect.name == "sqlite":
        statement = _update_one(table, tuple(guard), columns)
        bound = [{f"b_{key}": value for key, value in row.items()} for row in rows]
        return connection.execute(statement, bound).rowcount
    # A guard that the planner can read would lead it to an index over all rows in that state.
    guards = (f"was_{column}" for column in guard)
    varying, parameters = _parameters(rows, {"id", *guards})
    return connection.execute(
        _update_unnest(table, tuple(guard), columns, varying), parameters
    ).rowcount


def insert_many(
    connection: sa.Connection,
    table: sa.Table,
    rows: Sequence[dict[str, Any]],
    returning: Sequence[sa.Column[Any]] = (),
) -> Sequence[sa.Row[Any]]:
    """Inserts rows that all have the same keys, in one statement; answers `returning` of each, in
    no particular order."""
    if not rows:
        return ()
    if connection.dialect.name == "sqlite":
        statement = sa.insert(table)
        if not returning:
            connection.execute(statement, rows)
            return ()
        return connection.execute(statement.returning(*returning), rows).all()
    columns = tuple(rows[0])
    varying, parameters = _parameters(rows, {columns[0]})
    result = connection.execute(
        _insert_unnest(table, columns, varying, tuple(returning)), parameters
    )
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


def insert_or_ignore(connection: sa.Connection, table: sa.Table, key: str) -> Any:
    """INSERT … ON CONFLICT (key) DO NOTHING, waiting for a concurrent insert of the same key."""
    return _insert(connection, table).on_conflict_do_nothing(index_elements=[key])


def upsert(connection: sa.Connection, table: sa.Table, key: str) -> Any:
    """INSERT … ON CONFLICT (key) DO UPDATE of every other column to the new row's."""
    insert = _insert(connection, table)
    return insert.on_conflict_do_update(
        index_elements=[key],
        set_={c.name: insert.excluded[c.name] for c in table.c if c.name != key},
    )


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def add_up(connection: sa.Connection, table: sa.Table, key: Sequence[str], column: str) -> Any:
    """INSERT … ON CONFLICT (key) DO UPDATE, which adds the new row's `column` to the old one's."""
    insert = _insert(connection, table)
    total = table.c[column] + insert.excluded[column]
    return insert.on_conflict_do_update(index_elements=list(key), set_={column: total})


def lock_names(connection: sa.Connection, names: Collection[str]) -> None:
    """Locks names of no row until the commit, all in one order. On SQLite a transaction that
    writes is alone anyway."""
    if connection.dialect.name == "sqlite":
        return
    kind = ARRAY(sa.BigInteger)
    given = sa.bindparam("numbers", sorted({lock_number(n) for n in names}), type_=kind)
    number = sa.func.unnest(sa.cast(given, kind)).column_valued("number")
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


def lock_number(name: str) -> int:
    """What stands for a name among the advisory locks."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
