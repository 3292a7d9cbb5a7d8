"""What the watchers of jobs read. These are made for every event of every watched job, and are
planned once; what they find is as `lookups` has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from jobsvc.core.model import JobEvent
from jobsvc.core.states import JobState
from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.reads import lookups
from jobsvc.store.reads.lookups import Cursor

EVENTS_AFTER: Final = Statement.from_file("events_after", "uuid[]", "bigint[]", "int")
HEADS: Final = Statement.from_file("heads", "uuid[]")


def events_after(
    database: Database, cursors: Sequence[Cursor], limit: int
) -> dict[Cursor, list[JobEvent]]:
    if database.sqlite:
        return database.read(lambda c: lookups.events_after(c, cursors, limit))
    return lookups.by_cursor(database.once(EVENTS_AFTER, *events_asked(cursors, limit)))


def heads(database: Database, job_ids: Sequence[str]) -> dict[str, tuple[int, JobState]]:
    if database.sqlite:
        return database.read(lambda c: lookups.heads(c, job_ids))
    return lookups.by_job(database.once(HEADS, heads_asked(job_ids)))


def events_asked(cursors: Sequence[Cursor], limit: int) -> tuple[object, ...]:
    """The parameters of EVENTS_AFTER."""
    return _array(job_id for job_id, _ in cursors), _array(after for _, after in cursors), limit


def heads_asked(job_ids: Sequence[str]) -> object:
    """The parameter of HEADS."""
    return _array(job_ids)


def _array(values: Iterable[Any]) -> str:
    """Of ids or numbers, as PostgreSQL reads it. The driver's own would be one of text, which no
    parameter of a prepared statement takes for one of ids."""
    return "{" + ",".join(map(str, values)) + "}"
