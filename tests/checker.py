"""The history checker: what must hold of the tables after every fault, whatever happened.

    report = check(database, acknowledged=ids, all_ended=True, outbox_empty=True, jobs_min=100)

reads jobs, events and outbox in one snapshot and raises `HistoryBroken`, which lists every
violation. The law it holds them against is `jobsvc.core.states`, not the code that wrote them.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from jobsvc.store.tables import job_events, job_labels, jobs, outbox

VIOLATIONS_SHOWN_MAX = 50

# All but payloads and results, which may be large: of a result only whether it is there.
_JOB = (
    *(jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.last_sequence, jobs.c.max_attempts),
    *(
        jobs.c.failures,
        jobs.c.crashes,
        jobs.c.cancel_reason,
        jobs.c.error,
        jobs.c.held,
        jobs.c.held_for,
    ),
    *(jobs.c.finish_time, jobs.c.purge_time, jobs.c.next_attempt_time),
    *(jobs.c.lease_token, jobs.c.lease_expire_time, jobs.c.error_type, jobs.c.last_x),
    *(jobs.c.job_type, jobs.c.unique_key, jobs.c.unique_scope, jobs.c.unique_on_conflict),
    jobs.c.labels,
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
    rows, events, labels, owed = _read(database)
    histories = {
        job_id: list(group) for job_id, group in itertools.groupby(events, lambda e: e.job_id)
    }
    labelled: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for label in labels:
        labelled[label.job_id][label.key] = label.value
    known = {row.id for row in rows}
    violations = [f"{i}: acknowledged, but not stored" for i in sorted(set(acknowledged) - known)]
    violations += [f"{i}: has events, but no job" for i in histories if i not in known]
    violations += [f"{i}: has labels, but no job" for i in labelled if i not in known]
    violations += _unique(rows, histories)
    for row in rows:
        history = histories.get(row.id, [])
        found = [*_history(row, history), *_agreement(row, history)]
        if row.labels != labelled.get(row.id, {}):
            found.append(f"has the labels {row.labels}, to be found by {labelled.get(row.id)}")
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


def _read(database: Database) -> tuple[Sequence[Any], ...]:
    """Jobs, events, labels and outbox as they are at one moment, over a connection of its own:
    after a fault the pool's may be dead."""
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
                connection.execute(sa.select(job_labels)).all(),
                connection.execute(sa.select(outbox).order_by(outbox.c.id)).all(),
            )
    finally:
        own.close()


def _history(job: Any, events: Sequence[Any]) -> Iterator[str]:
    """The events by themselves: numbers, arrows, attempts, and each run's end and budget."""
    numbers = [event.sequence for event in events]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"sequences are not 1 to {len(numbers)}: {numbers}"
    state: JobState | None = None
    attempt = x = 0
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
        if event.x < x:
            yield f"event {event.sequence} stands at {event.x}, the one before at {x}"
        x = event.x
        if event.type in (EventType.CANCEL_REQUESTED, EventType.RETRIED):
            cancel_requested = event.type == EventType.CANCEL_REQUESTED
        if cancel_requested and state in WAITING_STATES:
            yield f"event {event.sequence} goes back to {state} after CANCEL_REQUESTED"
        if arrow[0] is JobState.RUNNING and state is JobState.CANCELLED and not cancel_requested:
            yield f"event {event.sequence} is CANCELLED without CANCEL_REQUESTED"
        yield from _detail(event, called=arrow[0] in WAITING_STATES)
        if event.type == EventType.ATTEMPT_FAILED:
            yield from _after_failure(event, following)
    for run, following in itertools.zip_longest(runs := _runs(events), runs[1:]):
        ends = [event.sequence for event in run if EventType(event.type).terminal]
        ended = bool(following) or bool(state and state.terminal)
        if len(ends) != ended or (ends and ends[-1] != run[-1].sequence):
            yield f"has its terminal events at {ends} of {run[-1].sequence}"
        yield from _budget(job.max_attempts, run)


_WITH_ERROR = {EventType.ATTEMPT_FAILED, EventType.FAILED, EventType.CANCELLED}
_BY_A_CLIENT = {
    *(EventType.SUBMITTED, EventType.CANCEL_REQUESTED),
    *(EventType.UPDATED, EventType.RETRIED),
}


def _detail(event: Any, *, called: bool) -> Iterator[str]:
    """Who carries an error and who an actor. `called`: a CANCELLED comes of a call."""
    detail = event.detail or {}
    by_a_client = event.type in _BY_A_CLIENT or (event.type == EventType.CANCELLED and called)
    for name, expected in (("error", event.type in _WITH_ERROR), ("actor", by_a_client)):
        if (name in detail) != expected:
            yield f"event {event.sequence}, {event.type}, has {'no' if expected else 'an'} {name}"


def _runs(events: Sequence[Any]) -> list[list[Any]]:
    """RETRIED begins another."""
    runs: list[list[Any]] = []
    for event in events:
        if not runs or event.type == EventType.RETRIED:
            runs.append([])
        runs[-1].append(event)
    return runs


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


def _failures(run: Sequence[Any]) -> list[dict[str, Any]]:
    failed = (event for event in run if event.type == EventType.ATTEMPT_FAILED)
    return [(e.detail or {}).get("error") or {"type": None, "retryable": None} for e in failed]


AMONG = "apart from others"  # in the error of one that was lost beside others


def _lost(errors: Sequence[dict[str, Any]]) -> int:
    return sum(error["type"] == "WORKER_LOST" for error in errors)


def _budget(max_attempts: int, run: Sequence[Any]) -> Iterator[str]:
    errors = _failures(run)
    failures, lost = len(errors), _lost(errors)
    if failures > max_attempts:
        yield f"used {failures} attempts of {max_attempts}"
    crashes = [error for error in errors if error["type"] == "WORKER_LOST"]
    # One that was not alone in its worker may go on, and nobody knows that of the last.
    if any(AMONG not in error["message"] for error in crashes[CRASHES_MAX - 1 : -1]):
        yield f"crashed {lost} times, {CRASHES_MAX} were allowed"
    if run[-1].type == EventType.FAILED and not _expired(run[-1]):
        used_up = failures >= max_attempts or lost >= CRASHES_MAX
        if not used_up and (not errors or errors[-1]["retryable"]):
            yield f"FAILED with {failures} of {max_attempts} attempts used"


def _expired(event: Any) -> bool:
    error = (event.detail or {}).get("error") or {}
    return bool(error.get("type") == "EXPIRED")


def _agreement(job: Any, events: Sequence[Any]) -> Iterator[str]:
    """The job's row against its events, and its columns against its state."""
    if not events:
        yield "has no events"
        return
    run = _runs(events)[-1]
    last, errors = run[-1], _failures(run)
    for column, told in (
        ("state", last.state),
        ("last_sequence", last.sequence),
        ("attempt", last.attempt),
        ("last_x", last.x),
        ("failures", len(errors)),
        ("crashes", _lost(errors)),
    ):
        if getattr(job, column) != told:
            yield f"{column} is {getattr(job, column)}, its events say {told}"
    if (EventType.CANCEL_REQUESTED in {e.type for e in run}) != (job.cancel_reason is not None):
        yield f"cancel_reason is {job.cancel_reason!r}, its events say otherwise"
    yield from _columns(job, last)


def _columns(job: Any, last: Any) -> Iterator[str]:
    """What must be set in its state, and what must not."""
    state = JobState(job.state)
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
    if job.error_type != (job.error or {}).get("type"):
        yield f"is found by the error type {job.error_type}, its error is {job.error}"
    if (job.held or job.held_for) and state is not JobState.QUEUED:
        yield f"is held in state {state}"


def _unique(rows: Sequence[Any], histories: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """No two jobs hold one key, unless one was running when the other came, and was left: for a
    REPLACE, or because while it ran it did not hold the key."""

    def may_stand_beside(later: Any, earlier: Any) -> bool:
        run = _runs(histories.get(earlier.id, ()))[-1:]
        started = any(event.type == EventType.STARTED for events in run for event in events)
        let = later.unique_on_conflict == "REPLACE" or earlier.unique_scope == "WAITING"
        return started and let

    holders: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows:
        runs = row.state == JobState.RUNNING and row.unique_scope == "ACTIVE"
        if row.unique_key is not None and (runs or row.state in WAITING_STATES):
            holders[row.job_type, row.unique_key].append(row)
    for held in holders.values():
        for one, two in itertools.combinations(held, 2):
            if not may_stand_beside(one, two) and not may_stand_beside(two, one):
                yield f"{one.id}: holds its unique key beside {two.id}"
