"""Short words for the tests of the store: a database, its verbs, and time that passes at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from uuid_utils.compat import uuid4, uuid7

from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Input,
    JobError,
    JobTypeInfo,
    Report,
    Succeeded,
)
from jobsvc.core.model import Dispatch, Effects, Job, JobEvent, JobUpdate, NewJob, WorkerInfo
from jobsvc.core.operations import RateLimit
from jobsvc.store import dispatching, hot, queues, recovery, registry, verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.hot.submitting import Known
from jobsvc.store.reads import fleet, lookups
from jobsvc.store.reads.fleet import Page, Position
from jobsvc.store.rules import releasing
from jobsvc.store.tables import job_events, jobs, metadata, outbox, service
from jobsvc.store.verbs import Answer, Answers, Submitted
from tests.store.clock import set_clock

T = TypeVar("T")

WAIT_SECONDS_MAX = 20.0
LEASE_SECONDS = 30.0
EVERY_TYPE = frozenset({"demo", "other"})
DONE = Succeeded(Input(b"done"))
RETRYABLE = AttemptFailed(JobError("ValueError", "not today", retryable=True))
FATAL = AttemptFailed(JobError("TypeError", "never"))
CRASH = AttemptFailed(JobError("WORKER_LOST", "child died", retryable=True), crashed=True)


def new_id() -> str:
    return str(uuid7())


def new_token() -> str:
    return str(uuid4())


def new_job(job_type: str = "demo", **fields: Any) -> NewJob:
    return NewJob(job_id=new_id(), job_type=job_type, **fields)


def worker(worker_id: str = "w1", **fields: Any) -> WorkerInfo:
    values: dict[str, Any] = {
        "host": "h",
        "pid": 1,
        "version": "0.1.0",
        "queues": ("default",),
        "job_types": ("demo",),
        "concurrency": 4,
        "prefetch": 8,
    }
    return WorkerInfo(worker_id=worker_id, **(values | fields))


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


EVERY_QUEUE = _Everything()


def merge(first: Effects, second: Effects) -> Effects:
    """Of two transactions that stand for one."""
    return Effects(
        first.changes + second.changes,
        first.dispatches + second.dispatches,
        Counter(first.steps) + Counter(second.steps),
    )


class House:
    """A database and its verbs, each in a transaction of its own. Threads may share it.

    `wait` lets time pass for every later verb: its transaction's clock is ahead by that much. With
    `frozen` it starts there, and nothing else moves it.
    """

    def __init__(
        self, database: Database, *, frozen: datetime | None = None, hot: bool = False
    ) -> None:
        """`hot`: what is plain goes by the hot path, as it does in production."""
        self.database = database
        self.frozen = frozen
        self.hot = hot
        self.elapsed = timedelta()
        self.effects = Effects()  # of the last verb that had any

    def wait(self, seconds: float) -> None:
        self.elapsed += timedelta(seconds=seconds)

    def write(self, body: Callable[[Transaction], T]) -> T:
        return self.database.write(
            lambda tx: body(replace(tx, now=(self.frozen or tx.now) + self.elapsed))
        )

    def now(self) -> datetime:
        return self.write(lambda tx: tx.now)

    # Verbs.

    def submit(self, job_type: str = "demo", **fields: Any) -> str:
        """Answers the id of a job that is new."""
        (answer,) = self.submit_all([new_job(job_type, **fields)])
        assert isinstance(answer, Submitted)
        assert not answer.already_existed
        return answer.job_id

    def submit_all(
        self, requests: Sequence[NewJob], types: Iterable[JobTypeInfo] = ()
    ) -> list[Answer]:
        known = {t.name: t for t in types}
        if self.hot:
            self._set_clock()
            stored = hot.submit_all(self.database, requests, self._known(known))
            if stored is not None:
                self.effects = stored[1]
                return [*stored[0]]
        answers, self.effects = self.write(lambda tx: verbs.submit(tx, requests, known))
        return answers

    def _known(self, types: Mapping[str, JobTypeInfo]) -> Known:
        revision = self.database.read(registry.registry_revision)
        return Known(revision, types, EVERY_QUEUE)

    def _set_clock(self) -> None:
        set_clock(self.database, self.frozen, self.elapsed)

    def claim_all(
        self,
        job_ids: Iterable[str],
        *,
        types: frozenset[str] = EVERY_TYPE,
        token: str | None = None,
        worker_id: str = "w1",
        lease_seconds: float = LEASE_SECONDS,
        priorities: Mapping[str, int] | None = None,
    ) -> tuple[Claimed, ...]:
        rest = list(job_ids)
        token = token or new_token()
        claimed: tuple[Claimed, ...] = ()
        self.effects = Effects()
        if self.hot:
            self._set_clock()
            told = priorities or self._priorities(rest)
            found = hot.claim(self.database, told, types, worker_id, token, lease_seconds)
            claimed, self.effects = found.claimed, found.effects
            rest = [i for i in rest if i not in {c.job_id for c in claimed}]
        if rest:
            found = self.write(
                lambda tx: verbs.claim(tx, rest, types, worker_id, token, lease_seconds, priorities)
            )
            claimed += found.claimed
            self.effects = merge(self.effects, found.effects)
        return claimed

    def _priorities(self, job_ids: Sequence[str]) -> dict[str, int]:
        found = sa.select(jobs.c.id, jobs.c.priority).where(jobs.c.id.in_(job_ids))
        return {
            row.id: row.priority for row in self.database.read(lambda c: c.execute(found).all())
        }

    def claim(self, job_id: str, **options: Any) -> Claimed:
        (claimed,) = self.claim_all([job_id], **options)
        return claimed

    def start(self, **fields: Any) -> Claimed:
        """A new job that runs."""
        return self.claim(self.submit(**fields))

    def finish(self, claimed: Claimed, ending: Ending) -> bool:
        """Whether the ending was accepted."""
        given = {claimed.job_id: (claimed.token, ending)}
        if self.hot:
            self._set_clock()
            accepted, self.effects = hot.succeed(self.database, given)
            if accepted:
                return True
        accepted, self.effects = self.write(lambda tx: verbs.finish(tx, given))
        return claimed.job_id in accepted

    def report(self, claimed: Claimed, *entries: Report) -> bool:
        held, self.effects = self.write(
            lambda tx: verbs.report(tx, {claimed.job_id: (claimed.token, entries)})
        )
        return claimed.job_id in held

    def renew(self, *claimed: Claimed) -> dict[tuple[str, str], bool]:
        leases = {c.job_id: c.token for c in claimed}
        return self.write(lambda tx: verbs.renew(tx, leases, LEASE_SECONDS))

    def cancel(self, job_id: str, reason: str = "enough", actor: str = "alice") -> Job:
        job, self.effects = self.write(lambda tx: verbs.cancel(tx, job_id, reason, actor))
        return job

    def retry(self, job_id: str, actor: str = "alice") -> Job:
        job, self.effects = self.write(lambda tx: verbs.retry(tx, job_id, actor))
        return job

    def retry_many(self, *job_ids: str, actor: str = "alice") -> Answers:
        answers, self.effects = self.write(lambda tx: verbs.retry_many(tx, job_ids, actor))
        return answers

    def update_job(self, job_id: str, *, actor: str = "alice", **change: Any) -> Job:
        job, self.effects = self.write(
            lambda tx: verbs.update(tx, job_id, JobUpdate(**change), actor)
        )
        return job

    def delete(self, job_id: str) -> None:
        self.write(lambda tx: verbs.delete(tx, job_id))

    def delete_many(self, *job_ids: str) -> Answers:
        return self.write(lambda tx: verbs.delete_many(tx, job_ids))

    def promote(self, limit: int = 100) -> int:
        return self._count(lambda tx: verbs.promote(tx, limit))

    def expire(self, limit: int = 100) -> int:
        return self._count(lambda tx: verbs.expire(tx, limit))

    def reap(self, limit: int = 100) -> int:
        return self._count(lambda tx: verbs.reap(tx, limit))

    def reap_workers(self, *worker_ids: str, limit: int = 100) -> int:
        return self._count(lambda tx: verbs.reap_workers(tx, worker_ids, limit))

    def redispatch(self, queue: str = "default", limit: int = 100) -> int:
        return self._recover(recovery.overdue(queue, self.now()), limit)

    def redispatch_all(self, before: datetime, limit: int = 100) -> int:
        return self._recover(recovery.dispatched_before(before), limit)

    def _recover(self, lost: recovery.Lost, limit: int) -> int:
        by_clock = cast(Database, SimpleNamespace(scan=self.database.scan, write=self.write))
        going = recovery.Recovery(lost)
        while not going.done and going.count < limit:
            going.step(by_clock, limit - going.count)
        return going.count

    def take_owed(self, limit: int = 100) -> list[Dispatch]:
        return self.write(lambda tx: dispatching.take_owed(tx, limit))

    def release_held(self, limit: int = 100) -> int:
        released = self.write(lambda tx: releasing.release_held(tx, limit))
        self.effects = released.effects
        return released.count

    def pause(self, queue: str = "default", paused: bool = True) -> None:
        self.effects = self.write(lambda tx: queues.set_paused(tx, queue, paused))

    def resume(self, queue: str = "default") -> None:
        self.pause(queue, paused=False)

    def limit(self, queue: str = "default", max_running: int | None = None) -> None:
        mask = {"max_running"}
        self.effects = self.write(lambda tx: queues.set_limits(tx, queue, mask, max_running, None))

    def rate(self, starts: int, period: float, queue: str = "default") -> None:
        limit = RateLimit(starts, period) if starts else None
        mask = {"rate_limit"}
        self.effects = self.write(lambda tx: queues.set_limits(tx, queue, mask, None, limit))

    def republish(self, *job_ids: str) -> None:
        self.effects = self.write(lambda tx: dispatching.republish(tx, job_ids))

    def purge(self, limit: int = 100, resume: timedelta = timedelta()) -> int:
        return self.write(lambda tx: verbs.purge(tx, limit, resume))

    def announce(self, info: WorkerInfo, *types: JobTypeInfo) -> None:
        self.write(lambda tx: registry.announce(tx, info, types))

    def _count(self, verb: Callable[[Transaction], tuple[int, Effects]]) -> int:
        count, self.effects = self.write(verb)
        return count

    # What is stored.

    def get(self, job_id: str) -> Job:
        return self.database.read(lambda c: lookups.get_job(c, job_id))

    def row(self, job_id: str) -> Any:
        return self.database.read(
            lambda c: c.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
        )

    def events(self, job_id: str) -> list[JobEvent]:
        return self.database.read(lambda c: lookups.list_events(c, job_id, 0, 1000))

    def page_after(
        self,
        position: Position | None,
        limit: int = 1000,
        *,
        hidden: bool = False,
        apart: bool = False,
    ) -> Page:
        """Of the events of all jobs. It waits until nothing is hidden, unless `hidden` will do: a
        transaction of any other test on the same cluster hides what is new, but for `apart`."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            page = self.database.read(lambda c: fleet.page_after(c, position, limit, apart=apart))
            if hidden or not page.hidden:
                return page
            assert time.monotonic() < deadline, "what is new stays hidden"
            time.sleep(0.005)

    def history(self, job_id: str) -> list[str]:
        """Each event as TYPE>STATE."""
        return [f"{event.type}>{event.state}" for event in self.events(job_id)]

    def owed(self, job_id: str | None = None) -> list[str]:
        """The kinds of the messages that are owed to the broker, oldest first."""
        statement = sa.select(outbox.c.kind).order_by(outbox.c.id)
        if job_id is not None:
            statement = statement.where(outbox.c.job_id == job_id)
        return list(self.database.read(lambda c: c.execute(statement).scalars().all()))

    def deliver(self) -> None:
        """The broker has confirmed all that was owed to it."""
        self.write(lambda tx: tx.execute(sa.delete(outbox)))

    def count(self, table: sa.Table) -> int:
        statement = sa.select(sa.func.count()).select_from(table)
        return self.database.read(lambda c: c.execute(statement).scalar_one())

    def change(self, job_id: str, **columns: Any) -> None:
        """Sets columns past all verbs."""
        self.write(
            lambda tx: tx.execute(sa.update(jobs).where(jobs.c.id == job_id).values(columns))
        )

    def forget_job(self, job_id: str) -> None:
        """Deletes the job and its events past all verbs."""

        def delete(tx: Transaction) -> None:
            tx.execute(sa.delete(job_events).where(job_events.c.job_id == job_id))
            tx.execute(sa.delete(jobs).where(jobs.c.id == job_id))

        self.write(delete)


def wipe(database: Database) -> None:
    """Empties every table but `service`, which keeps its one row."""
    tables = [table for table in metadata.sorted_tables if table is not service]

    def body(tx: Transaction) -> None:
        for table in tables:
            tx.execute(sa.delete(table))

        tx.execute(sa.update(service).values(limited=False))

    database.write(body)


def together(*bodies: Callable[[], T]) -> list[T]:
    """Runs each in a thread of its own, all let go at once; answers what they answered."""
    barrier = threading.Barrier(len(bodies))

    def run(body: Callable[[], T]) -> T:
        barrier.wait(WAIT_SECONDS_MAX)
        return body()

    with ThreadPoolExecutor(len(bodies)) as pool:
        futures: list[Future[T]] = [pool.submit(run, body) for body in bodies]
        return [future.result(WAIT_SECONDS_MAX) for future in futures]


def wait_until_blocked(house: House) -> None:
    """Returns once some transaction of this database waits for a lock."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    timeout = threading.Event()
    timer = threading.Timer(WAIT_SECONDS_MAX, timeout.set)
    timer.start()
    try:
        while not house.database.read(lambda c: c.execute(waiting).scalar_one()):
            assert not timeout.is_set(), "nobody waits for a lock"
    finally:
        timer.cancel()


def explain(cursor: Any, statement: str, parameters: Any, options: str = "") -> None:
    """EXPLAIN of a statement, with what PostgreSQL is told before it."""
    before, _, query = statement.rpartition(";\n")
    if before:
        cursor.execute(before)
    cursor.execute(f"EXPLAIN {options} {query}", parameters)
