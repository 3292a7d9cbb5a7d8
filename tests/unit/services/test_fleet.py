from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from jobsvc.core.attempts import Log
from jobsvc.core.model import JobFilter
from jobsvc.core.states import JobState
from jobsvc.errors import (
    DatabaseUnavailable,
    Draining,
    LimitReached,
    ResumeTokenExpired,
    StreamExpired,
)
from jobsvc.services import fleet as module
from jobsvc.services.fleet import Beat, Fleet, Mark, Told
from jobsvc.store.database import Database
from jobsvc.store.reads.fleet import NO_JOB, page_after
from jobsvc.store.tables import service
from tests.store.house import DONE, FATAL, RETRYABLE, House

from .tap import Tap

NEVER = 3600.0
RESUME = timedelta(hours=24)
SOON = 0.02
SECONDS_MAX = 10.0
LINE = Log("INFO", "line")
ALL = JobFilter()

Stream = AsyncGenerator[Told | Beat, None]
Name = tuple[str, int]  # job id, sequence
MakeFleet = Callable[[float], Fleet]


@pytest.fixture
async def tap(database: Database) -> AsyncIterator[Tap]:
    made = Tap(database)
    yield made
    await asyncio.to_thread(made.close)


@pytest.fixture
async def make_fleet(
    tap: Tap, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MakeFleet]:
    """Fleets, each as if of a server of its own, by the longest time between two looks."""
    fleets: list[Fleet] = []
    monkeypatch.setattr(module, "LOOK_SECONDS_MAX", NEVER)

    def make(look_seconds: float) -> Fleet:
        fleets.append(Fleet(database, tap, look_seconds, RESUME))
        fleets[-1].start()
        return fleets[-1]

    yield make
    tap.open.set()
    for fleet in fleets:
        await fleet.stop()


@pytest.fixture
async def fleet(make_fleet: MakeFleet) -> Fleet:
    """One that hears of events by hints alone."""
    return make_fleet(NEVER)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_EVENTS", 4)
    monkeypatch.setattr(module, "WINDOW_EVENTS", 10)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.001)


async def following(stream: Stream) -> Told | Beat:
    async with asyncio.timeout(SECONDS_MAX):
        return await anext(stream)


async def begun(fleet: Fleet, wanted: JobFilter = ALL, **options: Any) -> Stream:
    """A stream that has had its first beat."""
    stream = fleet.watch(wanted, options.get("mark"), options.get("heartbeat", NEVER))
    assert isinstance(await following(stream), Beat)
    return stream


async def take(stream: Stream, count: int) -> list[Told]:
    """The next events."""
    told: list[Told] = []
    while len(told) < count:
        message = await following(stream)
        if isinstance(message, Told):
            told.append(message)
    return told


def name(told: Told) -> Name:
    return told.found.event.job_id, told.found.event.sequence


async def take_names(stream: Stream, count: int) -> list[Name]:
    return [name(told) for told in await take(stream, count)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


def value(metric: str) -> float:
    return REGISTRY.get_sample_value(metric) or 0.0


async def test_a_beat_at_once_and_then_what_happens_from_now_on(fleet: Fleet, house: House) -> None:
    old = house.start()
    stream = fleet.watch(ALL, None, NEVER)
    beat = await following(stream)
    assert isinstance(beat, Beat)
    assert abs((beat.time - datetime.now(UTC)).total_seconds()) < SECONDS_MAX
    new = house.submit()
    house.finish(old, DONE)
    fleet.notify()
    assert await take_names(stream, 2) == [(new, 1), (old.job_id, 3)]
    await stream.aclose()
    assert fleet.watcher_count == 0


async def test_all_get_the_same_objects_to_keep_the_wire_form_in(
    fleet: Fleet, house: House
) -> None:
    streams = [await begun(fleet) for _ in range(3)]
    house.submit()
    fleet.notify()
    first, *others = [(await take(stream, 1))[0] for stream in streams]
    assert all(other is first for other in others)


async def test_the_timer_alone_delivers_everything(make_fleet: MakeFleet, house: House) -> None:
    fleet = make_fleet(SOON)
    stream = await begun(fleet)
    for _ in range(5):
        job_id = house.submit()
        assert await take_names(stream, 1) == [(job_id, 1)]


FILTERS = [
    (ALL, "a1 a2 b1 b2 b3 a3 b4 b5 c1 a4 c2"),
    (JobFilter(states=frozenset({JobState.FAILED})), "b5"),
    (JobFilter(states=frozenset({JobState.QUEUED, JobState.RETRYING})), "a1 b1 a3 c1"),
    (JobFilter(error_types=frozenset({"TypeError"})), "b4 b5"),
    (JobFilter(error_types=frozenset({"ValueError", "CANCELLED"})), "a3 a4 c2"),
    (JobFilter(job_types=frozenset({"other", "third"})), "b1 b2 b3 b4 b5"),
    (JobFilter(queue="slow"), "c1 c2"),
    (JobFilter(labels={"team": "x"}), "a1 a2 b1 b2 b3 a3 b4 b5 a4"),
    (JobFilter(labels={"team": "x", "env": "prod"}), "b1 b2 b3 b4 b5"),
    (JobFilter(idempotency_key="key"), "c1 c2"),
    (JobFilter(job_types=frozenset({"other"}), states=frozenset({JobState.QUEUED})), "b1"),
    (JobFilter(queue="none"), ""),
]


def three_jobs(house: House) -> dict[str, str]:
    """Their short names by their ids."""
    a = house.start(labels={"team": "x"})
    b = house.start(job_type="other", labels={"team": "x", "env": "prod"})
    house.report(b, LINE)
    house.finish(a, RETRYABLE)
    house.finish(b, FATAL)
    c = house.submit(queue="slow", idempotency_key="key")
    house.cancel(a.job_id)
    house.cancel(c)
    return {a.job_id: "a", b.job_id: "b", c: "c"}


def matching(house: House, wanted: JobFilter, short: dict[str, str]) -> str:
    matches = module.matcher(wanted)
    page = house.database.read(lambda c: page_after(c, (0, NO_JOB, 0), 100))
    found = [f.event for f in page.events if matches(f)]
    return " ".join(f"{short[event.job_id]}{event.sequence}" for event in found)


@pytest.mark.parametrize(("wanted", "expected"), FILTERS, ids=range(len(FILTERS)))
def test_filters(house: House, wanted: JobFilter, expected: str) -> None:
    assert matching(house, wanted, three_jobs(house)) == expected


def test_times_are_from_inclusive_to_exclusive(house: House) -> None:
    first, second = house.start(), house.submit()
    house.finish(first, DONE)
    short = {first.job_id: "a", second: "b"}
    made = house.get(second).create_time
    ended = house.get(first.job_id).finish_time
    assert ended is not None
    for wanted, expected in (
        (JobFilter(create_time_after=made), "b1"),
        (JobFilter(create_time_before=made), "a1 a2 a3"),
        (JobFilter(create_time_after=made, create_time_before=made), ""),
        (JobFilter(finish_time_after=ended), "a1 a2 a3"),
        (JobFilter(finish_time_after=ended + timedelta(microseconds=1)), ""),
        (JobFilter(finish_time_before=ended), ""),
        (JobFilter(finish_time_before=ended + timedelta(microseconds=1)), "a1 a2 a3"),
    ):
        assert matching(house, wanted, short) == expected


async def test_the_mark_moves_past_what_the_filter_hides(fleet: Fleet, house: House) -> None:
    rare = await begun(fleet, JobFilter(job_types=frozenset({"rare"})), heartbeat=0.05)
    first = await following(rare)
    for _ in range(25):
        house.submit()
    fleet.notify()
    beat = await following(rare)
    while beat.mark.position[0] < first.mark.position[0] + 25:
        assert isinstance(beat, Beat)
        beat = await following(rare)
    again = await begun(fleet, mark=beat.mark)
    job_id = house.submit(job_type="rare")
    fleet.notify()
    assert await take_names(again, 1) == [(job_id, 1)]
    assert await take_names(rare, 1) == [(job_id, 1)]


async def record(fleet: Fleet, house: House, chance: random.Random) -> list[Told | Beat]:
    """What a watcher of all is told while much happens."""
    stream = fleet.watch(ALL, None, 0.01)
    running = [house.start() for _ in range(2)]
    recorded = [await following(stream)]
    count = 0
    for _ in range(8):
        house.report(chance.choice(running), *[LINE] * (lines := chance.randint(1, 9)))
        count += lines
        if chance.random() < 0.7:
            fleet.notify()
            while chance.random() < 0.8 and sum(isinstance(m, Told) for m in recorded) < count:
                recorded.append(await following(stream))
    fleet.notify()
    while sum(isinstance(m, Told) for m in recorded) < count:
        recorded.append(await following(stream))
    recorded.append(await following(stream))
    await stream.aclose()
    return recorded


@pytest.mark.parametrize("seed", range(3))
async def test_from_every_mark_exactly_the_rest_on_any_server(
    make_fleet: MakeFleet, house: House, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    recorded = await record(make_fleet(NEVER), house, chance)
    names = [name(m) for m in recorded if isinstance(m, Told)]
    assert len(names) == len(set(names)) > 20
    other = make_fleet(NEVER)
    keeper = await begun(other)  # so that its window stays
    last = house.submit()
    other.notify()
    await take(keeper, 1)
    monkeypatch.setattr(module, "PAGE_EVENTS", chance.choice([1, 3, 50]))
    told = 0
    tried = set()
    for message in recorded:
        told += isinstance(message, Told)
        if message.mark.position in tried:
            continue
        tried.add(message.mark.position)
        stream = await begun(other, mark=message.mark)
        rest = [*names[told:], (last, 1)]
        assert await take_names(stream, len(rest)) == rest
        await stream.aclose()


async def test_whoever_does_not_read_falls_out_of_the_window_and_misses_nothing(
    fleet: Fleet, house: House
) -> None:
    slow, fast = await begun(fleet), await begun(fleet)
    claimed = house.start()
    fleet.notify()
    assert await take_names(slow, 1) == [(claimed.job_id, 1)]  # and then it reads no more
    seen = await take_names(fast, 2)
    for _ in range(15):
        house.report(claimed, LINE, LINE, LINE)
        fleet.notify()
        seen += await take_names(fast, 3)
        assert fleet._window is not None
        assert len(fleet._window._told) <= module.WINDOW_EVENTS
    assert seen == [(claimed.job_id, n) for n in range(1, 48)]
    assert await take_names(slow, 46) == seen[1:]
    house.report(claimed, LINE)
    fleet.notify()
    assert await take_names(slow, 1) == await take_names(fast, 1) == [(claimed.job_id, 48)]


async def test_whoever_is_behind_is_read_for_ahead_of_what_it_takes(
    fleet: Fleet, house: House, tap: Tap
) -> None:
    """One page and no more; and all that it wants of it is prepared in a thread."""
    mark = (await _first(fleet)).mark
    await until(lambda: fleet.latest is None)
    claimed = house.start()
    house.report(claimed, *[LINE] * 20)
    keeper = await begun(fleet)
    prepared: list[tuple[int, str]] = []

    def prepare(told: Told) -> None:
        prepared.append((told.found.sequence, threading.current_thread().name))

    wanted = JobFilter(states=frozenset({JobState.RUNNING}))
    stream = fleet.watch(wanted, mark, NEVER, prepare)
    assert isinstance(await following(stream), Beat)
    assert await take_names(stream, 1) == [(claimed.job_id, 2)]
    await until(lambda: len(prepared) >= 7)
    reads = tap.reads
    await asyncio.sleep(0.05)
    assert tap.reads == reads
    in_threads = [sequence for sequence, thread in prepared if thread.startswith("db")]
    assert in_threads == [2, 3, 4, 5, 6, 7, 8]
    await stream.aclose()
    await keeper.aclose()


async def test_the_window_has_a_limit_of_bytes_too(
    fleet: Fleet, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 20_000)
    stream = await begun(fleet)
    claimed = house.start()
    house.report(claimed, *[Log("INFO", "x" * 8_000)] * 7)
    fleet.notify()
    assert await take_names(stream, 9) == [(claimed.job_id, n) for n in range(1, 10)]
    assert fleet._window is not None
    assert len(fleet._window._told) == 2


async def test_whoever_was_told_of_old_events_gets_a_fresh_mark(
    fleet: Fleet, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRESH", timedelta(microseconds=1))
    keeper, first = await begun(fleet), await _first(fleet)
    house.submit()
    fleet.notify()
    (old,) = await take(keeper, 1)
    await _first(fleet)  # has made the reader look again
    stream = await begun(fleet, mark=first.mark)
    assert await take(stream, 1) == [old]
    beat = await following(stream)
    assert isinstance(beat, Beat)
    assert beat.mark.time > old.mark.time


async def test_beats_come_when_nothing_is_told(fleet: Fleet, house: House) -> None:
    stream = fleet.watch(ALL, None, 0.2)
    first = await following(stream)
    began = asyncio.get_running_loop().time()
    second = await following(stream)
    assert isinstance(first, Beat)
    assert isinstance(second, Beat)
    assert asyncio.get_running_loop().time() - began >= 0.15
    await asyncio.sleep(0.1)
    house.submit()
    fleet.notify()
    assert isinstance(await following(stream), Told)
    began = asyncio.get_running_loop().time()
    assert isinstance(await following(stream), Beat)
    assert asyncio.get_running_loop().time() - began >= 0.15
    await stream.aclose()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"time": -timedelta(hours=24, minutes=1)}, "more than 24h old"),
        ({"incarnation": str(uuid4())}, "restored"),
        ({"position": 1}, "restored"),
    ],
)
async def test_marks_that_are_good_no_more(
    fleet: Fleet, house: House, change: dict[str, Any], why: str
) -> None:
    """The last: of a database that has got further than this one."""
    house.submit()
    mark = (await _first(fleet)).mark
    time = mark.time + change.get("time", timedelta())
    x = mark.position[0] + change.get("position", 0)
    bad = Mark(change.get("incarnation", mark.incarnation), time, (x, *mark.position[1:]))
    with pytest.raises(ResumeTokenExpired, match=why):
        await following(fleet.watch(ALL, bad, NEVER))
    assert fleet.watcher_count == 0
    almost = mark._replace(time=mark.time - timedelta(hours=23, minutes=59, seconds=59))
    await begun(fleet, mark=almost)


async def _first(fleet: Fleet) -> Beat:
    stream = fleet.watch(ALL, None, NEVER)
    beat = await following(stream)
    assert isinstance(beat, Beat)
    await stream.aclose()
    return beat


async def test_whoever_falls_further_behind_than_a_mark_is_good_is_told_so(
    fleet: Fleet, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = await begun(fleet), await begun(fleet)
    claimed = house.start()
    house.report(claimed, *[LINE] * 20)
    fleet.notify()
    await take(slow, 1)
    await take(fast, 22)
    monkeypatch.setattr(module, "LATE", timedelta(microseconds=1) - RESUME)
    with pytest.raises(ResumeTokenExpired, match="more than 24h old"):
        await take(slow, 21)


async def test_a_restored_database_ends_every_watch(fleet: Fleet, house: House) -> None:
    streams = [await begun(fleet) for _ in range(2)]
    waiting = [asyncio.create_task(following(stream)) for stream in streams]
    house.write(
        lambda tx: tx.execute(sa.update(service).values(incarnation=str(uuid4()), x_base=0))
    )
    fleet.notify()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [ResumeTokenExpired] * 2
    stream = await begun(fleet)
    job_id = house.submit()
    fleet.notify()
    assert await take_names(stream, 1) == [(job_id, 1)]


async def test_a_deleted_job_is_no_trouble(fleet: Fleet, house: House) -> None:
    slow, fast = await begun(fleet), await begun(fleet)
    gone, kept = house.start(), house.start()
    house.report(gone, *[LINE] * 4)
    fleet.notify()
    assert await take_names(slow, 2) == [(gone.job_id, 1), (gone.job_id, 2)]
    await take(fast, 8)
    house.forget_job(gone.job_id)
    house.report(kept, *[LINE] * 12)
    fleet.notify()
    await take(fast, 12)
    assert await take_names(slow, 14) == [(kept.job_id, n) for n in range(1, 15)]


async def test_the_database_away(fleet: Fleet, house: House, tap: Tap) -> None:
    stream = await begun(fleet, heartbeat=0.05)
    tap.away = True
    with pytest.raises(DatabaseUnavailable):
        await following(fleet.watch(ALL, None, NEVER))
    assert isinstance(await following(stream), Beat)
    job_id = house.submit()
    tap.away = False
    fleet.notify()
    assert await take_names(stream, 1) == [(job_id, 1)]
    await stream.aclose()


async def test_a_bug_does_not_end_the_reader(fleet: Fleet, house: House, tap: Tap) -> None:
    stream = await begun(fleet)

    def fail() -> None:
        tap.then = lambda: None
        raise LookupError

    tap.then = fail
    job_id = house.submit()
    fleet.notify()
    await until(lambda: tap.then is not fail)
    fleet.notify()
    assert await take_names(stream, 1) == [(job_id, 1)]


async def test_draining_ends_every_watch_and_takes_no_more(
    fleet: Fleet, house: House, tap: Tap
) -> None:
    idle, busy = await begun(fleet), await begun(fleet)
    house.report(house.start(), *[LINE] * 5)
    fleet.notify()
    await take(busy, 1)
    waiting = [asyncio.create_task(take(stream, 100)) for stream in (idle, busy)]
    tap.open.clear()
    waiting.append(asyncio.create_task(take(fleet.watch(ALL, None, NEVER), 1)))
    await tap.kept.wait()
    fleet.drain()
    async with asyncio.timeout(SECONDS_MAX):
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [Draining] * 3
    with pytest.raises(Draining):
        await following(fleet.watch(ALL, None, NEVER))
    assert fleet.watcher_count == 0


async def test_no_more_watchers_than_the_limit(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WATCHERS_MAX", 2)
    first, _second = await begun(fleet), await begun(fleet)
    with pytest.raises(LimitReached):
        await following(fleet.watch(ALL, None, NEVER))
    assert value("jobsvc_fleet_watchers") == 2
    await first.aclose()
    await begun(fleet)


async def test_a_watch_ends_with_its_age(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_AGE_SECONDS", 0.1)
    stream = await begun(fleet)
    with pytest.raises(StreamExpired):
        await following(stream)


async def test_nobody_is_read_for_when_nobody_watches(
    make_fleet: MakeFleet, house: House, tap: Tap
) -> None:
    fleet = make_fleet(SOON)
    stream = await begun(fleet)
    await until(lambda: tap.reads > 3)  # the timer runs
    await stream.aclose()
    await until(lambda: fleet.latest is None)
    reads = tap.reads
    house.submit()
    fleet.notify()
    await asyncio.sleep(5 * SOON)
    assert tap.reads == reads
    job_id = house.submit()
    stream = await begun(fleet)
    house.cancel(job_id)
    assert await take_names(stream, 1) == [(job_id, 2)]


async def test_what_is_behind_is_made_ready_off_the_event_loop_and_in_turns(
    fleet: Fleet, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who is in the window, too: the reader itself was behind."""
    turns: list[None] = []
    prepared: list[bool] = []

    async def turn() -> None:
        turns.append(None)

    def prepare(told: Told) -> None:
        if not told.wire:
            told.wire = b"ready"
            prepared.append(threading.current_thread() is threading.main_thread())

    monkeypatch.setattr(fleet._pace, "turn", turn)
    monkeypatch.setattr(module, "LIVE", timedelta(seconds=-NEVER))
    stream = fleet.watch(ALL, None, NEVER, prepare)
    assert isinstance(await following(stream), Beat)
    house.report(house.start(), *[LINE] * 6)  # two full pages
    fleet.notify()
    assert len(await take(stream, 8)) == 8
    assert prepared == [False] * 8
    assert len(turns) == 2


async def test_a_mark_keeps_the_time_while_something_is_hidden(house: House) -> None:
    """What is hidden is as old as its commit: the mark's life counts from before that."""
    page = house.page_after(None)
    before = Mark(page.incarnation, page.now - timedelta(minutes=5), page.end)
    hidden = replace(page, latest=page.bound)
    assert module._tell(hidden, before)[1].time == before.time
    assert module._tell(page, before)[1].time == page.now


async def test_the_lag_of_what_is_told_live_is_measured(fleet: Fleet, house: House) -> None:
    stream = await begun(fleet)
    count = value("jobsvc_fleet_lag_seconds_count")
    house.submit()
    fleet.notify()
    await take(stream, 1)
    assert value("jobsvc_fleet_lag_seconds_count") == count + 1


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_comes_in_between(
    make_fleet: MakeFleet, house: House, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchers that come, go, dawdle and resume on either of two servers see each event once."""
    chance = random.Random(seed)
    fleets = [make_fleet(SOON), make_fleet(0.1)]
    running = [house.start() for _ in range(3)]
    begin = (await _first(fleets[0])).mark
    total = 60

    async def read() -> list[Name]:
        seen: list[Name] = []
        mark = begin
        while len(seen) < total:
            stream = chance.choice(fleets).watch(ALL, mark, 0.05)
            async with aclosing(stream):
                async for message in stream:
                    mark = message.mark
                    if isinstance(message, Told):
                        seen.append(name(message))
                    if chance.random() < 0.2:
                        await asyncio.sleep(chance.uniform(0, 0.02))
                    if len(seen) == total or chance.random() < 0.1:
                        break
        return seen

    tasks = [asyncio.create_task(read()) for _ in range(5)]
    left = total
    while left:
        lines = min(left, chance.randint(1, 5))
        house.report(chance.choice(running), *[LINE] * lines)
        left -= lines
        if chance.random() < 0.5:
            chance.choice(fleets).notify()
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
    async with asyncio.timeout(SECONDS_MAX):
        seen = await asyncio.gather(*tasks)
    page = house.database.read(lambda c: page_after(c, begin.position, 1000))
    expected = [(found.event.job_id, found.event.sequence) for found in page.events]
    assert seen == [expected] * 5
