"""The history checker: what must hold of the tables after every fault, whatever happened.

    report = check(database, acknowledged=ids, all_ended=True, outbox_empty=True, jobs_min=100)

reads jobs, events and outbox in one snapshot and raises `HistoryBroken`, which lists every
violation. The law it holds them against is `jobsvc.core.states`, not the code that wrote them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from jobsvc.core.states import (
    ARROWS,
    CRASHES_MAX,
    WAITING_STATES,
    EventType,
    JobState,
)
from jobsvc.store.database import Database
from jobsvc.store.tables import job_events, jobs, outbox

VIOLATIONS_SHOWN_MAX = 50

# All but payloads and results, which may be large: of a result only whether it is there.
_JOB = (
    *(jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.last_sequence, jobs.c.max_attempts),
    *(jobs.c.failures, jobs.c.crashes, jobs.c.cancel_reason, jobs.c.error, jobs.c.held),
    *(jobs.c.finish_time, jobs.c.purge_time, jobs.c.next_attempt_time),
    *(jobs.c.lease_token, jobs.c.lease_expire_time),
    jobs.c.result.is_not(None).label("has_result"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at, so that a run in which nothing happened does not pass for a good one."""

    jobs: int
    events: int
    states: Counter[JobState]
    event_types: Counter[EventType]


class HistoryBroken(AssertionError):
    def __init__(self, violations: Sequence[str]) -> None:
        shown = list(violations[:VIOLATIONS_SHOWN_MAX])
        if more := len(violations) - len(shown):
            shown.append(f"... and {more} more")
        super().__init__("\n".join([f"{len(violations)} violations:", *shown]))
        self.violations = tuple(violations)


def check(
    database: Database,
    *,
    acknowledged: Collection[str] = (),
    all_ended: bool = False,
    outbox_empty: bool = False,
    jobs_min: int = 0,
) -> Report:
    """Raises HistoryBroken unless every job's history is legal and agrees with its row.

    `acknowledged`: ids of submits that were answered OK and are not purged yet; none may be
    missing. `all_ended`: no job waits or runs. `outbox_empty`: no message is owed. `jobs_min`: with
    fewer jobs than this the run proved nothing.
    """
    rows, events, owed = _read(database)
    histories = {
        job_id: list(group) for job_id, group in itertools.groupby(events, lambda e: e.job_id)
    }
    known = {row.id for row in rows}
    violations = [f"{i}: acknowledged, but not stored" for i in sorted(set(acknowledged) - known)]
    violations += [f"{i}: has events, but no job" for i in histories if i not in known]
    for row in rows:
        history = histories.get(row.id, [])
        found = [*_history(row, history), *_agreement(row, history)]
        if all_ended and not JobState(row.state).terminal:
            found.append(f"has not ended: {row.state}")
        violations += [f"{row.id}: {violation}" for violation in found]
    if outbox_empty:
        violations += [f"{row.job_id}: still owed to the broker: {row.kind}" for row in owed]
    if len(rows) < jobs_min:
        violations.append(f"only {len(rows)} jobs, where at least {jobs_min} were to be looked at")
    if violations:
        raise HistoryBroken(violations)
    return Report(
        jobs=len(rows),
        events=len(events),
        states=Counter(JobState(row.state) for row in rows),
        event_types=Counter(EventType(event.type) for event in events),
    )


@cache
def _own(url: str) -> Database:
    """Closed after each use, which leaves it what it has learned: its statements as compiled."""
    return Database(url, pool_size=1)


def _read(database: Database) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Jobs, events and outbox as they are at one moment, over a connection of its own: after a
    fault the pool's may be dead."""
    own = _own(database.url.render_as_string(hide_password=False))
    try:
        with own.engine.connect() as connection:
            if not own.sqlite:  # whose transaction is one snapshot anyway
                connection.execution_options(isolation_level="REPEATABLE READ")
            return (
                connection.execute(sa.select(*_JOB).order_by(jobs.c.id)).all(),
                connection.execute(
                    sa.select(job_events).order_by(job_events.c.job_id, job_events.c.sequence)
                ).all(),
                connection.execute(sa.select(outbox).order_by(outbox.c.id)).all(),
            )
    finally:
        own.close()


def _history(job: Any, events: Sequence[Any]) -> Iterator[str]:
    """The events by themselves: numbers, arrows, attempts, one end, and each budget kept."""
    numbers = [event.sequence for event in events]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"sequences are not 1 to {len(numbers)}: {numbers}"
    state: JobState | None = None
    attempt = 0
    cancel_requested = False
    for event, following in itertools.zip_longest(events, events[1:]):
        arrow = (state, EventType(event.type), JobState(event.state))
        if arrow not in ARROWS:
            yield f"event {event.sequence} is no arrow: {state} -{event.type}-> {event.state}"
        state = arrow[2]
        attempt += event.type == EventType.STARTED
        if event.attempt != attempt:
            yield f"event {event.sequence} has attempt {event.attempt} instead of {attempt}"
            attempt = event.attempt
        cancel_requested |= event.type == EventType.CANCEL_REQUESTED
        if cancel_requested and state in WAITING_STATES:
            yield f"event {event.sequence} goes back to {state} after CANCEL_REQUESTED"
        if arrow[0] is JobState.RUNNING and state is JobState.CANCELLED and not cancel_requested:
            yield f"event {event.sequence} is CANCELLED without CANCEL_REQUESTED"
        if (event.type in _WITH_ERROR) != ("error" in (event.detail or {})):
            has = "has no" if event.type in _WITH_ERROR else "has an"
            yield f"event {event.sequence}, {event.type}, {has} error"
        if event.type == EventType.ATTEMPT_FAILED:
            yield from _after_failure(event, following)
    ends = [event.sequence for event in events if EventType(event.type).terminal]
    ended = bool(state and state.terminal)
    if len(ends) != ended or (ends and ends[-1] != len(events)):
        yield f"has its terminal events at {ends} of {len(events)}"


_WITH_ERROR = {EventType.ATTEMPT_FAILED, EventType.FAILED, EventType.CANCELLED}


def _after_failure(event: Any, following: Any) -> Iterator[str]:
    """A failed attempt says when the next is due, or its end follows in the same transaction."""
    again = event.state == JobState.RETRYING
    if again != ("next_attempt_time" in event.detail):
        yield f"event {event.sequence}: next_attempt_time does not agree with {event.state}"
    if not again and (
        following is None
        or following.type not in (EventType.FAILED, EventType.CANCELLED)
        or following.event_time != event.event_time
    ):
        yield f"event {event.sequence} is the last attempt's failure, and no end follows with it"


def _agreement(job: Any, events: Sequence[Any]) -> Iterator[str]:
    """The job's row against its events, and its columns against its state."""
    if not events:
        yield "has no events"
        return
    last, state = events[-1], JobState(job.state)
    if job.last_sequence != last.sequence:
        yield f"last_sequence is {job.last_sequence}, the last event is {last.sequence}"
    if job.state != last.state:
        yield f"is {job.state}, its last event says {last.state}"
    if job.attempt != last.attempt:
        yield f"attempt is {job.attempt}, its last event says {last.attempt}"
    for column, expected in (
        ("finish_time", state.terminal),
        ("purge_time", state.terminal),
        ("lease_token", state is JobState.RUNNING),
        ("lease_expire_time", state is JobState.RUNNING),
        ("next_attempt_time", state is JobState.RETRYING),
    ):
        if (getattr(job, column) is not None) != expected:
            yield f"{column} is {getattr(job, column)} in state {state}"
    if state.terminal and job.finish_time != last.event_time:
        yield f"finish_time is {job.finish_time}, its end was at {last.event_time}"
    if job.has_result != (state is JobState.SUCCEEDED):
        yield f"has {'a' if job.has_result else 'no'} result in state {state}"
    if state in (JobState.FAILED, JobState.CANCELLED) and (
        not job.error or job.error != (last.detail or {}).get("error")
    ):
        yield f"its error is not that of its last event: {job.error}"
    if job.held and state is not JobState.QUEUED:
        yield f"is held in state {state}"
    if EventType.CANCEL_REQUESTED in {e.type for e in events} and job.cancel_reason is None:
        yield "its cancel was requested, and it does not know"
    yield from _budget(job, events)


def _budget(job: Any, events: Sequence[Any]) -> Iterator[str]:
    failed = [e for e in events if e.type == EventType.ATTEMPT_FAILED]
    errors = [(e.detail or {}).get("error") or {"type": None, "retryable": None} for e in failed]
    lost = sum(error["type"] == "WORKER_LOST" for error in errors)
    if job.failures != len(failed):
        yield f"counts {job.failures} failures, its events {len(failed)}"
    if job.failures > job.max_attempts:
        yield f"used {job.failures} attempts of {job.max_attempts}"
    if job.crashes != lost:
        yield f"counts {job.crashes} crashes, its events {lost}"
    if job.crashes > CRASHES_MAX:
        yield f"crashed {job.crashes} times, {CRASHES_MAX} were allowed"
    if job.state == JobState.FAILED and (job.error or {}).get("type") != "EXPIRED":
        used_up = job.failures >= job.max_attempts or job.crashes >= CRASHES_MAX
        if not used_up and (not errors or errors[-1]["retryable"]):
            yield f"FAILED with {job.failures} of {job.max_attempts} attempts used"
