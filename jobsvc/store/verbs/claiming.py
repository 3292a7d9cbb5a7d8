"""QUEUED -> RUNNING: which of the jobs that a worker has messages of it may run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from jobsvc.core.attempts import Claimed, Input
from jobsvc.core.model import Effects
from jobsvc.core.states import (
    EventType,
    JobState,
)
from jobsvc.store import registry
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.dispatching import keep_messages
from jobsvc.store.locking import OFFERED, TYPE, LockedJob, lock
from jobsvc.store.rules.limits import Room, rank
from jobsvc.store.rules.releasing import release
from jobsvc.store.tables import jobs
from jobsvc.store.verbs.arrows import expire_one

# A message of a type that its receiver cannot run goes round again after this long.
OTHER_TYPE_DELAY = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """`apart`: jobs that are to run alone in a worker, and were left for that."""

    claimed: tuple[Claimed, ...]
    effects: Effects
    apart: tuple[str, ...] = ()


def claim(
    tx: Transaction,
    job_ids: Iterable[str],
    types: frozenset[str],
    worker_id: str,
    token: str,
    lease_seconds: float,
    priorities: Mapping[str, int] | None = None,
    among_others: bool = False,
) -> ClaimResult:
    """QUEUED -> RUNNING for those of `job_ids` that are due and of a type in `types`.

    Waits for row locks; or, `passing_over` them, owes another message to what is locked, as whoever
    holds it may only keep books on it. `token` is new and random for each call. Called
    again with the same token (after a COMMIT of unknown outcome) it also answers what that call had
    claimed. `priorities` are those of the messages: a job that has another one by now has a newer
    message, too, and is left for that. `among_others`: the worker runs others beside them, so
    those are left that are to run alone.
    """
    batch = Batch(tx)
    claimed = []
    ids = list(job_ids)
    locked = lock(tx, ids, jobs.c.payload, jobs.c.payload_content_type)
    if not tx.waits:
        keep_messages(batch, [job_id for job_id in ids if job_id not in locked], priorities)
    latest = (job for job in locked.values() if _is_latest(job, priorities))
    queued = [job for job in latest if job.state == JobState.QUEUED]
    apart = [job.id for job in queued if _waits_apart(job, tx, types)] if among_others else []
    starting = _pick(batch, [job for job in queued if job.id not in apart], types)
    for job in locked.values():
        if job.state == JobState.RUNNING and job.lease_token == token:
            claimed.append(_claimed(job, token, 0.0))
        elif job.id in starting:
            waited = (tx.now - (job.queued_time or tx.now)).total_seconds()
            batch.move(
                job,
                EventType.STARTED,
                JobState.RUNNING,
                attempt=job.attempt + 1,
                start_time=tx.now,
                worker_id=worker_id,
                lease_token=token,
                lease_expire_time=tx.now + timedelta(seconds=lease_seconds),
                progress=None,
                held=False,
                held_for=None,
            )
            claimed.append(_claimed(job, token, waited))
    return ClaimResult(tuple(claimed), batch.write(), tuple(apart))


def _pick(batch: Batch, queued: list[LockedJob], types: frozenset[str]) -> set[str]:
    """Which of the QUEUED jobs start; the others expire, are passed on, or held."""
    offered = [job for job in queued if job.held_for == OFFERED]
    room = Room.of(batch.tx, queued, asking=True)
    if room is not None:
        # It may have waited for those whose places it takes: they ended before these start.
        batch.tx.advance(clock(batch.tx.connection))
    starting = set()
    others = []
    for job in sorted(queued, key=rank):
        if job.expire_time is not None and job.expire_time <= batch.tx.now:
            expire_one(batch, job)
        elif job.job_type not in types:
            others.append(job)
        elif room is not None and (refused := room.take(job)) is not None:
            batch.hold(job, refused)
        else:
            starting.add(job.id)
    _pass_on(batch, others)
    if room is not None:
        room.write_starts()
        # The places of what was offered one and does not start are for others.
        if left := [job for job in offered if job.held_for != OFFERED]:
            keys = Counter(job.concurrency_key for job in left if job.concurrency_key is not None)
            release(batch, room, room.limited & {job.queue for job in left}, keys, len(left))
    return starting


def _waits_apart(job: LockedJob, tx: Transaction, types: frozenset[str]) -> bool:
    expired = job.expire_time is not None and job.expire_time <= tx.now
    return job.apart and job.job_type in types and not expired


def _is_latest(job: LockedJob, priorities: Mapping[str, int] | None) -> bool:
    return priorities is None or priorities[job.id] == job.priority


def _claimed(job: LockedJob, token: str, waited: float) -> Claimed:
    return Claimed(
        job_id=job.id,
        token=token,
        job_type=job.job_type,
        queue=job.queue,
        attempt=job.attempt,
        input=Input(job.payload, job.payload_content_type),
        timeout=job.timeout,
        trace_id=job.trace_id,
        span_id=job.span_id,
        waited=waited,
    )


def _pass_on(batch: Batch, others: list[LockedJob]) -> None:
    """Jobs that the receiver has no handler for: to another worker, or held until one has it."""
    if not others:
        return
    live = registry.live_types(batch.tx)
    for job in others:
        if (job.queue, job.job_type) in live:
            batch.dispatch(job, OTHER_TYPE_DELAY)
        else:
            batch.hold(job, TYPE)
