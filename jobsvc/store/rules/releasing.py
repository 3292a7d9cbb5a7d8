"""Held jobs: those that wait for room, or for a worker, with no message on the broker.

Whoever makes room offers it: the best of the held jobs that fit get a message, and a place is kept
for each until a worker claims it (limits.OFFER). No more are offered than there are places, so a
backlog of any size has few messages on their way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import Effects
from jobsvc.store import registry
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.reading import BY_INDEX
from jobsvc.store.locking import OFFERED, LockedJob, lock_next
from jobsvc.store.rules.limits import Room, count_running_keys, rank
from jobsvc.store.tables import job_types, jobs, queues

# How many more jobs are looked at than there are places, since some wait for a key as well.
SPARE = 10
OFFERS_MAX = 100  # for one queue, by whoever makes room
# How many keys one call of `release_held` looks at, and how many jobs of a key.
KEYS_MAX = 200
OF_A_KEY_MAX = 50

BEST = jobs.c.priority.desc(), jobs.c.id
# As the indexes have them, so that they are used.
FOR_QUEUE = sa.and_(jobs.c.held, jobs.c.held_for == sa.literal_column("'QUEUE'"))
FOR_KEY = sa.and_(jobs.c.held, jobs.c.held_for == sa.literal_column("'KEY'"))
# One that a worker of the release before held says nothing.
FOR_TYPE = sa.and_(
    jobs.c.held,
    sa.or_(jobs.c.held_for.is_(None), jobs.c.held_for == sa.literal_column("'TYPE'")),
)


def make_room(batch: Batch, ended: Collection[LockedJob]) -> None:
    """Offers to others the places of jobs that ran, and whose end `batch` has and did not write."""
    room = Room.of(batch.tx, ended, asking=False)
    if room is None:
        return
    for job in ended:
        room.give_back(job)
    keys = Counter(job.concurrency_key for job in ended if job.concurrency_key is not None)
    release(batch, room, room.limited, keys, OFFERS_MAX)


def release(
    batch: Batch, room: Room, names: Collection[str], keys: Mapping[str, int], limit: int
) -> int:
    """Offers what is left of `room` to jobs that are held for these queues, up to `limit` of each,
    and for these keys, up to so many of each. Answers how many were offered a place."""
    room.keep_all()
    found: list[LockedJob] = []
    for name in names:
        if (free := min(room.free(name), limit)) > 0:
            count = int(free) + SPARE
            found += lock_next(batch.tx, count, BEST, FOR_QUEUE, jobs.c.queue == name)
    for key, count in keys.items():
        found += lock_next(
            batch.tx,
            count,
            # Those with a smaller limit of their own would not fit, or not as long.
            (jobs.c.concurrency_max.desc(), *BEST),
            FOR_KEY,
            jobs.c.concurrency_key == key,
            jobs.c.concurrency_max > room.running(key),
        )
    offered = 0
    for job in sorted(found, key=rank):
        if job.id in batch:
            continue
        if (refused := room.take(job)) is not None:
            batch.hold(job, refused)
            continue
        # What no limit applies to any more takes nobody's place.
        kept = job.queue in room.limited or job.concurrency_key is not None
        batch.set(job, held_for=OFFERED if kept else None)
        batch.dispatch(job)
        offered += 1
    return offered


@dataclass(frozen=True, slots=True)
class Released:
    """`after`: which key to go on with. `opens`: in how many seconds a rate lets the next start."""

    count: int
    effects: Effects
    after: str = ""
    opens: float = math.inf


def release_held(tx: Transaction, limit: int, after: str = "") -> Released:
    """Offers whatever room there is: the guarantee, where nobody else has made it.

    Of the concurrency keys it looks at some only, those that follow `after`.
    """
    held = tx.execute(_HELD).one()
    if any(held) and tx.connection.dialect.name != "sqlite":
        tx.connection.exec_driver_sql(BY_INDEX)  # a backlog grows faster than what is known of it
    batch = Batch(tx)
    count = _release_types(batch, limit) if held.for_type else 0
    names: list[str] = []
    keys: list[str] = []
    if held.for_queue:
        waiting = _any(BEST, FOR_QUEUE, jobs.c.queue == queues.c.name)
        names = list(tx.execute(sa.select(queues.c.name).where(waiting)).scalars())
    if held.for_key:
        keys, after = _keys_with_room(tx, after)
    opens = math.inf
    if names or keys:
        room = Room(tx, names, keys)
        opens = room.opens()
        count += release(batch, room, names, dict.fromkeys(keys, OF_A_KEY_MAX), limit)
    return Released(count, batch.write(), after if held.for_key else "", opens)


def _any(
    order: tuple[sa.ColumnElement[Any], ...], *where: sa.ColumnElement[bool]
) -> sa.ColumnElement[bool]:
    """Whether there is such a job, by the index that has this order. For an EXISTS the planner may
    look through the table, or read all of them for a join, if it knows too little of it."""
    first = sa.select(jobs.c.id).where(*where).order_by(*order).limit(1)
    return first.scalar_subquery().is_not(None)


_HELD = sa.select(
    _any((jobs.c.queue, jobs.c.job_type), FOR_TYPE).label("for_type"),
    _any((jobs.c.queue, *BEST), FOR_QUEUE).label("for_queue"),
    _any((jobs.c.concurrency_key, jobs.c.concurrency_max.desc()), FOR_KEY).label("for_key"),
)


def _release_types(batch: Batch, limit: int) -> int:
    """Messages for jobs that a live worker can run now."""
    tx = batch.tx
    of_both = jobs.c.queue == queues.c.name, jobs.c.job_type == job_types.c.name
    waiting = _any((jobs.c.id,), FOR_TYPE, *of_both)
    each = sa.select(queues.c.name.label("queue"), job_types.c.name.label("job_type"))
    found = tx.execute(each.join_from(queues, job_types, sa.true()).where(waiting))
    wanted = {(row.queue, row.job_type) for row in found}
    count = 0
    for queue, job_type in sorted(wanted & registry.live_types(tx)):
        of_it = jobs.c.queue == queue, jobs.c.job_type == job_type
        for job in lock_next(tx, limit - count, jobs.c.id, FOR_TYPE, *of_it):
            batch.set(job, held_for=None)
            batch.dispatch(job)
            count += 1
        if count == limit:
            break
    return count


def _keys_with_room(tx: Transaction, after: str) -> tuple[list[str], str]:
    """Of the next keys after `after` that jobs are held for, those of which more could run; and
    where to go on."""

    def first(following: Any) -> Any:
        least = sa.select(sa.func.min(jobs.c.concurrency_key))
        return least.where(FOR_KEY, jobs.c.concurrency_key > following).scalar_subquery()

    # From one key to the next, whatever number of jobs is in between.
    key = sa.select(first(after).label("key")).cte("keys", recursive=True)
    key = key.union_all(sa.select(first(key.c.key)).where(key.c.key.is_not(None)))
    some = sa.select(key.c.key).where(key.c.key.is_not(None)).limit(KEYS_MAX).subquery()
    widest = (
        sa.select(sa.func.max(jobs.c.concurrency_max))
        .where(FOR_KEY, jobs.c.concurrency_key == some.c.key)
        .scalar_subquery()
    )
    looked_at = sa.select(some.c.key, widest.label("widest")).order_by(some.c.key)
    found = tx.execute(looked_at).all()
    running = count_running_keys(tx.connection, [row.key for row in found]) if found else {}
    last = found[-1].key if len(found) == KEYS_MAX else ""
    return [row.key for row in found if running.get(row.key, 0) < row.widest], last
