"""Schedules, and what is submitted at which tick; time passes as the tests say."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Effects, MissedTicks, NewJob, OnConflict, Overlap, Schedule, Unique
from jobsvc.core.states import JobState
from jobsvc.errors import (
    EtagMismatch,
    InvalidRequest,
    ScheduleExists,
    ScheduleUnknown,
    UniqueConflict,
    Violation,
)
from jobsvc.store import schedules as store
from jobsvc.store.database import Transaction
from jobsvc.store.schedules import NewJobOf, Outcome, Tick
from jobsvc.store.tables import jobs, schedules
from tests.store.house import DONE, WAIT_SECONDS_MAX, House, new_job, together, worker

START = datetime(2026, 6, 1, 12, 0, 30, tzinfo=UTC)
UNKNOWN = "no-such"


class Clockwork(House):
    """A house whose clock stands until it is moved, and the verbs of schedules."""

    def __init__(self, house: House) -> None:
        super().__init__(house.database, frozen=START)

    def create(self, schedule_id: str = "nightly", cron: str = "* * * * *", **fields: Any) -> str:
        asked = schedule(schedule_id, cron, **fields)
        return self.write(lambda tx: store.create(tx, asked)).schedule_id

    def schedule(self, schedule_id: str = "nightly") -> Schedule:
        return self.database.read(lambda c: store.get(c, schedule_id))

    def update(self, schedule_id: str = "nightly", etag: str = "", **changes: Any) -> Schedule:
        return self.write(lambda tx: store.update(tx, schedule_id, etag, changes))

    def trigger(self, schedule_id: str = "nightly") -> str:
        submitted, self.effects = self.write(lambda tx: store.trigger(tx, schedule_id, job_of))
        return submitted.job_id

    def tick(self, limit: int = 100, make: NewJobOf | None = None) -> list[Tick]:
        ticks, self.effects = self.write(lambda tx: store.tick(tx, limit, make or job_of))
        return ticks

    def tick_at(self, text: str) -> list[str]:
        """Moves the clock to a time of that day and answers the outcomes there, until nothing is
        due any more."""
        self.move_to(text)
        found = itertools.takewhile(bool, iter(self.tick, None))
        return [str(tick.outcome) for ticks in found for tick in ticks]

    def move_to(self, text: str) -> None:
        moment = datetime.fromisoformat(f"2026-06-01 {text}+00:00")
        self.elapsed = moment - START

    def set(self, schedule_id: str, **columns: Any) -> None:
        """Past all verbs."""
        statement = sa.update(schedules).where(schedules.c.id == schedule_id).values(columns)
        self.write(lambda tx: tx.execute(statement))

    def submitted(self) -> list[datetime]:
        """When each job was stored, in order."""
        statement = sa.select(jobs.c.create_time).order_by(jobs.c.create_time)
        return list(self.database.read(lambda c: c.execute(statement).scalars().all()))


def schedule(schedule_id: str, cron: str, **fields: Any) -> Schedule:
    values: dict[str, Any] = {
        "time_zone": "UTC",
        "request": b"demo",
        "paused": False,
        "missed_ticks": MissedTicks.SKIP,
        "overlap": Overlap.ALLOW,
    }
    return Schedule(schedule_id, cron, **(values | fields))


def job_of(schedule: Schedule) -> NewJob:
    """Its type is the request, its trace tells whose it is."""
    job_type = schedule.request.decode()
    return new_job(job_type, ttl=3600.0, trace_id=schedule.schedule_id, actor="schedule:x")


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-06-01 {text}+00:00")


@pytest.fixture
def clockwork(house: House) -> Clockwork:
    return Clockwork(house)


# Rows.


def test_a_schedule_is_kept_as_it_was_asked_for(clockwork: Clockwork) -> None:
    asked = schedule(
        "nightly", "30 2 * * *", time_zone="Asia/Kathmandu", request=b"\0\xff",
        missed_ticks=MissedTicks.RUN_ONCE, overlap=Overlap.SKIP,
    )  # fmt: skip
    stored = clockwork.write(lambda tx: store.create(tx, asked))
    assert stored == replace(asked, next_time=at("20:45"), revision=stored.revision)
    assert clockwork.schedule() == stored
    with pytest.raises(ScheduleExists):
        clockwork.create()


def test_unknown_schedules(clockwork: Clockwork) -> None:
    clockwork.create("other")
    for verb in (clockwork.schedule, clockwork.update, clockwork.trigger):
        with pytest.raises(ScheduleUnknown):
            verb(UNKNOWN)
    with pytest.raises(ScheduleUnknown):
        clockwork.write(lambda tx: store.delete(tx, UNKNOWN))


def test_pages_by_id(clockwork: Clockwork) -> None:
    for name in ("c", "a", "e", "b", "d"):
        clockwork.create(name, request=b"x" * 10)

    def page(after: str, limit: int, bytes_max: int = 1000) -> tuple[list[str], str]:
        found, last = clockwork.database.read(lambda c: store.list_page(c, after, limit, bytes_max))
        return [each.schedule_id for each in found], last

    assert page("", 3) == (["a", "b", "c"], "c")
    assert page("c", 3) == (["d", "e"], "")
    assert page("c", 2) == (["d", "e"], "")
    assert page("e", 2) == ([], "")
    assert page("", 3, 25) == (["a", "b"], "b")
    assert page("b", 3, 5) == (["c"], "c")  # one, however large


def test_an_update_sets_what_it_names(clockwork: Clockwork) -> None:
    clockwork.create()
    before = clockwork.schedule()
    after = clockwork.update(overlap=Overlap.SKIP, request=b"other")
    assert after == replace(
        before, overlap=Overlap.SKIP, request=b"other", revision=before.revision + 1
    )
    assert clockwork.schedule() == after


def test_an_etag_is_good_for_one_version(clockwork: Clockwork) -> None:
    clockwork.create()
    first = clockwork.schedule().etag
    second = clockwork.update(etag=first, paused=True).etag
    assert second != first
    for stale in (first, "nonsense"):
        with pytest.raises(EtagMismatch):
            clockwork.update(etag=stale, paused=False)
    assert clockwork.schedule().paused
    clockwork.update(etag=second, paused=False)


def test_an_etag_is_not_good_for_a_schedule_of_the_same_id(clockwork: Clockwork) -> None:
    clockwork.create()
    etag = clockwork.schedule().etag
    clockwork.write(lambda tx: store.delete(tx, "nightly"))
    clockwork.wait(1)
    clockwork.create()
    with pytest.raises(EtagMismatch):
        clockwork.update(etag=etag, paused=True)


def test_ticks_leave_the_etag(clockwork: Clockwork) -> None:
    clockwork.create()
    etag = clockwork.schedule().etag
    assert clockwork.tick_at("12:01:00") == ["submitted"]
    clockwork.trigger()
    clockwork.update(etag=etag, cron="0 * * * *")


# Ticks.


def test_a_tick_submits_a_job(clockwork: Clockwork) -> None:
    clockwork.announce(worker(), JobTypeInfo("demo", queue="mail", max_attempts=3, timeout=5.0))
    clockwork.create()
    assert clockwork.tick_at("12:00:59") == []
    clockwork.move_to("12:01:00.25")
    (tick,) = clockwork.tick()
    assert (tick.outcome, tick.time) == (Outcome.SUBMITTED, at("12:01"))
    after = clockwork.schedule()
    assert after == tick.schedule
    assert (after.last_time, after.next_time) == (at("12:01"), at("12:02"))
    assert after.last_job_id is not None
    job = clockwork.get(after.last_job_id)
    assert (job.queue, job.max_attempts, job.timeout) == ("mail", 3, 5.0)
    assert (job.create_time, job.expire_time) == (at("12:01:00.25"), at("13:01:00.25"))
    assert [event.actor for event in clockwork.events(job.job_id)] == ["schedule:x"]
    assert [dispatch.job_id for dispatch in clockwork.effects.dispatches] == [job.job_id]
    assert clockwork.tick() == []
    assert clockwork.effects == Effects()


def test_each_tick_submits_once(clockwork: Clockwork) -> None:
    clockwork.create("often", "* * * * *")
    clockwork.create("seldom", "*/3 * * * *")
    clockwork.create("never", "0 0 1 1 *")
    times = [f"12:{minute:02}:{second:02}" for minute in range(1, 7) for second in (0, 1, 30, 59)]
    found = [clockwork.tick_at(time) for time in times]
    assert [len(each) for each in found] == [1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0] * 2
    assert clockwork.schedule("never").last_time is None


def test_a_tick_that_is_late_by_less_than_a_minute_submits(clockwork: Clockwork) -> None:
    clockwork.create(cron="*/10 * * * *")
    assert clockwork.tick_at("12:10:59.9") == ["submitted"]
    assert clockwork.schedule().last_time == at("12:10")


def test_a_server_that_is_slow_leaves_no_tick_out(clockwork: Clockwork) -> None:
    clockwork.create()
    clockwork.move_to("12:02:00")
    assert clockwork.tick_at("12:01:59.9") == ["submitted"]
    assert clockwork.tick_at("12:03:30") == ["missed", "submitted"]
    assert clockwork.tick_at("12:04:55") == ["submitted"]
    assert clockwork.tick_at("12:05:50") == ["submitted"]
    assert clockwork.schedule().next_time == at("12:06")


def test_missed_ticks_are_left_out(clockwork: Clockwork) -> None:
    clockwork.create(cron="*/10 * * * *")
    assert clockwork.tick_at("14:05") == ["missed"]
    after = clockwork.schedule()
    assert (after.last_time, after.next_time) == (None, at("14:10"))
    assert (after.last_job_id, clockwork.submitted()) == (None, [])
    assert clockwork.tick_at("14:10") == ["submitted"]


def test_one_job_makes_up_for_all_missed_ticks(clockwork: Clockwork) -> None:
    clockwork.create(cron="*/10 * * * *", missed_ticks=MissedTicks.RUN_ONCE)
    assert clockwork.tick_at("14:05") == ["submitted"]
    after = clockwork.schedule()
    assert (after.last_time, after.next_time) == (at("14:00"), at("14:10"))
    assert clockwork.tick_at("14:09") == []
    # The last of these was not missed.
    assert clockwork.tick_at("15:00:30") == ["submitted", "submitted"]
    assert clockwork.schedule().last_time == at("15:00")
    assert clockwork.tick_at("15:11:00") == ["submitted"]
    assert clockwork.schedule().last_time == at("15:10")


def test_a_tick_is_left_out_while_the_last_job_is_active(clockwork: Clockwork) -> None:
    clockwork.create("skips", overlap=Overlap.SKIP)
    clockwork.create("allows", overlap=Overlap.ALLOW)
    assert clockwork.tick_at("12:01") == ["submitted", "submitted"]
    assert sorted(clockwork.tick_at("12:02")) == ["overlap", "submitted"]
    skips = clockwork.schedule("skips")
    assert (skips.last_time, skips.next_time) == (at("12:02"), at("12:03"))
    assert skips.last_job_id is not None
    claimed = clockwork.claim(skips.last_job_id)
    assert sorted(clockwork.tick_at("12:03")) == ["overlap", "submitted"]
    clockwork.finish(claimed, DONE)
    assert clockwork.tick_at("12:04") == ["submitted", "submitted"]
    last = clockwork.schedule("skips").last_job_id
    assert last is not None
    assert last != claimed.job_id
    clockwork.forget_job(last)
    assert clockwork.tick_at("12:05") == ["submitted", "submitted"]


def test_making_up_for_missed_ticks_can_be_left_out_too(clockwork: Clockwork) -> None:
    clockwork.create(overlap=Overlap.SKIP, missed_ticks=MissedTicks.RUN_ONCE)
    clockwork.trigger()
    assert clockwork.tick_at("13:30:30") == ["overlap", "overlap"]
    assert len(clockwork.submitted()) == 1


def test_a_paused_schedule_has_no_ticks_and_misses_none(clockwork: Clockwork) -> None:
    clockwork.create(paused=True, missed_ticks=MissedTicks.RUN_ONCE)
    assert clockwork.tick_at("13:00") == []
    clockwork.update(paused=False)
    assert clockwork.schedule().next_time == at("13:01")
    assert clockwork.tick_at("13:00:59") == []
    assert clockwork.tick_at("13:01") == ["submitted"]


def test_a_paused_schedule_tells_when_its_next_tick_would_be(clockwork: Clockwork) -> None:
    clockwork.create(cron="0 0 1 1 *", paused=True)
    clockwork.set("nightly", next_time=at("12:00"))
    shown = clockwork.schedule().next_time
    assert shown is not None
    assert shown > House(clockwork.database).now()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cron": "*/30 * * * *"}, "12:30"),
        ({"time_zone": "Asia/Kathmandu"}, "12:15"),
        ({"overlap": Overlap.SKIP, "cron": "0 * * * *"}, "13:00"),
        ({"request": b"other"}, "13:00"),
    ],
)
def test_another_cron_or_zone_goes_on_from_now(
    clockwork: Clockwork, changes: dict[str, Any], expected: str
) -> None:
    clockwork.create(cron="0 * * * *")
    assert clockwork.update(**changes).next_time == at(expected)


def test_an_update_loses_no_tick_that_is_due(clockwork: Clockwork) -> None:
    clockwork.create()
    clockwork.move_to("12:01:01")
    clockwork.update(cron="* * * * *", request=b"other")
    assert clockwork.tick_at("12:01:02") == ["submitted"]


def test_a_schedule_is_triggered_whatever_it_says(clockwork: Clockwork) -> None:
    clockwork.create(overlap=Overlap.SKIP, paused=True)
    first, second = clockwork.trigger(), clockwork.trigger()
    assert [d.job_id for d in clockwork.effects.dispatches] == [second]
    after = clockwork.schedule()
    assert (after.last_job_id, after.last_time) == (second, None)
    assert {clockwork.get(i).state for i in (first, second)} == {JobState.QUEUED}


def test_ticks_take_no_more_than_the_limit_the_longest_due_first(clockwork: Clockwork) -> None:
    for name, cron in (("c", "3 * * * *"), ("a", "1 * * * *"), ("b", "2 * * * *")):
        clockwork.create(name, cron, missed_ticks=MissedTicks.RUN_ONCE)
    clockwork.move_to("12:30")
    assert [t.schedule.schedule_id for t in clockwork.tick(limit=2)] == ["a", "b"]
    assert [t.schedule.schedule_id for t in clockwork.tick(limit=2)] == ["c"]


@pytest.mark.parametrize(
    ("zone", "day", "hourly"),
    [
        # Jumped over, two ticks come as one.
        ("Europe/Berlin", "2026-03-29", 15),
        ("Africa/Cairo", "2026-04-24", 15),
        ("Australia/Lord_Howe", "2026-10-04", 16),
        # Repeated, they come once.
        ("Europe/Berlin", "2026-10-25", 16),
        ("Australia/Lord_Howe", "2026-04-05", 16),
    ],
)
def test_nights_on_which_clocks_change(
    sqlite_house: House, zone: str, day: str, hourly: int
) -> None:
    """Four nights by a server that is late by up to a minute: each tick once, and in order."""
    clockwork = Clockwork(sqlite_house)
    midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    clockwork.frozen = start = (midnight - timedelta(days=1.5)).astimezone(UTC)
    clockwork.create("daily", "30 2 * * *", time_zone=zone)
    clockwork.create("hourly", "0 0-3 * * *", time_zone=zone)
    times: dict[str, list[datetime]] = {"daily": [], "hourly": []}
    soonest = sa.select(sa.func.min(schedules.c.next_time))
    while (due := clockwork.database.read(lambda c: c.execute(soonest).scalar_one())) < (
        start + timedelta(days=4)
    ):
        clockwork.elapsed = due - start + timedelta(seconds=random.uniform(0, 59))
        for tick in clockwork.tick():
            assert tick.outcome is Outcome.SUBMITTED
            times[tick.schedule.schedule_id].append(tick.time)
    for found in times.values():
        assert found == sorted(set(found))
    assert (len(times["daily"]), len(times["hourly"])) == (4, hourly)
    assert clockwork.count(jobs) == 4 + hourly


# What goes wrong.


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"cron": "61 * * * *"}, "Bad minute"),
        ({"time_zone": "Mars/Base"}, "No time zone found with key Mars/Base"),
        ({"request": b"\xff"}, "can't decode byte"),
        ({"request": b""}, "its request is not valid; TriggerSchedule says why"),
    ],
)
def test_a_broken_schedule_is_paused_and_stops_no_other(
    clockwork: Clockwork, columns: dict[str, Any], reason: str
) -> None:
    def make_checked(schedule: Schedule) -> NewJob:
        if not schedule.request:
            raise InvalidRequest([Violation("schedule.request.job_type", "is required")])
        return job_of(schedule)

    for name in ("a", "broken", "z"):
        clockwork.create(name)
    clockwork.set("broken", **columns)
    before = clockwork.schedule("broken")
    clockwork.move_to("12:01")
    found = {t.schedule.schedule_id: t for t in clockwork.tick(make=make_checked)}
    outcomes = {name: str(tick.outcome) for name, tick in found.items()}
    assert outcomes == {"a": "submitted", "broken": "broken", "z": "submitted"}
    assert reason in found["broken"].reason
    after = clockwork.schedule("broken")
    assert (after.paused, after.last_job_id) == (True, None)
    assert after.etag != before.etag
    assert clockwork.tick() == []
    # It can be read and mended.
    repaired = clockwork.update(
        "broken", cron="* * * * *", time_zone="UTC", request=b"demo", paused=False
    )
    assert repaired.next_time == at("12:02")
    assert len(clockwork.tick_at("12:02")) == 3


def test_another_zone_database_breaks_no_read(clockwork: Clockwork) -> None:
    clockwork.create(paused=True)
    clockwork.set("nightly", time_zone="Mars/Base")
    assert clockwork.schedule().next_time == at("12:01")
    assert clockwork.update(overlap=Overlap.SKIP).next_time == at("12:01")


def test_nothing_of_a_tick_is_left_when_it_is_not_committed(clockwork: Clockwork) -> None:
    clockwork.create()
    before = clockwork.schedule()
    clockwork.move_to("12:01")

    def die(tx: Transaction) -> None:
        assert [t.outcome for t in store.tick(tx, 10, job_of)[0]] == [Outcome.SUBMITTED]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        clockwork.write(die)
    assert (clockwork.schedule(), clockwork.count(jobs)) == (before, 0)
    assert clockwork.tick_at("12:01") == ["submitted"]


def test_servers_side_by_side_one_of_which_dies_again_and_again(clockwork: Clockwork) -> None:
    """Minute by minute each tick is taken once, by whichever of three comes first."""
    names = [f"s{n}" for n in range(8)]
    for name in names:
        clockwork.create(name)
    died = Counter[bool]()

    def serve(dies: bool) -> None:
        def body(tx: Transaction) -> int:
            taken = store.tick(tx, 3, job_of)[0]
            if taken and dies and random.random() < 0.5:
                died[True] += 1
                raise ConnectionError
            return len(taken)

        while True:
            try:
                if not clockwork.write(body):
                    return
            except ConnectionError:
                return

    minutes = 10
    for minute in range(1, minutes + 1):
        clockwork.move_to(f"12:{minute:02}:00")
        together(lambda: serve(False), lambda: serve(False), lambda: serve(True))
        serve(False)  # what the dead one held is free again
    stored = sa.select(jobs.c.trace_id, jobs.c.create_time)
    found = Counter(
        (row.trace_id, row.create_time)
        for row in clockwork.database.read(lambda c: c.execute(stored).all())
    )
    times = [at(f"12:{minute:02}") for minute in range(1, minutes + 1)]
    assert found == Counter(itertools.product(names, times))
    assert {clockwork.schedule(name).next_time for name in names} == {at("12:11")}


def test_a_schedule_that_somebody_holds_is_passed_over(pg_house: House) -> None:
    clockwork = Clockwork(pg_house)
    clockwork.create("free")
    clockwork.create("held")
    clockwork.move_to("12:01")

    held, done = threading.Event(), threading.Event()

    def holder() -> None:
        def body(tx: Transaction) -> None:
            store.update(tx, "held", "", {"overlap": Overlap.SKIP})
            held.set()
            assert done.wait(WAIT_SECONDS_MAX)

        clockwork.write(body)

    def ticker() -> list[str]:
        assert held.wait(WAIT_SECONDS_MAX)
        try:
            return [tick.schedule.schedule_id for tick in clockwork.tick()]
        finally:
            done.set()

    _, ticked = together(holder, ticker)
    assert ticked == ["free"]
    assert [tick.schedule.schedule_id for tick in clockwork.tick()] == ["held"]


# Unique keys.


def unique(on_conflict: OnConflict) -> NewJobOf:
    return lambda schedule: new_job(unique=Unique("k", on_conflict=on_conflict))


@pytest.mark.parametrize("way", [OnConflict.RETURN_EXISTING, OnConflict.REJECT])
def test_a_tick_passes_while_another_job_holds_the_unique_key(
    clockwork: Clockwork, way: OnConflict
) -> None:
    clockwork.create()
    holder = clockwork.submit(unique=Unique("k"))
    clockwork.move_to("12:01")
    (tick,) = clockwork.tick(make=unique(way))
    assert tick.outcome is Outcome.EXISTED
    after = clockwork.schedule()
    assert (after.last_job_id, after.last_time) == (holder, at("12:01"))
    assert after.next_time == at("12:02")
    assert clockwork.count(jobs) == 1
    clockwork.cancel(holder)
    clockwork.move_to("12:02")
    (tick,) = clockwork.tick(make=unique(way))
    assert tick.outcome is Outcome.SUBMITTED


def test_a_trigger_is_told_who_holds_the_unique_key(clockwork: Clockwork) -> None:
    clockwork.create()
    holder = clockwork.submit(unique=Unique("k"))

    def trigger(way: OnConflict) -> str:
        return clockwork.write(lambda tx: store.trigger(tx, "nightly", unique(way)))[0].job_id

    with pytest.raises(UniqueConflict):
        trigger(OnConflict.REJECT)
    assert clockwork.schedule().last_job_id is None
    assert trigger(OnConflict.RETURN_EXISTING) == holder
    assert clockwork.schedule().last_job_id == holder
