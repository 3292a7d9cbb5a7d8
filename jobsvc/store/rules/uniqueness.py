"""Unique keys: which jobs hold one.

Each job says by the scope that it was submitted with how long it holds its own key; what becomes of
those that hold it is said by the job that asks for it (its `on_conflict`). There may be several:
one that was replaced while it ran is left, and a job that goes back to waiting asks nobody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import OnConflict, UniqueScope
from jobsvc.core.states import WAITING_STATES, JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import lock_names
from jobsvc.store.locking import LockedJob, lock
from jobsvc.store.rows import JOB_COLUMNS
from jobsvc.store.tables import jobs

Key = tuple[str, str]  # job type, unique key


def _active(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """As the index has it, so that it is used."""
    states = *WAITING_STATES, JobState.RUNNING
    return table.c.state.in_([sa.literal_column(f"'{state}'") for state in states])


def _is_free() -> sa.ColumnElement[bool]:
    holder = jobs.alias("holder")
    runs_beside = sa.and_(
        holder.c.state == JobState.RUNNING, holder.c.unique_scope != UniqueScope.ACTIVE
    )
    same = holder.c.job_type == jobs.c.job_type, holder.c.unique_key == jobs.c.unique_key
    # Not EXISTS: for that the planner may read all that hold any key.
    first = sa.select(holder.c.id).where(*same, _active(holder), sa.not_(runs_beside)).limit(1)
    replaces = jobs.c.unique_on_conflict == OnConflict.REPLACE
    free = first.correlate(jobs).scalar_subquery().is_(None)
    return sa.or_(jobs.c.unique_key.is_(None), replaces, free)


# Of a job that has ended: nobody's unique key keeps it from being retried. A hint, for nothing is
# locked.
IS_FREE = _is_free()


class Holders:
    """Jobs with unique keys, each a row of JOB_COLUMNS or a LockedJob, which may be moved on."""

    def __init__(self, found: Iterable[Any]) -> None:
        self._jobs: defaultdict[Key, list[Any]] = defaultdict(list)
        for job in found:
            self.add(job)

    def add(self, job: Any) -> None:
        self._jobs[job.job_type, job.unique_key].append(job)

    def of(self, key: Key) -> list[Any]:
        """Who holds it now: those that wait before those that run, the newest first."""
        holding = [job for job in self._jobs.get(key, ()) if _holds(job)]
        return sorted(holding, key=lambda job: (job.state in WAITING_STATES, job.id), reverse=True)


def _holds(job: Any) -> bool:
    runs = job.state == JobState.RUNNING and job.unique_scope == UniqueScope.ACTIVE
    return runs or job.state in WAITING_STATES


def lock_holders(
    tx: Transaction,
    keys: Collection[Key],
    replaced: Collection[Key],
    job_ids: Collection[str] = (),
) -> tuple[Holders, dict[str, LockedJob]]:
    """Who holds `keys`; nobody else comes to hold one of them before this transaction ends.

    Locks, in one go and so in id order, the jobs that wait and hold a key of `replaced`, and those
    of `job_ids`, which it answers too.
    """
    found: Sequence[Any] = ()
    if keys:
        lock_names(tx.connection, [f"unique {job_type} {key}" for job_type, key in keys])
        found = active(tx.connection, keys)
    wanted = {row.id for row in found if row.state in WAITING_STATES and key_of(row) in replaced}
    wanted.update(job_ids)
    locked = lock(tx, wanted) if wanted else {}
    others = (row for row in found if row.id not in wanted)
    return Holders([*others, *(j for j in locked.values() if j.unique_key is not None)]), locked


def key_of(job: Any) -> Key:
    return job.job_type, job.unique_key


def active(connection: sa.Connection, keys: Collection[Key]) -> Sequence[sa.Row[Any]]:
    """The jobs with one of these keys that have not ended: no others can hold it."""
    by_type: defaultdict[str, list[str]] = defaultdict(list)
    for job_type, key in keys:
        by_type[job_type].append(key)
    wanted = (
        sa.and_(jobs.c.job_type == job_type, jobs.c.unique_key.in_(each), _active(jobs))
        for job_type, each in by_type.items()
    )
    return connection.execute(sa.select(*JOB_COLUMNS).where(sa.or_(*wanted))).all()
