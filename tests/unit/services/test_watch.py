from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing

import pytest

from jobsvc.core.attempts import Log, Output
from jobsvc.core.model import Change, JobEvent
from jobsvc.errors import (
    DatabaseUnavailable,
    Draining,
    JobUnknown,
    LimitReached,
    SequenceOutOfRange,
    StreamExpired,
)
from jobsvc.services import mailboxes, watch
from jobsvc.services.watch import Heartbeat, WatchHub
from jobsvc.store.database import Database
from tests.store.house import DONE, House, new_id

from .tap import Tap

NEVER = 3600.0
SOON = 0.02
SECONDS_MAX = 10.0
LINE = Log("INFO", "line")

Stream = AsyncGenerator[JobEvent | Heartbeat, None]
MakeHub = Callable[[float], WatchHub]


@pytest.fixture
async def tap(database: Database) -> AsyncIterator[Tap]:
    made = Tap(database)
    yield made
    await asyncio.to_thread(made.close)


@pytest.fixture
async def make_hub(tap: Tap) -> AsyncIterator[MakeHub]:
    """Hubs by the interval of their sweep."""
    hubs: list[WatchHub] = []

    def make(sweep_interval: float) -> WatchHub:
        hubs.append(WatchHub(tap, sweep_interval))
        hubs[-1].start()
        return hubs[-1]

    yield make
    tap.open.set()
    for hub in hubs:
        await hub.stop()


@pytest.fixture
async def hub(make_hub: MakeHub) -> WatchHub:
    """One that hears of changes by hints alone."""
    return make_hub(NEVER)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAGE_EVENTS", 4)
    monkeypatch.setattr(watch, "RETRY_SECONDS", 0.02)


def job_with(house: House, events: int, *, ended: bool = True) -> str:
    """A job with so many events (3 or more if it has ended)."""
    claimed = house.start()
    if lines := events - 2 - ended:
        house.report(claimed, *[LINE] * lines)
    if ended:
        house.finish(claimed, DONE)
    assert house.get(claimed.job_id).last_sequence == events
    return claimed.job_id


async def collect(stream: Stream) -> list[int]:
    """The sequences up to the stream's end."""
    async with asyncio.timeout(SECONDS_MAX), aclosing(stream):
        return [m.sequence async for m in stream if isinstance(m, JobEvent)]


async def following(stream: Stream) -> JobEvent | Heartbeat:
    async with asyncio.timeout(SECONDS_MAX):
        return await anext(stream)


async def next_event(stream: Stream) -> int:
    while isinstance(message := await following(stream), Heartbeat):
        pass
    return message.sequence


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


def assert_empty(hub: WatchHub) -> None:
    assert hub.watcher_count == 0
    assert not hub._watchers
    assert not hub._unread


async def test_replays_and_then_follows(hub: WatchHub, house: House) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    assert [await following(stream) for _ in range(2)] == house.events(claimed.job_id)
    house.report(claimed, LINE, LINE)
    hub.notify(house.effects.changes)
    assert [await next_event(stream), await next_event(stream)] == [3, 4]
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert await collect(stream) == [5]
    assert_empty(hub)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12, 13])
async def test_history_of_any_length_ends_after_its_terminal_event(
    hub: WatchHub, house: House, count: int
) -> None:
    """Whole pages too: what follows the last full one is nothing."""
    job_id = job_with(house, count)
    assert await collect(hub.watch(job_id, 0, NEVER)) == list(range(1, count + 1))
    assert await collect(hub.watch(job_id, count - 1, NEVER)) == [count]


@pytest.mark.parametrize("count", [3, 4, 8])
async def test_ends_at_once_where_the_terminal_event_was_seen(
    hub: WatchHub, house: House, count: int
) -> None:
    job_id = job_with(house, count)
    async with asyncio.timeout(SECONDS_MAX):
        assert [m async for m in hub.watch(job_id, count, NEVER)] == []


@pytest.mark.parametrize("ended", [True, False])
async def test_beyond_the_last_event(hub: WatchHub, house: House, ended: bool) -> None:
    job_id = job_with(house, 5, ended=ended)
    with pytest.raises(SequenceOutOfRange) as raised:
        await following(hub.watch(job_id, 6, NEVER))
    assert (raised.value.oldest, raised.value.last) == (1, 5)
    assert_empty(hub)


async def test_unknown_job(hub: WatchHub) -> None:
    with pytest.raises(JobUnknown):
        await following(hub.watch(new_id(), 0, NEVER))
    assert_empty(hub)


async def test_whoever_comes_while_others_are_looked_up_is_looked_up_too(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    ended = job_with(house, 3)
    running = job_with(house, 2, ended=False)
    tap.open.clear()
    first = asyncio.create_task(collect(hub.watch(ended, 0, NEVER)))
    await tap.kept.wait()
    late = [
        asyncio.create_task(following(hub.watch(new_id(), 0, NEVER))),
        asyncio.create_task(following(hub.watch(running, 3, NEVER))),
        asyncio.create_task(collect(hub.watch(ended, 3, NEVER))),
    ]
    await until(lambda: hub.watcher_count == 4)
    tap.open.set()
    async with asyncio.timeout(SECONDS_MAX):
        unknown, beyond, seen = await asyncio.gather(*late, return_exceptions=True)
    assert isinstance(unknown, JobUnknown)
    assert isinstance(beyond, SequenceOutOfRange)
    assert seen == []
    assert await first == [1, 2, 3]


async def test_more_watchers_at_once_than_one_lookup_takes(
    hub: WatchHub, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HEADS_MAX", 2)
    ended = job_with(house, 3)
    unknown = [asyncio.create_task(following(hub.watch(new_id(), 0, NEVER))) for _ in range(5)]
    known = [asyncio.create_task(collect(hub.watch(ended, 3, NEVER))) for _ in range(5)]
    async with asyncio.timeout(SECONDS_MAX):
        found = await asyncio.gather(*unknown, return_exceptions=True)
        assert [type(error) for error in found] == [JobUnknown] * 5
        assert await asyncio.gather(*known) == [[]] * 5


async def test_heartbeat_at_once_with_nothing_to_replay_and_then_on_time(
    hub: WatchHub, house: House
) -> None:
    claimed = house.start()
    began = asyncio.get_running_loop().time()
    stream = hub.watch(claimed.job_id, 2, 0.2)
    first = await following(stream)
    assert isinstance(first, Heartbeat)
    assert first.last_sequence == 2
    assert asyncio.get_running_loop().time() - began < 0.15
    second = await following(stream)
    assert isinstance(second, Heartbeat)
    assert 0.19 <= asyncio.get_running_loop().time() - began < 1.0
    assert (second.time - first.time).total_seconds() >= 0.15
    house.report(claimed, LINE)
    hub.notify(house.effects.changes)
    assert await next_event(stream) == 3
    third = await following(stream)
    assert isinstance(third, Heartbeat)
    assert third.last_sequence == 3
    await stream.aclose()


async def test_no_heartbeat_before_a_replay(hub: WatchHub, house: House) -> None:
    """Its interval begins with the last event."""
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 1, 0.1)
    began = asyncio.get_running_loop().time()
    event = await following(stream)
    assert isinstance(event, JobEvent)
    beat = await following(stream)
    assert isinstance(beat, Heartbeat)
    assert beat.last_sequence == 2
    assert asyncio.get_running_loop().time() - began >= 0.09
    await stream.aclose()


async def test_the_sweep_alone_delivers_everything(make_hub: MakeHub, house: House) -> None:
    hub = make_hub(SOON)
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    seen = [await next_event(stream) for _ in range(2)]
    for _ in range(5):
        house.report(claimed, LINE)
        seen.append(await next_event(stream))
    house.finish(claimed, DONE)
    assert seen + await collect(stream) == list(range(1, 9))


async def test_hints_lost_repeated_and_out_of_order(hub: WatchHub, house: House) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    seen = [await next_event(stream), await next_event(stream)]
    for line in range(6):
        house.report(claimed, LINE)
        if line % 3:  # the first of three is lost
            late = [Change(claimed.job_id, n) for n in (line + 3, line, line + 3, 1, line + 2)]
            hub.notify(late)
            hub.notify(late)
    while len(seen) < 8:
        seen.append(await next_event(stream))
    hub.notify([Change(claimed.job_id, 99)])  # of an event that a rollback took back
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert seen + await collect(stream) == list(range(1, 10))


async def test_watchers_of_one_job_at_different_places(hub: WatchHub, house: House) -> None:
    claimed = house.start()
    house.report(claimed, *[LINE] * 9)
    places = [0, 3, 3, 4, 7, 11]
    streams = [hub.watch(claimed.job_id, place, NEVER) for place in places]
    tasks = [asyncio.create_task(collect(stream)) for stream in streams]
    await until(lambda: hub.watcher_count == len(places))
    house.report(claimed, LINE, LINE)
    hub.notify(house.effects.changes)
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert await asyncio.gather(*tasks) == [list(range(place + 1, 15)) for place in places]
    assert_empty(hub)


async def test_whoever_does_not_read_holds_nobody_up_and_costs_one_page(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    slow = hub.watch(claimed.job_id, 0, NEVER)
    assert await next_event(slow) == 1  # and then it reads no more
    (watcher,) = hub._watchers[claimed.job_id]
    fast = hub.watch(claimed.job_id, 0, NEVER)
    seen = [await next_event(fast) for _ in range(2)]
    for _ in range(20):
        house.report(claimed, LINE, LINE, LINE)
        hub.notify(house.effects.changes)
        seen += [await next_event(fast) for _ in range(3)]
        assert len(watcher.events) <= watch.PAGE_EVENTS
    assert seen == list(range(1, 63))
    await asyncio.sleep(5 * watch.GATHER_SECONDS)
    reads = tap.reads
    await asyncio.sleep(5 * watch.GATHER_SECONDS)
    assert tap.reads == reads, "the hub keeps reading for somebody who does not take"
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert await collect(slow) == list(range(2, 64))
    assert await collect(fast) == [63]


async def test_a_mailbox_that_was_emptied_is_read_again(
    hub: WatchHub, house: House, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of room. Nothing is read for a watcher that does not take."""
    monkeypatch.setattr(mailboxes, "BYTES_MAX", 9_000)
    monkeypatch.setattr(mailboxes, "TAKE_BYTES", 1_000)
    claimed = house.start()
    house.report(claimed, *[Output(text="x" * 1_000)] * 10)
    slow = [hub.watch(claimed.job_id, after, NEVER) for after in range(2, 8)]
    seen = [[await next_event(stream)] for stream in slow]
    assert hub._mailboxes._held <= 9_000
    reads = tap.reads
    for _ in range(3):
        hub.notify([Change(claimed.job_id, 99)])
        await asyncio.sleep(5 * watch.GATHER_SECONDS)
    assert tap.reads <= reads + 1
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    for after, (stream, first) in enumerate(zip(slow, seen, strict=True), start=2):
        assert first + await collect(stream) == list(range(after + 1, 14))
    assert hub._mailboxes._held == 0
    assert_empty(hub)


async def test_a_page_that_was_not_taken_is_not_overwritten(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    house.report(claimed, *[LINE] * 10)
    stream = hub.watch(claimed.job_id, 0, NEVER)
    assert await next_event(stream) == 1
    (watcher,) = hub._watchers[claimed.job_id]
    seen = [1]
    for _ in range(4):
        # Hinted while its mailbox is full, while it is being read for, and when it has emptied it.
        hub.notify([Change(claimed.job_id, 12)])
        await until(lambda: bool(watcher.events) or watcher.up_to_date)
        tap.open.clear()
        hub.notify([Change(claimed.job_id, 12)])
        await asyncio.sleep(3 * watch.GATHER_SECONDS)
        tap.open.set()
        hub.notify([Change(claimed.job_id, 12)])
        seen += [await next_event(stream) for _ in range(2)]
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert seen + await collect(stream) == list(range(1, 14))


async def test_a_hint_during_the_read_that_misses_its_event(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    assert [await next_event(stream), await next_event(stream)] == [1, 2]
    house.report(claimed, LINE)
    tap.open.clear()
    hub.notify(house.effects.changes)
    waiting = asyncio.create_task(next_event(stream))
    await tap.kept.wait()
    house.report(claimed, LINE)  # after the read, before its answer is looked at
    hub.notify(house.effects.changes)
    await asyncio.sleep(0)
    tap.open.set()
    assert await waiting == 3
    assert await next_event(stream) == 4
    await stream.aclose()


async def test_a_hint_while_the_job_is_looked_up(hub: WatchHub, house: House, tap: Tap) -> None:
    claimed = house.start()
    tap.open.clear()
    waiting = asyncio.create_task(next_event(hub.watch(claimed.job_id, 2, NEVER)))
    await tap.kept.wait()
    house.report(claimed, LINE)
    hub.notify(house.effects.changes)
    await asyncio.sleep(0)
    tap.open.set()
    assert await waiting == 3


async def test_whoever_is_alone_waits_for_nobody(
    hub: WatchHub, house: House, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first event is one read, and each that is hinted is read at once."""
    monkeypatch.setattr(watch, "GATHER_SECONDS", NEVER)
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 1, NEVER)
    assert await next_event(stream) == 2
    assert tap.reads == 1
    for sequence in (3, 4, 5):
        house.report(claimed, LINE)
        hub.notify(house.effects.changes)
        assert await next_event(stream) == sequence
    await stream.aclose()


async def test_after_a_crowd_hints_gather(
    hub: WatchHub, house: House, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GATHER_SECONDS", 0.2)
    claimed = house.start()
    streams = [hub.watch(claimed.job_id, 1, NEVER) for _ in range(watch.CROWD)]
    waiting = asyncio.gather(*map(next_event, streams))
    assert await waiting == [2] * watch.CROWD
    began = tap.reads
    for _ in range(3):
        house.report(claimed, LINE)
        hub.notify(house.effects.changes)
        await asyncio.sleep(0)
    assert [await next_event(streams[0]) for _ in range(3)] == [3, 4, 5]
    assert tap.reads == began + 1
    for stream in streams:
        await stream.aclose()


async def test_busy_watchers_do_not_starve_the_others(
    hub: WatchHub, house: House, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads go round, whoever is hinted again meanwhile."""
    monkeypatch.setattr(watch, "READ_CURSORS", 1)
    busy = [job_with(house, 2, ended=False) for _ in range(3)]
    quiet = [job_with(house, 2, ended=False) for _ in range(20)]
    streams = [hub.watch(job_id, 2, NEVER) for job_id in (*busy, *quiet)]
    for stream in streams:
        assert isinstance(await following(stream), Heartbeat)
    tasks = [asyncio.create_task(following(stream)) for stream in streams]
    await asyncio.sleep(0)
    again = [Change(job_id, 3) for job_id in busy]  # of events that are yet to come
    tap.then = lambda: hub._mark(again)
    hub._mark(again)
    for job_id in quiet:
        house.cancel(job_id)
    hub._mark([Change(job_id, 3) for job_id in quiet])
    began = tap.reads
    async with asyncio.timeout(SECONDS_MAX):
        await asyncio.gather(*tasks[len(busy) :])
    assert tap.reads - began <= 2 * len(tasks)
    tap.then = lambda: None
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_draining_ends_every_watch_and_takes_no_more(hub: WatchHub, house: House) -> None:
    job_id = job_with(house, 2, ended=False)
    streams = [hub.watch(job_id, place, NEVER) for place in (0, 1, 2)]
    for stream in streams:
        await following(stream)
    tasks = [asyncio.create_task(collect(stream)) for stream in streams]
    await asyncio.sleep(0)
    hub.drain()
    async with asyncio.timeout(SECONDS_MAX):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [Draining] * 3
    with pytest.raises(Draining):
        await following(hub.watch(job_id, 0, NEVER))
    assert_empty(hub)


async def read_while_busy(hub: WatchHub, house: House, stop: Callable[[], None]) -> None:
    """Watches a job that always has something new by the time its watcher asks; calls `stop` in
    the middle."""
    claimed = house.start()
    async for message in hub.watch(claimed.job_id, 0, NEVER):
        assert isinstance(message, JobEvent)
        if message.sequence == 5:
            stop()
        house.report(claimed, LINE)
        hub.notify(house.effects.changes)
        (watcher,) = hub._watchers[claimed.job_id]
        for _ in range(100):  # while this one is being written, the next page arrives
            await asyncio.sleep(0.002)
            if watcher.events:
                break


async def test_draining_ends_a_busy_watch(hub: WatchHub, house: House) -> None:
    with pytest.raises(Draining):
        await asyncio.wait_for(read_while_busy(hub, house, hub.drain), SECONDS_MAX)


async def test_age_ends_a_watch(
    hub: WatchHub, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STREAM_AGE_SECONDS", 0.1)
    job_id = job_with(house, 2, ended=False)
    with pytest.raises(StreamExpired):
        await collect(hub.watch(job_id, 0, NEVER))
    assert_empty(hub)


async def test_age_ends_a_busy_watch(
    hub: WatchHub, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STREAM_AGE_SECONDS", 0.1)
    with pytest.raises(StreamExpired):
        await asyncio.wait_for(read_while_busy(hub, house, lambda: None), SECONDS_MAX)


async def test_ages_differ(hub: WatchHub, house: House) -> None:
    """All streams of a server that came at once must not come back at once."""
    job_id = job_with(house, 2, ended=False)
    streams = [hub.watch(job_id, 0, NEVER) for _ in range(20)]
    for stream in streams:
        await following(stream)
    now = asyncio.get_running_loop().time()
    ages = sorted(w.expires_at - now for w in hub._watchers[job_id])
    assert 0.9 * 1800 - 10 <= ages[0] < ages[-1] - 1
    assert ages[-1] <= 1.1 * 1800
    for stream in streams:
        await stream.aclose()


async def test_database_away(hub: WatchHub, house: House, tap: Tap) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    assert [await next_event(stream), await next_event(stream)] == [1, 2]
    waiting = asyncio.create_task(next_event(stream))
    tap.away = True
    house.report(claimed, LINE)
    hub.notify(house.effects.changes)
    reads = tap.reads
    await until(lambda: tap.reads > reads)
    with pytest.raises(DatabaseUnavailable):
        await following(hub.watch(claimed.job_id, 0, NEVER))
    assert not waiting.done()
    tap.away = False
    assert await waiting == 3
    await stream.aclose()
    assert_empty(hub)


async def test_database_away_during_a_sweep(make_hub: MakeHub, house: House, tap: Tap) -> None:
    hub = make_hub(SOON)
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 2, NEVER)
    assert isinstance(await following(stream), Heartbeat)
    tap.away = True
    reads = tap.reads
    await until(lambda: tap.reads > reads + 1)
    tap.away = False
    house.report(claimed, LINE)
    assert await next_event(stream) == 3
    await stream.aclose()


async def test_a_fault_of_ours_ends_no_reading(
    hub: WatchHub, house: House, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job_with(house, 3)

    def fail() -> None:
        monkeypatch.setattr(tap, "then", lambda: None)
        raise ZeroDivisionError

    tap.then = fail
    with pytest.raises(DatabaseUnavailable):
        await collect(hub.watch(job_id, 0, NEVER))
    assert await collect(hub.watch(job_id, 0, NEVER)) == [1, 2, 3]


async def test_job_deleted_under_its_watchers(make_hub: MakeHub, house: House) -> None:
    hub = make_hub(SOON)
    gone, stays = house.start().job_id, house.start()
    streams = [hub.watch(gone, 0, NEVER), hub.watch(gone, 2, NEVER)]
    other = hub.watch(stays.job_id, 1, NEVER)
    for stream in (*streams, other):
        await following(stream)
    house.forget_job(gone)
    for stream in streams:
        with pytest.raises(JobUnknown):
            await collect(stream)
    house.finish(stays, DONE)
    assert await collect(other) == [3]
    assert_empty(hub)


async def test_leaving_in_the_middle_of_anything_leaves_nothing(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    house.report(claimed, *[LINE] * 10)
    idle = hub.watch(claimed.job_id, 12, NEVER)
    await following(idle)
    unfinished = hub.watch(claimed.job_id, 0, NEVER)
    await following(unfinished)
    tap.open.clear()
    looked_up = asyncio.create_task(following(hub.watch(claimed.job_id, 1, NEVER)))
    await tap.kept.wait()
    waiting = asyncio.create_task(following(idle))
    await asyncio.sleep(0)
    for task in (looked_up, waiting):
        task.cancel()
    await asyncio.gather(looked_up, waiting, return_exceptions=True)
    await unfinished.aclose()
    tap.open.set()
    await asyncio.sleep(3 * watch.GATHER_SECONDS)
    assert_empty(hub)
    assert len(await collect_some(hub.watch(claimed.job_id, 0, NEVER), 12)) == 12


async def collect_some(stream: Stream, count: int) -> list[int]:
    async with aclosing(stream):
        return [await next_event(stream) for _ in range(count)]


async def test_a_failed_read_does_not_bring_back_who_has_left(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 2, NEVER)
    await following(stream)
    house.report(claimed, LINE)
    tap.open.clear()
    hub.notify(house.effects.changes)
    await tap.kept.wait()

    def fail() -> None:
        raise DatabaseUnavailable

    await stream.aclose()
    tap.then = fail
    tap.open.set()
    await asyncio.sleep(3 * watch.GATHER_SECONDS)
    assert_empty(hub)


async def test_limit_of_watchers(
    hub: WatchHub, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCHERS_MAX", 2)
    job_id = job_with(house, 2, ended=False)
    streams = [hub.watch(job_id, 0, NEVER) for _ in range(3)]
    await following(streams[0])
    await following(streams[1])
    with pytest.raises(LimitReached):
        await following(streams[2])
    await streams[0].aclose()
    again = hub.watch(job_id, 0, NEVER)
    assert await next_event(again) == 1
    await again.aclose()
    await streams[1].aclose()


async def test_hints_of_jobs_that_nobody_watches_cost_nothing(hub: WatchHub, tap: Tap) -> None:
    hub.notify(Change(new_id(), n) for n in range(1000))
    await asyncio.sleep(3 * watch.GATHER_SECONDS)
    assert tap.reads == 0
    assert_empty(hub)


async def test_a_watcher_that_has_all_there_is_costs_no_reads(
    hub: WatchHub, house: House, tap: Tap
) -> None:
    claimed = house.start()
    stream = hub.watch(claimed.job_id, 0, NEVER)
    assert [await next_event(stream), await next_event(stream)] == [1, 2]
    waiting = asyncio.create_task(next_event(stream))
    house.report(claimed, LINE)
    hub.notify(house.effects.changes)
    assert await waiting == 3
    waiting = asyncio.create_task(next_event(stream))
    await asyncio.sleep(3 * watch.GATHER_SECONDS)
    reads = tap.reads
    hub.notify([Change(claimed.job_id, 3), Change(claimed.job_id, 2)])  # it has those
    await asyncio.sleep(3 * watch.GATHER_SECONDS)
    assert tap.reads == reads
    house.finish(claimed, DONE)
    hub.notify(house.effects.changes)
    assert await waiting == 4
    await stream.aclose()


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_commits_hints_and_reads(
    make_hub: MakeHub, house: House, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens in between, each watcher sees what follows its place, once and in order."""
    chance = random.Random(seed)
    monkeypatch.setattr(watch, "PAGE_EVENTS", chance.choice([1, 2, 3, 5]))
    monkeypatch.setattr(watch, "READ_CURSORS", chance.choice([1, 2, 25]))
    monkeypatch.setattr(watch, "GATHER_SECONDS", 0.0)
    hub = make_hub(chance.choice([0.03, 0.1]))
    running = [house.start() for _ in range(3)]
    told: list[Change] = []
    watching: list[tuple[str, int, asyncio.Task[list[int]]]] = []

    async def read(job_id: str, after: int) -> list[int]:
        seen = []
        async with aclosing(hub.watch(job_id, after, 0.05)) as stream:
            async for message in stream:
                if isinstance(message, JobEvent):
                    seen.append(message.sequence)
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.uniform(0, 0.01))
        return seen

    def enter() -> None:
        job_id = chance.choice(ids)
        after = chance.randint(0, house.get(job_id).last_sequence)
        watching.append((job_id, after, asyncio.create_task(read(job_id, after))))

    def hint(changes: Iterable[Change]) -> None:
        told.extend(changes)
        chance.shuffle(told)
        hub.notify(told[: chance.randint(0, 3)])

    ids = [claimed.job_id for claimed in running]
    for _ in range(25):
        if chance.random() < 0.3:
            enter()
        house.report(chance.choice(running), *[LINE] * chance.randint(1, 7))
        hint(house.effects.changes)
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
    for claimed in running:
        house.finish(claimed, DONE)
        hint(house.effects.changes)
    async with asyncio.timeout(SECONDS_MAX):
        for job_id, after, task in watching:
            assert await task == list(range(after + 1, house.get(job_id).last_sequence + 1))
    assert_empty(hub)
