"""Schedules: their rows, and the tick that submits what is due.

A schedule's job is stored in the transaction that moves its `next_time` on, under the row's lock:
each tick is taken once, by whichever server comes first, or again if that one dies before it has
committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from jobsvc import cron
from jobsvc.core.model import Effects, MissedTicks, NewJob, Overlap, Schedule
from jobsvc.errors import EtagMismatch, InvalidRequest, ScheduleExists, ScheduleUnknown
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.dialects.statements import insert_or_ignore, update_many
from jobsvc.store.reads.lookups import heads
from jobsvc.store.registry import load_types
from jobsvc.store.tables import EPOCH, MICROSECOND, schedules
from jobsvc.store.verbs.submitting import Answer, Submitted, submit

# How late a tick may come: long enough for a restart or a failover. What is later was missed.
GRACE = timedelta(seconds=60)

# Makes the job that a schedule submits. Raises InvalidRequest where its request is no good.
NewJobOf = Callable[[Schedule], NewJob]


class Outcome(StrEnum):
    """What became of a tick."""

    SUBMITTED = "submitted"
    # Another job holds the request's unique key.
    EXISTED = "existed"
    # Left out: the last job is active.
    OVERLAP = "overlap"
    # Left out, with all that were missed after it.
    MISSED = "missed"
    # The schedule cannot be read. It is paused now, and submitted nothing.
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Tick:
    """`schedule`: as it is after it. `time`: which tick; of those that were missed the last, or
    the first if they are left out."""

    schedule: Schedule
    time: datetime
    outcome: Outcome
    job: NewJob | None = None
    reason: str = ""


def create(tx: Transaction, schedule: Schedule) -> Schedule:
    """As it was stored. Raises ScheduleExists."""
    stored = replace(
        schedule,
        next_time=cron.next_time(schedule.cron, schedule.time_zone, tx.now),
        # So that an etag of a deleted schedule is good for none that has its id later.
        revision=(tx.now - EPOCH) // MICROSECOND,
    )
    if tx.execute(insert_or_ignore(tx.connection, schedules, "id"), _row(stored)).rowcount == 0:
        raise ScheduleExists(schedule.schedule_id)
    return stored


def get(connection: sa.Connection, schedule_id: str) -> Schedule:
    """Raises ScheduleUnknown."""
    found = _read(connection, sa.select(schedules).where(schedules.c.id == schedule_id))
    if not found:
        raise ScheduleUnknown(schedule_id)
    return found[0]


def list_page(
    connection: sa.Connection, after: str, limit: int, bytes_max: int
) -> tuple[list[Schedule], str]:
    """Up to `limit` of those whose ids follow `after`, by id, with at most so many bytes of
    requests (or one); and the last id of the page, empty if it is the last page."""
    following = connection.execute(
        sa.select(schedules.c.id, sa.func.length(schedules.c.request).label("bytes"))
        .where(schedules.c.id > after)
        .order_by(schedules.c.id)
        .limit(limit + 1)
    ).all()
    page: list[str] = []
    for row in following[:limit]:
        bytes_max -= row.bytes
        if bytes_max < 0 and page:
            break
        page.append(row.id)
    if not page:
        return [], ""
    chosen = sa.select(schedules).where(schedules.c.id.in_(page)).order_by(schedules.c.id)
    return _read(connection, chosen), page[-1] if len(page) < len(following) else ""


def update(tx: Transaction, schedule_id: str, etag: str, changes: Mapping[str, Any]) -> Schedule:
    """Sets the fields of `changes`. An empty etag is not checked. Raises ScheduleUnknown and
    EtagMismatch."""
    old = _lock(tx, schedule_id)
    if etag and etag != old.etag:
        raise EtagMismatch(schedule_id)
    new = replace(old, **changes, revision=old.revision + 1)
    if (new.cron, new.time_zone) != (old.cron, old.time_zone) or old.paused or new.paused:
        new = replace(new, next_time=_upcoming(new, tx.now))
    tx.execute(sa.update(schedules).where(schedules.c.id == schedule_id).values(_row(new)))
    return new


def delete(tx: Transaction, schedule_id: str) -> None:
    """Raises ScheduleUnknown."""
    if tx.execute(sa.delete(schedules).where(schedules.c.id == schedule_id)).rowcount == 0:
        raise ScheduleUnknown(schedule_id)


def trigger(tx: Transaction, schedule_id: str, new_job: NewJobOf) -> tuple[Submitted, Effects]:
    """One job of the schedule now. Raises ScheduleUnknown, what `new_job` raises, and
    UniqueConflict where the request's unique key says so."""
    job = new_job(_lock(tx, schedule_id))
    (answer,), effects = submit(tx, [job], load_types(tx.connection))
    if not isinstance(answer, Submitted):
        raise answer
    statement = sa.update(schedules).where(schedules.c.id == schedule_id)
    tx.execute(statement.values(last_job_id=answer.job_id))
    return answer, effects


def tick(tx: Transaction, limit: int, new_job: NewJobOf) -> tuple[list[Tick], Effects]:
    """One tick of each schedule that is due, of `limit` at most, passing over those that somebody
    else holds."""
    due = [
        _from_row(row)
        for row in tx.execute(
            sa.select(schedules)
            .where(sa.not_(schedules.c.paused), schedules.c.next_time <= tx.now)
            .order_by(schedules.c.next_time)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    ]
    if not due:
        return [], Effects()
    active = _active(tx, due)
    ticks = [_judge(schedule, tx.now, active, new_job) for schedule in due]
    jobs = [each.job for each in ticks if each.job is not None]
    answers, effects = submit(tx, jobs, load_types(tx.connection)) if jobs else ([], Effects())
    answered = dict(zip((job.job_id for job in jobs), answers, strict=True))
    ticks = [each if each.job is None else _told(each, answered[each.job.job_id]) for each in ticks]
    update_many(tx.connection, schedules, (), [_moved(each.schedule) for each in ticks])
    return ticks, effects


def _judge(schedule: Schedule, now: datetime, active: frozenset[str], new_job: NewJobOf) -> Tick:
    assert schedule.next_time is not None
    due = schedule.next_time
    missed = due <= now - GRACE
    try:
        following = cron.next_time(
            schedule.cron, schedule.time_zone, now - GRACE if missed else due
        )
        moved = replace(schedule, next_time=following)
        if missed and schedule.missed_ticks is MissedTicks.SKIP:
            return Tick(moved, due, Outcome.MISSED)
        if missed:
            due = max(due, cron.previous_time(schedule.cron, schedule.time_zone, following))
        moved = replace(moved, last_time=due)
        if schedule.overlap is Overlap.SKIP and schedule.last_job_id in active:
            return Tick(moved, due, Outcome.OVERLAP)
        return Tick(moved, due, Outcome.SUBMITTED, new_job(schedule))
    except ValueError as error:
        reason = str(error)
    except InvalidRequest:
        # Its message may name members of payloads, which are not for the log.
        reason = "its request is not valid; TriggerSchedule says why"
    paused = replace(schedule, paused=True, revision=schedule.revision + 1)
    return Tick(paused, due, Outcome.BROKEN, reason=reason)


def _active(tx: Transaction, due: Sequence[Schedule]) -> frozenset[str]:
    """The last jobs, where they matter, that have not ended."""
    ids = [s.last_job_id for s in due if s.overlap is Overlap.SKIP and s.last_job_id]
    if not ids:
        return frozenset()
    found = heads(tx.connection, ids)
    return frozenset(job_id for job_id, (_, state) in found.items() if not state.terminal)


def _told(tick: Tick, answer: Answer) -> Tick:
    new = isinstance(answer, Submitted) and not answer.already_existed
    return replace(
        tick,
        schedule=replace(tick.schedule, last_job_id=answer.job_id),
        outcome=Outcome.SUBMITTED if new else Outcome.EXISTED,
    )


def _lock(tx: Transaction, schedule_id: str) -> Schedule:
    statement = sa.select(schedules).where(schedules.c.id == schedule_id).with_for_update()
    row = tx.execute(statement).first()
    if row is None:
        raise ScheduleUnknown(schedule_id)
    return _from_row(row)


def _read(connection: sa.Connection, statement: sa.Select[Any]) -> list[Schedule]:
    """Nobody moves the next time of a paused schedule; it is shown as it would be."""
    found = [_from_row(row) for row in connection.execute(statement)]
    if any(each.paused for each in found):
        now = clock(connection)
        found = [replace(s, next_time=_upcoming(s, now)) if s.paused else s for s in found]
    return found


def _upcoming(schedule: Schedule, now: datetime) -> datetime | None:
    """The next tick; of a schedule that cannot be read, what was known of it."""
    try:
        return cron.next_time(schedule.cron, schedule.time_zone, now)
    except ValueError:
        return schedule.next_time


def _from_row(row: sa.Row[Any]) -> Schedule:
    return Schedule(
        schedule_id=row.id,
        cron=row.cron,
        time_zone=row.time_zone,
        request=row.request,
        paused=row.paused,
        missed_ticks=MissedTicks(row.missed_ticks),
        overlap=Overlap(row.overlap),
        next_time=row.next_time,
        last_time=row.last_time,
        last_job_id=row.last_job_id,
        revision=row.revision,
    )


def _row(schedule: Schedule) -> dict[str, Any]:
    return _moved(schedule) | {
        "cron": schedule.cron,
        "time_zone": schedule.time_zone,
        "request": schedule.request,
        "missed_ticks": schedule.missed_ticks,
        "overlap": schedule.overlap,
    }


def _moved(schedule: Schedule) -> dict[str, Any]:
    """What a tick changes, by id."""
    return {
        "id": schedule.schedule_id,
        "next_time": schedule.next_time,
        "last_time": schedule.last_time,
        "last_job_id": schedule.last_job_id,
        "paused": schedule.paused,
        "revision": schedule.revision,
    }
