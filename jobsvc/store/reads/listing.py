"""Lists of jobs, newest first, whose cost is bounded whatever is asked for.

A walk follows one index in which the ids of jobs lie in order, and looks up job by job what else is
asked for. It ends when it has found enough or looked at enough, and goes on from there next time.
Which index that is, is not left to the planner, which believes statistics: of those that serve the
filter it is the one that gets furthest back within a few entries.

Its statements keep the planner to that by themselves. `read` and `failures` are for readers given
by `Database.scan`, which see what `find` has seen.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import takewhile
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import Job, JobFilter
from jobsvc.store.dialects.reading import Read, by_index, id_text, one_of
from jobsvc.store.rows import JOB_COLUMNS_WITH_PAYLOAD, brief_columns, brief_job, job_from_row
from jobsvc.store.rules.uniqueness import IS_FREE
from jobsvc.store.tables import EPOCH, JobId, idempotency_keys, job_labels, jobs

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


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """An index to follow: in one place of it, or in several side by side; each gives the up to
    :count ids between :above and :below, newest first. It fulfils the condition of its name.
    `at_once`: it is not followed in steps."""

    name: str
    places: Sequence[sa.Select[Any]]
    at_once: bool = False

    def ids(self) -> sa.Select[Any]:
        if len(self.places) == 1:
            return self.places[0]
        each = (place.subquery() for place in self.places)
        merged = sa.union_all(*(sa.select(one.c.id) for one in each)).subquery()
        return sa.select(merged.c.id).order_by(merged.c.id.desc()).limit(_count)


_above, _below = (sa.bindparam(name, type_=JobId) for name in ("above", "below"))
_count, _but_one, _wanted, _window = (
    sa.bindparam(name, type_=sa.Integer) for name in ("count", "but_one", "wanted", "window")
)


class _Plan:
    """The statements for all searches of one shape: made once, for that costs more than they do.

    `names`: of the filter's values, as they are bound.
    """

    def __init__(self, names: frozenset[str], failed: bool, uncancelled: bool, free: bool) -> None:
        self._conditions = _conditions(names, failed, uncancelled, free)
        self.ways = _ways(names, failed)
        self.by_key = _by_key() if "idempotency_key" in names else None
        self.finished: _Way | None = None
        if finished := _times("finish_time", names):
            self.finished = _Way("", [_within(finished)], at_once=True)
            self.width = by_index(lambda sqlite: _width(finished))
        self.reach = by_index(lambda sqlite: _reach(self.ways))
        self._looks: dict[tuple[_Way, bool], Read] = {}

    def look(self, way: _Way, *, whole: bool) -> Read:
        """Along the way. `whole`: what a Job is made of, else ids alone."""
        if (known := self._looks.get((way, whole))) is not None:
            return known
        rest = [each for name, each in self._conditions.items() if name != way.name]
        made = by_index(lambda sqlite: _look(way, rest, whole, sqlite))
        return self._looks.setdefault((way, whole), made)


_plan = lru_cache(maxsize=256)(_Plan)


def find(
    connection: sa.Connection, search: Search, after: str, limit: int
) -> tuple[list[str], str]:
    """The ids of the up to `limit` newest jobs that match, of those behind the id `after` (empty:
    of all), and the last id that was looked at, empty at the end of the list."""
    found, last = _walk(connection, search, after, limit, whole=False)
    return [job_id for (job_id,) in found], last


def page(
    connection: sa.Connection, search: Search, after: str, limit: int
) -> tuple[list[Job], str]:
    """As `find`, the jobs themselves, without payload and traceback. Each is as it was when it was
    found to match; mostly that is one round trip for all of them."""
    found, last = _walk(connection, search, after, limit, whole=True)
    return [brief_job(values) for values in found], last


def _walk(
    connection: sa.Connection, search: Search, after: str, limit: int, *, whole: bool
) -> tuple[list[Sequence[Any]], str]:
    given = _given(search.filter)
    plan = _plan(frozenset(given), search.failed, search.uncancelled, search.free)
    above, below = _bounds(search.filter, after)
    given |= {"above": above, "below": below}
    way = _choose(connection, plan, given)
    look = plan.look(way, whole=whole)
    found: list[Sequence[Any]] = []
    looks = LOOK
    count = max(limit + 1, PROBE)
    while True:
        count = LOOK if way.at_once else min(count, max(STRIDE // len(way.places), 1))
        given |= {"count": count, "but_one": count - 1, "wanted": limit + 1 - len(found)}
        rows = look(connection, given)
        last: str = rows[0][0] or ""
        found += [row[1:] for row in rows if row[1] is not None]
        if len(found) > limit:
            return found[:limit], found[limit - 1][0]
        looks -= count * len(way.places)
        if not last or len(found) == limit or looks <= 0:
            return found, last
        given["below"] = last
        count *= 4


def _look(
    way: _Way, rest: Sequence[sa.ColumnElement[bool]], whole: bool, sqlite: bool
) -> sa.Select[Any]:
    """The last of the candidates if there are :count, beside each of the up to :wanted newest that
    match; one row without any if there is none."""
    looked = way.ids().cte("looked")
    ordered = sa.select(looked.c.id).order_by(looked.c.id.desc())
    last = sa.select(ordered.offset(_but_one).limit(1).scalar_subquery().label("id")).subquery()
    matching = ordered.limit(_wanted)
    if rest:
        # A condition in sight of the planner would lead it away to an index over all such jobs.
        job = sa.select(sa.and_(*rest)).where(jobs.c.id == looked.c.id)
        matching = matching.where(job.scalar_subquery())
    found: sa.FromClause = matching.subquery("matching")
    columns: Sequence[sa.ColumnElement[Any]] = [id_text(found.c.id, sqlite).label("job_id")]
    if whole:
        columns = brief_columns(sqlite)
        found = found.join(jobs, jobs.c.id == found.c.id)
    return (
        sa.select(id_text(last.c.id, sqlite).label("last"), *columns)
        .select_from(last.outerjoin(found, sa.true()))
        .order_by(sa.desc(jobs.c.id if whole else found.c.id))
    )


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


def _choose(connection: sa.Connection, plan: _Plan, given: dict[str, Any]) -> _Way:
    if plan.by_key is not None:
        return plan.by_key
    if plan.finished is not None:
        ((width,),) = plan.width(connection, {**given, "window": LOOK + 1})
        if width <= LOOK:
            given["window"] = LOOK + 1
            return plan.finished
    if len(plan.ways) == 1:
        return plan.ways[0]
    rows = plan.reach(connection, {**given, "count": PROBE, "but_one": PROBE - 1})
    reached = {number: str(job_id) for number, job_id in rows}
    # One that has not so many entries left gets to its end.
    return min(enumerate(plan.ways), key=lambda each: reached.get(each[0], ""))[1]


def _reach(ways: Sequence[_Way]) -> sa.Select[Any]:
    """Of each way, by its number, how far back :count entries get."""
    probes = []
    for number, way in enumerate(ways):
        ids = way.ids().subquery()
        probe = sa.select(ids.c.id).order_by(ids.c.id.desc()).offset(_but_one).limit(1).subquery()
        probes.append(sa.select(sa.literal_column(str(number)).label("number"), probe.c.id))
    every = sa.union_all(*probes).subquery()
    return sa.select(every.c.number, every.c.id)


def _given(wanted: JobFilter) -> dict[str, Any]:
    """The filter's values, by the names under which they are bound."""
    given: dict[str, Any] = {}
    for column, values in _values(wanted):
        given |= {_name(column, i): str(value) for i, value in enumerate(sorted(values))}
    for i, (key, value) in enumerate(sorted(wanted.labels.items())):
        given |= {f"key_{i}": key, f"value_{i}": value}
    others = ("idempotency_key", *(f"{time}_{end}" for time in _TIMES for end in _ENDS))
    return given | {name: value for name in others if (value := getattr(wanted, name))}


_TIMES = {"create_time": jobs.c.create_time, "finish_time": jobs.c.finish_time}
_ENDS = ("after", "before")


def _values(wanted: JobFilter) -> list[tuple[sa.Column[Any], frozenset[Any]]]:
    queues = frozenset({wanted.queue}) if wanted.queue else frozenset()
    return [
        (jobs.c.error_type, wanted.error_types),
        (jobs.c.state, wanted.states),
        (jobs.c.job_type, wanted.job_types),
        (jobs.c.queue, queues),
    ]


def _name(column: sa.Column[Any], number: int) -> str:
    return f"any_{column.name}_{number}"  # none that SQLAlchemy gives to a value without a name


def _bound(names: frozenset[str]) -> list[tuple[sa.Column[Any], list[sa.BindParameter[Any]]]]:
    """The columns that must have one of some values."""
    found = []
    for column, _ in _values(JobFilter()):
        ours = takewhile(names.__contains__, (_name(column, i) for i in itertools.count()))
        values = [sa.bindparam(name, type_=column.type) for name in ours]
        if values:
            found.append((column, values))
    return found


def _labels(names: frozenset[str]) -> range:
    return range(sum(name.startswith("key_") for name in names))


def _ways(names: frozenset[str], failed: bool) -> list[_Way]:
    pair = job_labels.c.key, job_labels.c.value
    ways = []
    for i in _labels(names):
        values = [sa.bindparam(f"{part}_{i}", type_=sa.Text) for part in ("key", "value")]
        ways.append(_Way(f"label_{i}", [_along(job_labels.c.job_id, pair, values)]))
    for column, values in _bound(names):
        places = [_along(jobs.c.id, (column,), (value,)) for value in values]
        ways.append(_Way(column.name, places))
    if failed and _name(jobs.c.error_type, 0) not in names:
        ways.append(_Way("failed", [_along(jobs.c.id, (_has_error,), (sa.true(),))]))
    return ways or [_Way("", [_along(jobs.c.id, (), ())])]


# As the index has it.
_has_error = sa.literal_column("(error_time IS NOT NULL)", sa.Boolean)


# Which of the jobs are in the index that begins with it, where it is not all.
_PARTIAL: dict[sa.ColumnElement[Any], sa.ColumnElement[bool]] = {
    jobs.c.error_type: jobs.c.error_type.is_not(None),
    _has_error: jobs.c.error_time.is_not(None),
}


def _along(
    job_id: sa.Column[Any],
    leading: Sequence[sa.ColumnElement[Any]],
    values: Sequence[sa.ColumnElement[Any]],
) -> sa.Select[Any]:
    """Of an index over the columns `leading` and then `job_id`: where they have these values.

    Its order and bounds are written so that no other index has them, and none needs to be sorted.
    """
    columns = (*leading, job_id)
    place = sa.tuple_(*columns)
    conditions = [place < sa.tuple_(*values, _below), place > sa.tuple_(*values, _above)]
    conditions += [_PARTIAL[column] for column in leading if column in _PARTIAL]
    return (
        sa.select(job_id.label("id"))
        .where(*conditions)
        .order_by(*(column.desc() for column in columns))
        .limit(_count)
    )


def _by_key() -> _Way:
    """The job that was submitted under an idempotency key."""
    job_id = idempotency_keys.c.job_id
    place = sa.select(job_id.label("id")).where(
        idempotency_keys.c.key == sa.bindparam("idempotency_key"),
        *(job_id > _above, job_id < _below),
    )
    return _Way("", [place.limit(_count)])


def _within(times: Sequence[sa.ColumnElement[bool]]) -> sa.Select[Any]:
    job = _finished(times).subquery()
    return (
        sa.select(job.c.id)
        .where(job.c.id > _above, job.c.id < _below)
        .order_by(job.c.id.desc())
        .limit(_count)
    )


def _width(times: Sequence[sa.ColumnElement[bool]]) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(_finished(times).subquery())


def _finished(times: Sequence[sa.ColumnElement[bool]]) -> sa.Select[Any]:
    """The up to :window first jobs that ended within the times."""
    return sa.select(jobs.c.id).where(*times).order_by(jobs.c.finish_time).limit(_window)


def _times(name: str, names: frozenset[str]) -> list[sa.ColumnElement[bool]]:
    column = _TIMES[name]
    after, before = (sa.bindparam(f"{name}_{end}", type_=column.type) for end in _ENDS)
    conditions = []
    if after.key in names:
        conditions.append(column >= after)
    if before.key in names:
        conditions.append(column < before)
    return conditions


def _conditions(
    names: frozenset[str], failed: bool, uncancelled: bool, free: bool
) -> dict[str, sa.ColumnElement[bool]]:
    """By the name of the way that fulfils it, where one does."""
    conditions: dict[str, sa.ColumnElement[bool]] = {
        column.name: column.in_(values) for column, values in _bound(names)
    }
    for i in _labels(names):
        key: Any = sa.bindparam(f"key_{i}", type_=sa.JSON.JSONStrIndexType())
        conditions[f"label_{i}"] = jobs.c.labels[key].as_string() == sa.bindparam(f"value_{i}")
    if "idempotency_key" in names:
        given = sa.bindparam("idempotency_key", type_=sa.Text)
        conditions["idempotency_key"] = jobs.c.idempotency_key == given
    if times := [*_times("create_time", names), *_times("finish_time", names)]:
        conditions["times"] = sa.and_(*times)
    if failed:
        conditions["failed"] = jobs.c.error_time.is_not(None)
    if uncancelled:
        conditions["uncancelled"] = jobs.c.cancel_reason.is_(None)
    if free:
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
        and _is_within(job.create_time, wanted.create_time_after, wanted.create_time_before)
        and _is_within(job.finish_time, wanted.finish_time_after, wanted.finish_time_before)
        and not (search.failed and error_type is None)
        and not (search.uncancelled and job.cancel_reason is not None)
    )


def _is_within(moment: datetime | None, after: datetime | None, before: datetime | None) -> bool:
    if moment is None:
        return after is None and before is None
    return (after is None or moment >= after) and (before is None or moment < before)


def read(connection: sa.Connection, job_ids: Sequence[str], *, full: bool) -> Iterator[Job]:
    """Those that exist, in this order, read a few at a time as they are asked for. `full`: with
    payload and traceback."""
    sizes = _payload_sizes(connection, job_ids) if full else {}
    for few in _portions(job_ids, sizes):
        if full:
            columns = JOB_COLUMNS_WITH_PAYLOAD
            rows = connection.execute(sa.select(*columns).where(jobs.c.id.in_(few)))
            found = {row.id: job_from_row(row, payload=True) for row in rows}
        else:
            found = {row[0]: brief_job(row) for row in _brief(connection, {"ids": few})}
        yield from (found[job_id] for job_id in few if job_id in found)


@Read
def _brief(sqlite: bool) -> sa.Select[Any]:
    return sa.select(*brief_columns(sqlite)).where(one_of(jobs.c.id, "ids", sqlite))


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
