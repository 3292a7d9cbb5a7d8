"""Single statements of PostgreSQL that are planned once a connection, and always in the same way.

Their connections are apart from all others: they stay in autocommit, and their planner goes by
indexes alone, one row after the other, whatever it believes of the tables. A recordset from a
parameter is taken for 100 rows, and on a table that grows a hash join over all of it was chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

from sqlalchemy.pool import PoolProxiedConnection

from jobsvc.store.dialects.engines import ISOLATION

OFF = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit")
_PLANNING = ("plan_cache_mode = force_generic_plan", *(f"{way} = off" for way in OFF))
# For a connection that is to have prepared statements.
PLAN_BY_INDEX = "; ".join(f"SET {each}" for each in _PLANNING)
_PREPARED = "jobsvc_prepared"
# Before all else in a transaction.
_ISOLATION = f"SET TRANSACTION ISOLATION LEVEL {ISOLATION}; "


@dataclass(frozen=True)
class Statement:
    """`text` says `$1`, `$2` … once each and in that order; `kinds` are their types. `name` is
    that of no other. Not `durable`: a crash of the database may take back what it wrote, and so
    its commit waits for no disk."""

    name: str
    kinds: tuple[str, ...]
    text: str
    durable: bool = True

    @classmethod
    def from_file(cls, name: str, *kinds: str, durable: bool = True) -> Statement:
        """That of `jobsvc/store/hot/NAME.sql`."""
        file = resources.files("jobsvc.store.hot") / f"{name}.sql"
        lines = file.read_text(encoding="utf-8").splitlines()
        text = "\n".join(each for each in lines if not each.startswith("--"))
        return cls(name, kinds, text, durable)

    @cached_property
    def prepare(self) -> str:
        return f"PREPARE {self.name}{_listed(self.kinds)} AS {self.text}"

    @cached_property
    def execute(self) -> str:
        return f"{self._before}EXECUTE {self.name}{_listed(['%s'] * len(self.kinds))}"

    @cached_property
    def in_full(self) -> str:
        """For a connection on which nothing may stay behind, as behind a pooler."""
        given = iter(self.kinds)
        text = re.sub(r"\$\d+", lambda _: f"%s::{next(given)}", self.text.replace("%", "%%"))
        planning = "".join(f"SET LOCAL {each}; " for each in _PLANNING)
        return _ISOLATION + planning + self._before + text

    @property
    def _before(self) -> str:
        """In the same query string, and so in the same transaction."""
        return "" if self.durable else "SET LOCAL synchronous_commit = off; "


def _listed(each: Sequence[str]) -> str:
    return f"({', '.join(each)})" if each else ""


def plan_by_index(connection: Any, _record: object) -> None:
    """For a new connection that is to have prepared statements."""
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(PLAN_BY_INDEX)


def autocommit(connection: Any, _record: object) -> None:
    """For a new connection that is not."""
    connection.autocommit = True


def run(
    connection: PoolProxiedConnection,
    statement: Statement,
    parameters: tuple[object, ...],
    *,
    prepare: bool,
) -> list[tuple[Any, ...]]:
    with closing(connection.cursor()) as cursor:
        if prepare:
            known: set[str] = connection.info.setdefault(_PREPARED, set())
            if statement.name not in known:
                cursor.execute(statement.prepare)
                known.add(statement.name)
        cursor.execute(statement.execute if prepare else statement.in_full, parameters)
        return list(cursor.fetchall()) if cursor.description else []
