"""Many jobs changed in one transaction: lock, decide in Python, write in three statements.

The rows are locked in id order (two batches that share jobs cannot deadlock), so what is decided
from them holds until the commit; the UPDATE repeats state and sequence all the same, and a row
that does not match rolls everything back. The row lock is also what makes sequences gapless and
their order the order of commits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import timedelta
from typing import Any, Protocol, Unpack

import sqlalchemy as sa

from jobsvc.core.attempts import JobError, Report
from jobsvc.core.model import RETENTION_SECONDS, Change, Dispatch, Effects, Step
from jobsvc.core.states import EventType, JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import insert_many, update_many
from jobsvc.store.locking import QUEUE, JobChanges, LockedJob, OtherChanges
from jobsvc.store.rows import error_to_json, event_detail
from jobsvc.store.tables import job_events, jobs, outbox, queues

# Whoever writes an outbox row publishes it at once; the relay takes over what is older.
PUBLISH_GRACE = timedelta(seconds=2)


class Dispatchable(Protocol):
    """What a message is made of."""

    id: str
    job_type: str
    queue: str
    priority: int
    attempt: int


class Batch:
    """Collects changes to locked (or just inserted) jobs; `write` stores them."""

    def __init__(self, tx: Transaction) -> None:
        self.tx = tx
        self._jobs: dict[str, LockedJob] = {}
        self._last_sequences: dict[str, int] = {}
        self._events: list[dict[str, Any]] = []
        self._outbox: list[dict[str, Any]] = []
        self._steps: Counter[Step] = Counter()
        self._entering: list[LockedJob] = []  # became QUEUED

    def __contains__(self, job_id: str) -> bool:
        """Whether it is changed."""
        return job_id in self._jobs

    def set(self, job: LockedJob, **columns: Unpack[JobChanges]) -> None:
        """Changes columns that no watcher is told of."""
        job.set(**columns)
        self._jobs[job.id] = job

    def move(
        self,
        job: LockedJob,
        event: EventType,
        state: JobState,
        *,
        error: JobError | None = None,
        report: Report | None = None,
        actor: str = "",
        **columns: Unpack[OtherChanges],
    ) -> None:
        """One arrow: the event, and every column that follows from it."""
        enters_queue = state is JobState.QUEUED and job.state != state
        values: OtherChanges = {
            "last_sequence": job.last_sequence + 1,
            "last_x": max(job.last_x, self.tx.x),
        }
        if error is not None:
            self.set(job, error=error_to_json(error))
            values |= {"error_type": error.type, "error_time": self.tx.now}
        if state is not JobState.RUNNING:
            values |= {"lease_token": None, "lease_expire_time": None}
        if state is not JobState.RETRYING:
            values["next_attempt_time"] = None
        if state.terminal:
            retention = job.retention or RETENTION_SECONDS[state]
            values["finish_time"] = self.tx.now
            values["purge_time"] = self.tx.now + timedelta(seconds=retention)
        if state is not JobState.RUNNING and state is not JobState.QUEUED:
            values |= {"held": False, "held_for": None}
        values.update(columns)
        self.set(job, state=state, **values)
        self.record(job, event, error=error, report=report, actor=actor)
        if enters_queue:
            self.set(job, dispatch_count=0, queued_time=self.tx.now, held_for=None)
            self.dispatch(job)
            self._entering.append(job)
        elif event is EventType.FAILED:
            self._owe(job, "dead", error.type if error else "", PUBLISH_GRACE)

    def record(
        self,
        job: LockedJob,
        event: EventType,
        *,
        error: JobError | None = None,
        report: Report | None = None,
        actor: str = "",
    ) -> None:
        """The event alone, numbered `job.last_sequence` and showing `job` as it is now."""
        self._events.append(
            {
                "job_id": job.id,
                "sequence": job.last_sequence,
                "type": event,
                "state": job.state,
                "event_time": self.tx.now,
                "attempt": job.attempt,
                "worker_id": job.worker_id if job.attempt else None,
                "x": job.last_x,
                "detail": event_detail(
                    error=error,
                    report=report,
                    next_attempt_time=job.next_attempt_time,
                    actor=actor,
                ),
            }
        )
        self._last_sequences[job.id] = job.last_sequence
        self._steps[Step(event, job.state, job.job_type, job.queue)] += 1

    def dispatch(self, job: LockedJob, grace: timedelta = PUBLISH_GRACE) -> None:
        """Owes the broker a message for a QUEUED job, which is held no more."""
        self.set(job, held=False, dispatch_time=self.tx.now)
        self._owe(job, "job", "", grace)

    def dispatch_new(self, job: LockedJob) -> None:
        """The same for a job that was inserted with its dispatch_time."""
        self._owe(job, "job", "", PUBLISH_GRACE)
        self._entering.append(job)

    def send_again(self, job: Dispatchable, after: timedelta) -> None:
        """Owes another message for a job that is not locked, and stays as it is."""
        self._owe(job, "job", "", after)

    def hold(self, job: LockedJob, reason: str) -> None:
        """A QUEUED job waits with no message until it is released."""
        if not job.held or job.held_for != reason:
            self.set(job, held=True, held_for=reason)

    def write(self) -> Effects:
        if self.tx.limited and self._entering:
            self._hold_paused()
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for job in self._jobs.values():
            guard = {"was_state": job.was_state, "was_last_sequence": job.was_last_sequence}
            groups[tuple(sorted(job.changed))].append({"id": job.id} | guard | job.changed)
        for rows in groups.values():
            written = update_many(self.tx.connection, jobs, ("state", "last_sequence"), rows)
            if written != len(rows):
                raise RuntimeError(f"{len(rows) - written} locked jobs changed under their lock")
        if self._events:
            insert_many(self.tx.connection, job_events, self._events)
        return Effects(
            tuple(Change(job_id, last) for job_id, last in self._last_sequences.items()),
            self._write_outbox(),
            self._steps,
        )

    def _hold_paused(self) -> None:
        """What comes into a paused queue has no use for a message: a worker would only hold it.

        The lock is for whoever resumes the queue meanwhile: it waits, and finds these held.
        """
        paused = self.tx.execute(
            sa.select(queues.c.name)
            .where(queues.c.name.in_(sorted({job.queue for job in self._entering})))
            .where(queues.c.paused)
            .order_by(queues.c.name)
            .with_for_update(read=True)
        )
        names = frozenset(paused.scalars())
        held = [
            job for job in self._entering if job.queue in names and job.state == JobState.QUEUED
        ]
        for job in held:
            self.hold(job, QUEUE)
        ids = {job.id for job in held}
        self._outbox = [o for o in self._outbox if o["kind"] != "job" or o["job_id"] not in ids]

    def _owe(self, job: Dispatchable, kind: str, error_type: str, grace: timedelta) -> None:
        self._outbox.append(
            {
                "kind": kind,
                "job_id": job.id,
                "job_type": job.job_type,
                "queue": job.queue,
                "priority": job.priority,
                "attempt": job.attempt,
                "error_type": error_type,
                "create_time": self.tx.now,
                "not_before": self.tx.now + grace,
            }
        )

    def _write_outbox(self) -> tuple[Dispatch, ...]:
        if not self._outbox:
            return ()
        rows = insert_many(self.tx.connection, outbox, self._outbox, tuple(outbox.c))
        at_once = self.tx.now + PUBLISH_GRACE  # what has less time is the relay's, once it is due
        return tuple(dispatch_from_row(row) for row in rows if row.not_before >= at_once)


def dispatch_from_row(row: sa.Row[Any]) -> Dispatch:
    return Dispatch(
        outbox_id=row.id,
        kind=row.kind,
        job_id=row.job_id,
        job_type=row.job_type,
        queue=row.queue,
        priority=row.priority,
        attempt=row.attempt,
        error_type=row.error_type,
    )
