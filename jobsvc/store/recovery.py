"""New messages for jobs whose messages were lost: the best first, and never many at once, so that
whoever does it can send each batch, and do all else, before it looks for the next."""

from __future__ import annotations

import uuid
from collections import defaultdict
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

import sqlalchemy as sa

from jobsvc.core.model import Dispatch
from jobsvc.core.states import JobState
from jobsvc.store.batch import Batch
from jobsvc.store.database import Database, Transaction
from jobsvc.store.dialects.reading import BY_INDEX
from jobsvc.store.dispatching import REDISPATCH_AGE_SECONDS
from jobsvc.store.locking import lock_next
from jobsvc.store.tables import JobId, jobs, outbox

# How many QUEUED jobs a statement goes through at most, however many there are.
WINDOW_JOBS = 10_000
REDISPATCH_AGE_SECONDS_MAX = 1800.0
_DOUBLINGS_MAX = 5  # 60 s * 2^5 is past the maximum
_FIRST = str(uuid.UUID(int=0))
_LAST = str(uuid.UUID(int=2**128 - 1))

# As ix_jobs_list_state has them, and no other index, whatever the planner believes of the table.
_PLACE = (jobs.c.state, jobs.c.id)
_NOT_OWED = ~sa.exists().where(outbox.c.job_id == jobs.c.id, outbox.c.kind == "job")

Lost = sa.ColumnElement[bool]  # which QUEUED jobs have lost their message


def dispatched_before(before: datetime) -> Lost:
    """Every one: the broker holds nothing of what it was sent until then."""
    return jobs.c.dispatch_time < before


def overdue(queue: str, now: datetime) -> Lost:
    """Those of a queue that is short of messages which were dispatched 60 s * 2^n ago, n their
    re-dispatches so far, at most 30 min."""
    ages = [
        min(REDISPATCH_AGE_SECONDS * 2**n, REDISPATCH_AGE_SECONDS_MAX)
        for n in range(_DOUBLINGS_MAX + 1)
    ]
    due = (
        sa.and_(
            jobs.c.dispatch_count == n if n < _DOUBLINGS_MAX else jobs.c.dispatch_count >= n,
            jobs.c.dispatch_time <= now - timedelta(seconds=seconds),
        )
        for n, seconds in enumerate(ages)
    )
    return sa.and_(jobs.c.queue == queue, sa.or_(*due))


class _Window(NamedTuple):
    """A range of job ids, which are in the order of their making."""

    after: str
    last: str


class Recovery:
    """Goes through those that are lost by priority, then age. It first looks where there are jobs
    of which priority, window by window; then owes messages, window by window, for those of the
    highest. It passes over those that somebody else holds."""

    def __init__(self, lost: Lost) -> None:
        self._lost = sa.and_(sa.not_(jobs.c.held), lost)
        self._after: str | None = _FIRST  # None: it has looked everywhere
        self._windows: defaultdict[int, list[_Window]] = defaultdict(list)  # by priority
        self.count = 0
        self.done = False

    def step(self, database: Database, limit: int) -> tuple[Dispatch, ...]:
        """One look, or messages for up to `limit` jobs, which are owed now, for the caller to send.
        Raises DatabaseUnavailable; the same step is to be tried again then."""
        if self._after is not None:
            self._look(database, self._after)
        elif self._windows:
            return self._owe_best(database, limit)
        else:
            self.done = True
        return ()

    def _look(self, database: Database, after: str) -> None:
        priorities, last = database.scan(partial(_survey, lost=self._lost, after=after))
        for priority in priorities:
            self._windows[priority].append(_Window(after, last))
        self._after = last if last < _LAST else None

    def _owe_best(self, database: Database, limit: int) -> tuple[Dispatch, ...]:
        priority = max(self._windows)
        windows = self._windows[priority]

        def owe(tx: Transaction) -> tuple[tuple[Dispatch, ...], str]:
            return _owe(tx, sa.and_(self._lost, jobs.c.priority == priority), windows[0], limit)

        dispatches, reached = database.write(owe)
        self.count += len(dispatches)
        if len(dispatches) == limit:
            windows[0] = _Window(reached, windows[0].last)
        else:
            windows.pop(0)
        if not windows:
            del self._windows[priority]
        return dispatches


def _survey(connection: sa.Connection, lost: Lost, after: str) -> tuple[list[int], str]:
    """The priorities of those that are lost among the next QUEUED jobs, and the last of these."""
    following = sa.select(jobs.c.id).where(_between(after, _LAST)).order_by(*_PLACE)
    last = connection.execute(following.offset(WINDOW_JOBS - 1).limit(1)).scalar() or _LAST
    priorities = sa.select(jobs.c.priority).where(lost, _between(after, last))
    return list(connection.execute(priorities.distinct()).scalars()), last


def _between(after: str, last: str) -> sa.ColumnElement[bool]:
    """QUEUED, and in the range."""
    place, queued = sa.tuple_(*_PLACE), sa.literal(JobState.QUEUED.value)
    return sa.and_(
        place > sa.tuple_(queued, sa.literal(after, JobId)),
        place <= sa.tuple_(queued, sa.literal(last, JobId)),
    )


def _owe(
    tx: Transaction, lost: Lost, window: _Window, limit: int
) -> tuple[tuple[Dispatch, ...], str]:
    """Owes messages; answers them, and the last job that got one."""
    if tx.connection.dialect.name != "sqlite":
        tx.connection.exec_driver_sql(BY_INDEX)  # a backlog grows faster than what is known of it
    found = lock_next(tx, limit, _PLACE, lost, _between(*window), _NOT_OWED)
    batch = Batch(tx)
    for job in found:
        batch.set(job, dispatch_count=job.dispatch_count + 1)
        batch.dispatch(job)
    dispatches = batch.write().dispatches
    return dispatches, found[-1].id if found else window.last
