"""What the limits of queues and concurrency keys leave: which of the waiting jobs may start now.

Whoever starts jobs, and whoever makes room, holds the locks of all limits that are touched until
its commit, and counts after it has them. So each sees what the other did, and nothing is held back
just as a place becomes free. Locks are taken in one order: rows of jobs, rows of queues by name,
keys by number; whoever has those of limits locks further jobs only with SKIP LOCKED. Jobs without a
key in queues without limits cost nothing, not even a query.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.states import JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import add_up, lock_names
from jobsvc.store.locking import KEY, OFFERED, QUEUE, LockedJob
from jobsvc.store.registry import RUNNING
from jobsvc.store.tables import EPOCH, MICROSECOND, jobs, queue_starts, queues

# For how long a place is kept for a job that was offered it. Its message arrives within
# milliseconds, unless it is lost, or is with a worker that is busy: others may have the place then.
OFFER = timedelta(seconds=3)

# Starts are gathered by the moment at which they stop counting, which makes them count a little
# longer than they should, and takes 65 rows for a queue.
GRAINS = 64
GRAIN_MICROSECONDS_MIN = 10_000
# Starts are forgotten this much later than they need be: the clock may be set back a little.
PAST = timedelta(seconds=10)
FAR = datetime(9999, 1, 1, tzinfo=UTC)

LIMITED = sa.or_(
    queues.c.paused, queues.c.max_running.is_not(None), queues.c.rate_max_starts.is_not(None)
)
# As the indexes have them, so that they are used.
OFFERS = sa.and_(
    jobs.c.state == sa.literal_column(f"'{JobState.QUEUED}'"),
    jobs.c.held_for == sa.literal_column(f"'{OFFERED}'"),
)

Rank = tuple[int, str]


def rank(job: Any) -> Rank:
    """Jobs start in the order of these."""
    return -job.priority, job.id


@dataclass(slots=True)
class _Share:
    """How many more jobs of a queue or key may run, and how many may start by its rate, less the
    places that are kept for jobs which go first. Of a key `run` is minus what runs, since each job
    brings a limit of its own."""

    run: float
    start: float = math.inf
    kept: list[Rank] = field(default_factory=list)

    @property
    def free(self) -> float:
        return min(self.run, self.start)

    def left(self, job: Any) -> float:
        return self.free - bisect_left(self.kept, rank(job))

    def take(self, count: int = 1) -> None:
        self.run -= count
        self.start -= count

    def keep_all(self) -> None:
        self.take(len(self.kept))
        self.kept.clear()


class Room:
    """What some queues and keys have left. Has their locks: for one transaction, which has locked
    the jobs that it began with before, and which writes what it changes after."""

    def __init__(
        self,
        tx: Transaction,
        names: Collection[str],
        keys: Collection[str],
        asking: Collection[str] = (),
    ) -> None:
        """`asking`: ids of jobs for which no place is to be kept, since they ask for theirs now."""
        self._tx = tx
        self._rates: dict[str, Rate] = {}
        self._started: Counter[str] = Counter()
        self._queues = self._lock_queues(names) if tx.limited and names else {}
        self._keys = self._lock_keys(keys) if keys else {}
        self._keep_places(asking)

    @classmethod
    def of(cls, tx: Transaction, locked: Iterable[LockedJob], *, asking: bool) -> Room | None:
        """For those jobs; None where no limit can apply to any of them."""
        found = list(locked)
        names = {job.queue for job in found} if tx.limited else set()
        keys = {job.concurrency_key for job in found if job.concurrency_key is not None}
        if not names and not keys:
            return None
        room = cls(tx, names, keys, {job.id for job in found} if asking else ())
        return room if room.limited or keys else None

    @property
    def limited(self) -> AbstractSet[str]:
        """The queues that have a limit, or are paused."""
        return self._queues.keys()

    def take(self, job: LockedJob) -> str | None:
        """What the job has to wait for; if for nothing, a place is its own from now on."""
        queue, key = self._shares(job)
        if queue is not None and queue.left(job) <= 0:
            return QUEUE
        if key is not None and key.left(job) + (job.concurrency_max or 0) <= 0:
            return KEY
        for share in (queue, key):
            if share is not None:
                share.take()
        self._started[job.queue] += 1
        return None

    def give_back(self, job: LockedJob) -> None:
        """A job that ran does no more."""
        for share in self._shares(job):
            if share is not None:
                share.run += 1

    def _shares(self, job: LockedJob) -> tuple[_Share | None, _Share | None]:
        """That of its queue, and that of its concurrency key."""
        key = job.concurrency_key
        return self._queues.get(job.queue), self._keys.get(key) if key is not None else None

    def keep_all(self) -> None:
        """From now on the places that were offered are kept from every other job, not only from
        those that would go later: what is left may be offered too."""
        for share in (*self._queues.values(), *self._keys.values()):
            share.keep_all()

    def free(self, queue: str) -> float:
        share = self._queues.get(queue)
        return share.free if share is not None else math.inf

    def running(self, key: str) -> float:
        return -self._keys[key].free

    def opens(self) -> float:
        """In how many seconds one of the queues may start more, for a rate that is used up now."""
        moments = [rate.opens(self._tx.now) for rate in self._rates.values()]
        waits = [(m - self._tx.now).total_seconds() for m in moments if m is not None]
        return min(waits, default=math.inf)

    def write_starts(self) -> None:
        """Counts what took its place as started, where there are rates."""
        for name in self._rates.keys() & self._started.keys():
            until = counts_until(self._tx.now, self._rates[name].period)
            row = {"queue": name, "until": until, "starts": self._started[name]}
            self._tx.execute(
                add_up(self._tx.connection, queue_starts, ("queue", "until"), "starts"), row
            )
            latest = self._tx.now - PAST
            self._tx.execute(
                sa.delete(queue_starts).where(
                    queue_starts.c.queue == name, queue_starts.c.until <= latest
                )
            )

    def _lock_queues(self, names: Collection[str]) -> dict[str, _Share]:
        limited = self._tx.execute(
            sa.select(queues)
            .where(queues.c.name.in_(sorted(names)), LIMITED)
            .order_by(queues.c.name)
            .with_for_update()
        ).all()
        open_ = [queue for queue in limited if not queue.paused]
        shares = {queue.name: _Share(-math.inf if queue.paused else math.inf) for queue in limited}
        if any(queue.max_running is not None for queue in open_):
            running = count_running(self._tx.connection)
            for queue in open_:
                if queue.max_running is not None:
                    shares[queue.name].run = queue.max_running - running.get(queue.name, 0)
        self._rates = load_rates(self._tx.connection, open_)
        for name, rate in self._rates.items():
            shares[name].start = rate.left(self._tx.now)
        return shares

    def _lock_keys(self, keys: Collection[str]) -> dict[str, _Share]:
        lock_names(self._tx.connection, [f"concurrency {key}" for key in keys])
        running = count_running_keys(self._tx.connection, keys)
        return {key: _Share(-running.get(key, 0)) for key in keys}

    def _keep_places(self, asking: Collection[str]) -> None:
        """For what was offered a place a moment ago, and is not among those that ask."""
        young = jobs.c.dispatch_time > self._tx.now - OFFER
        for column, shares in (
            (jobs.c.queue, self._queues),
            (jobs.c.concurrency_key, self._keys),
        ):
            if not shares:
                continue
            offered = sa.select(column.label("whose"), jobs.c.priority, jobs.c.id).where(
                column.in_(sorted(shares)), OFFERS, young
            )
            for job in self._tx.execute(offered):
                if job.id not in asking:
                    insort(shares[job.whose].kept, rank(job))


def count_running(connection: sa.Connection) -> Mapping[str, int]:
    """Jobs that run, by queue. Of all queues: what runs anywhere is few, and in their own index."""
    statement = sa.select(jobs.c.queue, sa.func.count().label("running")).where(
        RUNNING, jobs.c.lease_expire_time.is_not(None)
    )
    return {row.queue: row.running for row in connection.execute(statement.group_by(jobs.c.queue))}


def count_running_keys(connection: sa.Connection, keys: Collection[str]) -> Mapping[str, int]:
    """Jobs that run, by concurrency key."""
    statement = (
        sa.select(jobs.c.concurrency_key, sa.func.count().label("running"))
        .where(jobs.c.concurrency_key.in_(sorted(keys)), RUNNING)
        .group_by(jobs.c.concurrency_key)
    )
    return {row.concurrency_key: row.running for row in connection.execute(statement)}


@dataclass(frozen=True, slots=True)
class Rate:
    """A queue's rate limit, and what was started under it: (until when it counts, how many)."""

    max_starts: int
    period: float
    started: tuple[tuple[datetime, int], ...]

    def left(self, now: datetime) -> int:
        return self.max_starts - sum(starts for until, starts in self.started if until > now)

    def opens(self, now: datetime) -> datetime | None:
        """When the next may start; None where it may already."""
        left, moment = self.left(now), None
        for until, starts in sorted(self.started):
            if left > 0:
                break
            if until > now:
                left, moment = left + starts, until
        return moment


def load_rates(connection: sa.Connection, limited: Iterable[sa.Row[Any]]) -> dict[str, Rate]:
    """Of those rows of `queues` that have one."""
    rated = {queue.name: queue for queue in limited if queue.rate_max_starts is not None}
    if not rated:
        return {}
    started: dict[str, list[tuple[datetime, int]]] = {name: [] for name in rated}
    for row in connection.execute(
        sa.select(queue_starts).where(queue_starts.c.queue.in_(sorted(rated)))
    ):
        started[row.queue].append((row.until, row.starts))
    return {
        name: Rate(queue.rate_max_starts, queue.rate_period, tuple(started[name]))
        for name, queue in rated.items()
    }


def counts_until(start: datetime, period: float) -> datetime:
    """A start counts for at least the period, so that no window of that length has more starts
    than may be; rounded up, so that many starts share a row."""
    span = math.ceil(period * 1e6)
    grain = max(span // GRAINS, GRAIN_MICROSECONDS_MIN)
    end = (start - EPOCH) // MICROSECOND + span
    try:
        return min(EPOCH + timedelta(microseconds=-(-end // grain) * grain), FAR)
    except OverflowError:
        return FAR
