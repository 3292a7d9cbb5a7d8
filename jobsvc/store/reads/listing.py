"""Lists of jobs, newest first, whose cost is bounded whatever is asked for.

A walk follows one index in which the ids of jobs lie in order, and looks up job by job what else is
asked for. It ends when it has found enough or looked at enough, and goes on from there next time.
Which index that is, is not left to the planner, which believes statistics: of those that serve the
filter it is the one that gets furthest back within a few entries.

Readers must be given by `Database.scan`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import Job, JobFilter
from jobsvc.store.rows import JOB_COLUMNS, JOB_COLUMNS_WITH_PAYLOAD, job_from_row
from jobsvc.store.rules.uniqueness import IS_FREE
from jobsvc.store.tables import EPOCH, Json, idempotency_keys, job_labels, jobs

# Entries of an index: that one walk reads, that one statement reads, by which ways are compared.
LOOK = 10_000
STRIDE = 2_500
PROBE = 200
# An id begins with its server's clock, create_time is the database's.
CLOCK_DIFFERENCE_MAX = timedelta(minutes=10)
# What is held in memory at once.
READ_JOBS = 100
READ_BYTES = 1024 * 1024

_FIRST = str(uuid.UUID(int=0))
_BEYOND = str(uuid.UUID(int=2**128 - 1))
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Search:
    """`failed`: they have an error. `uncancelled`: their cancel was not requested. `free`: no other
    job's unique key keeps them from being retried."""

    filter: JobFilter
    failed: bool = False
    uncancelled: bool = False
    free: bool = False


# The up to `count` ids between two others, newest first: (above, below, count).
_Ids = Callable[[str, str, int], "sa.Select[Any]"]


@dataclass(frozen=True, slots=True)
class _Way:
    """An index to follow: in one place of it, or in several side by side. It fulfils the condition
    of its name."""

    name: str
    places: Sequence[_Ids]
    stride: int = 0  # 0: any

    def ids(self, above: str, below: str, count: int) -> sa.Select[Any]:
        if len(self.places) == 1:
            return self.places[0](above, below, count)
        each = (place(above, below, count).subquery() for place in self.places)
        merged = sa.union_all(*(sa.select(one.c.id) for one in each)).subquery()
        return sa.select(merged.c.id).order_by(merged.c.id.desc()).limit(count)


def find(
    connection: sa.Connection, search: Search, after: str, limit: int
) -> tuple[list[str], str]:
    """The ids of the up to `limit` newest jobs that match, of those behind the id `after` (empty:
    of all), and the last id that was looked at, empty at the end of the list."""
    above, below = _bounds(search.filter, after)
    way = _choose(connection, search, above, below)
    rest = [each for name, each in _conditions(search).items() if name != way.name]
    found: list[str] = []
    looks = LOOK
    count = max(limit + 1, PROBE)
    while True:
        count = way.stride or min(count, max(STRIDE // len(way.places), 1))
        ids, last = _look(connection, way.ids(above, below, count), rest, count)
        found += ids
        if len(found) > limit:
            return found[:limit], found[limit - 1]
        looks -= count * len(way.places)
        if not last or len(found) == limit or looks <= 0:
            return found, last
        below = last
        count *= 4


def _look(
    connection: sa.Connection,
    candidates: sa.Select[Any],
    rest: Sequence[sa.ColumnElement[bool]],
    count: int,
) -> tuple[list[str], str]:
    """Those of the candidates that match, and the last of them if there are `count`."""
    looked = candidates.cte("looked")
    matching = sa.select(looked.c.id, sa.literal_column("1").label("matches"))
    if rest:
        # A condition in sight of the planner would lead it away to an index over all such jobs.
        job = sa.select(sa.and_(*rest)).where(jobs.c.id == looked.c.id)
        matching = matching.where(job.scalar_subquery())
    ordered = sa.select(looked.c.id).order_by(looked.c.id.desc())
    last = ordered.offset(count - 1).limit(1).subquery()
    rows = connection.execute(
        sa.union_all(matching, sa.select(last.c.id, sa.literal_column("0")))
    ).all()
    ids = sorted((row.id for row in rows if row.matches), reverse=True)
    return ids, next((row.id for row in rows if not row.matches), "")


def _bounds(wanted: JobFilter, after: str) -> tuple[str, str]:
    """Between which two ids all that match are, as far as ids tell."""
    above, below = _FIRST, after or _BEYOND
    if wanted.create_time_after is not None:
        above = _id_at(wanted.create_time_after - EPOCH - CLOCK_DIFFERENCE_MAX)
    for time in (wanted.create_time_before, wanted.finish_time_before):
        if time is not None:
            below = min(below, _id_at(time - EPOCH + CLOCK_DIFFERENCE_MAX))
    return above, below


def _id_at(since: timedelta) -> str:
    """No UUIDv7 of this moment since 1970, or later, is less; no earlier one is greater."""
    milliseconds = min(max(since // _MILLISECOND, 0), 2**48 - 1)
    return str(uuid.UUID(int=milliseconds << 80))


def _choose(connection: sa.Connection, search: Search, above: str, below: str) -> _Way:
    wanted = search.filter
    if wanted.idempotency_key:
        return _Way("", [_key(wanted.idempotency_key)])
    if wanted.finish_time_after is not None or wanted.finish_time_before is not None:
        window = _finished(wanted).subquery()
        (width,) = connection.execute(sa.select(sa.func.count()).select_from(window)).one()
        if width <= LOOK:
            return _Way("", [_within_finished(wanted)], stride=LOOK)
    ways = _ways(search)
    if len(ways) == 1:
        return ways[0]
    probes = []
    for number, way in enumerate(ways):
        ids = way.ids(above, below, PROBE).subquery()
        probe = sa.select(ids.c.id).order_by(ids.c.id.desc()).offset(PROBE - 1).limit(1).subquery()
        probes.append(sa.select(sa.literal_column(str(number)).label("number"), probe.c.id))
    reached = {row.number: row.id for row in connection.execute(sa.union_all(*probes))}
    # One that has not so many entries left gets to its end.
    return min(enumerate(ways), key=lambda each: reached.get(each[0], ""))[1]


def _ways(search: Search) -> list[_Way]:
    wanted = search.filter
    pair = job_labels.c.key, job_labels.c.value
    ways = [
        _Way(_label(key), [_along(job_labels.c.job_id, pair, (key, value))])
        for key, value in sorted(wanted.labels.items())
    ]
    for column, values in _values(wanted):
        if values:
            places = [_along(jobs.c.id, (column,), (value,)) for value in sorted(values)]
            ways.append(_Way(column.name, places))
    if search.failed and not wanted.error_types:
        ways.append(_Way("failed", [_along(jobs.c.id, (_has_error,), (True,))]))
    return ways or [_Way("", [_along(jobs.c.id, (), ())])]


# As the index has it.
_has_error = sa.literal_column("(error_time IS NOT NULL)", sa.Boolean)


# Which of the jobs are in the index that begins with it, where it is not all.
_PARTIAL: dict[sa.ColumnElement[Any], sa.ColumnElement[bool]] = {
    jobs.c.error_type: jobs.c.error_type.is_not(None),
    _has_error: jobs.c.error_time.is_not(None),
}


def _along(
    job_id: sa.Column[Any], leading: Sequence[sa.ColumnElement[Any]], values: Sequence[Any]
) -> _Ids:
    """Of an index over the columns `leading` and then `job_id`: where they have these values.

    Its order and bounds are written so that no other index has them, and none needs to be sorted.
    """
    columns = (*leading, job_id)

    def bound(job_id: str) -> sa.Tuple:
        given = zip(columns, (*values, job_id), strict=True)
        return sa.tuple_(*(sa.literal(value, column.type) for column, value in given))

    def ids(above: str, below: str, count: int) -> sa.Select[Any]:
        place = sa.tuple_(*columns)
        conditions = [place < bound(below), place > bound(above)]
        conditions += [_PARTIAL[column] for column in leading if column in _PARTIAL]
        return (
            sa.select(job_id.label("id"))
            .where(*conditions)
            .order_by(*(column.desc() for column in columns))
            .limit(count)
        )

    return ids


def _key(key: str) -> _Ids:
    """The job that was submitted under an idempotency key."""

    def ids(above: str, below: str, count: int) -> sa.Select[Any]:
        job_id = idempotency_keys.c.job_id
        return (
            sa.select(job_id.label("id"))
            .where(idempotency_keys.c.key == key, job_id > above, job_id < below)
            .limit(count)
        )

    return ids


def _within_finished(wanted: JobFilter) -> _Ids:
    def ids(above: str, below: str, count: int) -> sa.Select[Any]:
        job = _finished(wanted).subquery()
        return (
            sa.select(job.c.id)
            .where(job.c.id > above, job.c.id < below)
            .order_by(job.c.id.desc())
            .limit(count)
        )

    return ids


def _finished(wanted: JobFilter) -> sa.Select[Any]:
    """The jobs that ended within the filter's times; one more than a walk looks at, if so many."""
    times = _since(jobs.c.finish_time, wanted.finish_time_after, wanted.finish_time_before)
    return sa.select(jobs.c.id).where(*times).order_by(jobs.c.finish_time).limit(LOOK + 1)


def _label(key: str) -> str:
    return f"labels.{key}"


def _values(wanted: JobFilter) -> list[tuple[sa.Column[Any], frozenset[Any]]]:
    queues = frozenset({wanted.queue}) if wanted.queue else frozenset()
    return [
        (jobs.c.error_type, wanted.error_types),
        (jobs.c.state, wanted.states),
        (jobs.c.job_type, wanted.job_types),
        (jobs.c.queue, queues),
    ]


def _since(
    column: sa.Column[Any], after: datetime | None, before: datetime | None
) -> list[sa.ColumnElement[bool]]:
    conditions = []
    if after is not None:
        conditions.append(column >= after)
    if before is not None:
        conditions.append(column < before)
    return conditions


def _conditions(search: Search) -> dict[str, sa.ColumnElement[bool]]:
    """By the name of the way that fulfils it, where one does."""
    wanted = search.filter
    conditions: dict[str, sa.ColumnElement[bool]] = {
        column.name: column.in_(sorted(values)) for column, values in _values(wanted) if values
    }
    for key, value in wanted.labels.items():
        conditions[_label(key)] = jobs.c.labels[key].as_string() == value
    if wanted.idempotency_key:
        conditions["idempotency_key"] = jobs.c.idempotency_key == wanted.idempotency_key
    created = _since(jobs.c.create_time, wanted.create_time_after, wanted.create_time_before)
    finished = _since(jobs.c.finish_time, wanted.finish_time_after, wanted.finish_time_before)
    if created or finished:
        conditions["times"] = sa.and_(*created, *finished)
    if search.failed:
        conditions["failed"] = jobs.c.error_time.is_not(None)
    if search.uncancelled:
        conditions["uncancelled"] = jobs.c.cancel_reason.is_(None)
    if search.free:
        conditions["free"] = IS_FREE
    return conditions


def matches(search: Search, job: Any) -> bool:
    """Whether a job that is locked (a LockedJob) still is what was searched for, but for `free`,
    which is for whoever retries it to say."""
    wanted = search.filter
    error_type = job.error and job.error["type"]
    return (
        (not wanted.states or job.state in wanted.states)
        and (not wanted.job_types or job.job_type in wanted.job_types)
        and wanted.queue in ("", job.queue)
        and wanted.labels.items() <= job.labels.items()
        and (not wanted.error_types or error_type in wanted.error_types)
        and wanted.idempotency_key in ("", job.idempotency_key)
        and _within(job.create_time, wanted.create_time_after, wanted.create_time_before)
        and _within(job.finish_time, wanted.finish_time_after, wanted.finish_time_before)
        and not (search.failed and error_type is None)
        and not (search.uncancelled and job.cancel_reason is not None)
    )


def _within(moment: datetime | None, after: datetime | None, before: datetime | None) -> bool:
    if moment is None:
        return after is None and before is None
    return (after is None or moment >= after) and (before is None or moment < before)


def read(connection: sa.Connection, job_ids: Sequence[str], *, full: bool) -> Iterator[Job]:
    """Those that exist, in this order, read a few at a time as they are asked for. `full`: with
    payload and traceback."""
    columns = JOB_COLUMNS_WITH_PAYLOAD if full else _basic_columns(connection)
    sizes = _payload_sizes(connection, job_ids) if full else {}
    for few in _portions(job_ids, sizes):
        rows = connection.execute(sa.select(*columns).where(jobs.c.id.in_(few)))
        found = {row.id: job_from_row(row, payload=full) for row in rows}
        yield from (found[job_id] for job_id in few if job_id in found)


def _basic_columns(connection: sa.Connection) -> list[sa.ColumnElement[Any]]:
    error: sa.ColumnElement[Any] = jobs.c.error.op("-")(sa.literal_column("'traceback'"))
    if connection.dialect.name == "sqlite":
        error = sa.func.json_remove(jobs.c.error, "$.traceback")
    brief = sa.type_coerce(error, Json).label("error")
    return [brief if column is jobs.c.error else column for column in JOB_COLUMNS]


def _payload_sizes(connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, int]:
    """In bytes; no payload is read for it."""
    size = sa.func.length(jobs.c.payload).label("size")
    rows = connection.execute(sa.select(jobs.c.id, size).where(jobs.c.id.in_(job_ids)))
    return {row.id: row.size for row in rows}


def _portions(job_ids: Sequence[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    few: list[str] = []
    total = 0
    for job_id in job_ids:
        size = sizes.get(job_id, 0)
        if few and (len(few) == READ_JOBS or total + size > READ_BYTES):
            yield few
            few, total = [], 0
        few.append(job_id)
        total += size
    if few:
        yield few


def failures(connection: sa.Connection, job_ids: Sequence[str]) -> Sequence[Any]:
    """Of each its id, job_type, error_type and error_time, newest first."""
    return connection.execute(
        sa.select(jobs.c.id, jobs.c.job_type, jobs.c.error_type, jobs.c.error_time)
        .where(jobs.c.id.in_(job_ids))
        .order_by(jobs.c.id.desc())
    ).all()
