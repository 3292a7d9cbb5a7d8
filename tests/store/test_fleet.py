"""The one order of all events, as whoever watches all jobs reads it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Log
from jobsvc.core.model import JobFilter
from jobsvc.errors import Draining, ResumeTokenExpired
from jobsvc.services import fleet as services
from jobsvc.services.fleet import Beat, Fleet, Told
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import schema, verbs
from jobsvc.store.database import Transaction
from jobsvc.store.hot import watching
from jobsvc.store.locking import lock
from jobsvc.store.reads.fleet import NO_JOB, Page, Position
from jobsvc.store.tables import job_events, service
from jobsvc.store.verbs import submit
from tests.services import PostgresNode, machine_bin, wheel_bin
from tests.store.conftest import open_database
from tests.store.house import (
    DONE,
    RETRYABLE,
    WAIT_SECONDS_MAX,
    House,
    new_job,
    wait_until_blocked,
)

LINE = Log("INFO", "line")
Name = tuple[str, int]  # job id, sequence


def names(read: Page) -> list[Name]:
    return [(found.event.job_id, found.event.sequence) for found in read.events]


def stored(house: House) -> set[Name]:
    statement = sa.select(job_events.c.job_id, job_events.c.sequence)
    return {(r.job_id, r.sequence) for r in house.database.read(lambda c: c.execute(statement))}


def read_on(
    house: House, position: Position, limit: int, *, hidden: bool = False
) -> tuple[list[Name], Position]:
    """By pages, until there is no more."""
    seen: list[Name] = []
    while True:
        read = house.page_after(position, limit, hidden=hidden)
        seen += names(read)
        if len(read.events) < limit:
            return seen, read.end
        position = read.events[-1].position


class Held:
    """A transaction that stands still in its middle until it is let go."""

    def __init__(self, house: House, first: Callable[[Transaction], Any]) -> None:
        self._inside, self._go = threading.Event(), threading.Event()
        self.then: Callable[[Transaction], Any] = lambda tx: None
        self._pool = ThreadPoolExecutor(1)

        def body(tx: Transaction) -> None:
            first(tx)
            self._inside.set()
            assert self._go.wait(WAIT_SECONDS_MAX)
            self.then(tx)

        self._done: Future[None] = self._pool.submit(house.database.write, body)
        assert self._inside.wait(WAIT_SECONDS_MAX)

    def go(self) -> None:
        self._go.set()

    def commit(self) -> None:
        self._go.set()
        self._done.result(WAIT_SECONDS_MAX)

    def close(self) -> None:
        self._go.set()
        self._pool.shutdown()


@contextmanager
def held(house: House, first: Callable[[Transaction], Any]) -> Iterator[Held]:
    made = Held(house, first)
    try:
        yield made
    finally:
        made.close()


def test_from_now_on_is_what_commits_from_now_on(house: House) -> None:
    old = house.start()
    begin = house.page_after(None)
    assert begin.events == []
    new = house.submit(labels={"a": "b"}, idempotency_key="k")
    house.finish(old, DONE)
    read = house.page_after(begin.end)
    assert names(read) == [(new, 1), (old.job_id, 3)]
    assert [f.event for f in read.events] == [house.events(new)[0], house.events(old.job_id)[2]]
    submitted, succeeded = read.events
    assert (submitted.job_type, submitted.queue) == ("demo", "default")
    assert (submitted.labels, submitted.idempotency_key) == ({"a": "b"}, "k")
    assert submitted.create_time == house.get(new).create_time
    assert (submitted.finish_time, succeeded.finish_time) == (
        None,
        house.get(old.job_id).finish_time,
    )
    assert not read.hidden
    assert read.at_home
    assert names(house.page_after(read.end)) == []


@pytest.mark.parametrize("seed", range(2))
def test_from_every_position_exactly_the_rest_whatever_the_pages(house: House, seed: int) -> None:
    chance = random.Random(seed)
    begin = house.page_after(None).end
    running = []
    for _ in range(6):
        house.submit_all([new_job() for _ in range(chance.randint(1, 5))])
        if chance.random() < 0.6:
            running.append(house.start())
        for claimed in chance.sample(running, len(running) // 2):
            house.report(claimed, *[LINE] * chance.randint(1, 4))
        if running and chance.random() < 0.4:
            house.finish(running.pop(), DONE if chance.random() < 0.5 else RETRYABLE)
    whole = house.page_after(begin)
    assert set(names(whole)) == stored(house)
    assert len(names(whole)) == len(set(names(whole)))
    for job_id, _ in names(whole):
        sequences = [sequence for name, sequence in names(whole) if name == job_id]
        assert sequences == sorted(sequences)
    for count, found in enumerate(whole.events, start=1):
        limit = chance.choice([3, 7, 1000])
        rest, end = read_on(house, found.position, limit)
        assert rest == names(whole)[count:]
        assert end == whole.end
    for count, found in enumerate(whole.events):  # before all that have this x
        if not count or whole.events[count - 1].position[0] < found.position[0]:
            rest, _ = read_on(house, (found.position[0], NO_JOB, 0), 5)
            assert rest == names(whole)[count:]


def test_a_deleted_job_takes_its_events_along(house: House) -> None:
    begin = house.page_after(None).end
    first, gone, last = house.submit(), house.submit(), house.submit()
    (at,) = (f.position for f in house.page_after(begin).events if f.event.job_id == gone)
    house.forget_job(gone)
    assert names(house.page_after(begin)) == [(first, 1), (last, 1)]
    assert names(house.page_after(at)) == [(last, 1)]


def test_whoever_began_first_and_commits_last_is_not_passed_over(pg_house: House) -> None:
    house = pg_house
    begin = house.page_after(None).end
    late, early = new_job(), new_job()
    with held(house, lambda tx: tx.x) as slow:
        slow.then = lambda tx: submit(tx, [late], {})
        house.submit_all([early])
        read = house.page_after(begin, hidden=True)
        assert names(read) == []
        assert read.hidden
        now = house.page_after(None, hidden=True).end
        slow.commit()
    for position in (begin, read.end, now):
        after = house.page_after(position)
        assert names(after) == [(late.job_id, 1), (early.job_id, 1)]


def test_events_of_a_job_stay_in_order_when_a_later_number_writes_first(pg_house: House) -> None:
    """One takes its number, and then has to wait for the row that another, of a later number, has
    locked: it writes the third event under a lower number than the second."""
    house = pg_house
    begin = house.page_after(None).end
    claimed = house.start()
    numbers = {}

    def report(tx: Transaction, who: str) -> None:
        numbers[who] = tx.x
        reports = {claimed.job_id: (claimed.token, [Log("INFO", who)])}
        assert verbs.report(tx, reports)[0]

    with held(house, lambda tx: tx.x) as first:
        first.then = lambda tx: report(tx, "first")
        with held(house, lambda tx: (tx.x, lock(tx, [claimed.job_id]))) as second:
            second.then = lambda tx: report(tx, "second")
            first.go()
            wait_until_blocked(house)
            second.commit()
            first.commit()
    assert numbers["first"] < numbers["second"]
    read = house.page_after(begin)
    assert [found.event.sequence for found in read.events] == [1, 2, 3, 4]
    said = [f.event.report for f in read.events if isinstance(f.event.report, Log)]
    assert [line.message for line in said] == ["second", "first"]


def test_an_idle_writer_holds_back_whoever_watches_all_and_nobody_else(pg_house: House) -> None:
    house = pg_house
    begin = house.page_after(None).end
    with held(house, lambda tx: tx.x) as idle:
        claimed = house.start()
        house.finish(claimed, DONE)
        assert names(house.page_after(begin, hidden=True)) == []
        watched = watching.events_after(house.database, [(claimed.job_id, 0)], 10)
        assert [e.sequence for e in watched[claimed.job_id, 0]] == [1, 2, 3]
        idle.commit()
    assert [sequence for _, sequence in names(house.page_after(begin))] == [1, 2, 3]


def test_what_a_rollback_took_back_is_never_told(pg_house: House) -> None:
    house = pg_house
    begin = house.page_after(None).end
    kept = new_job()
    with held(house, lambda tx: submit(tx, [new_job()], {})) as failing:
        house.submit_all([kept])
        assert names(house.page_after(begin, hidden=True)) == []

        def fail(_: Transaction) -> None:
            raise ValueError("failed on purpose")

        failing.then = fail
        with pytest.raises(ValueError, match="failed on purpose"):
            failing.commit()
    assert names(house.page_after(begin)) == [(kept.job_id, 1)]


@pytest.mark.parametrize("binaries", [machine_bin, wheel_bin])
def test_a_crash_of_the_database_hides_nothing_that_comes_after_it(
    binaries: Callable[[], Path | None],
) -> None:
    """It gives numbers anew that were taken before by what left nothing on its disk."""
    found = binaries()
    assert found is not None
    with PostgresNode(found) as node:
        database = open_database(node.url)
        house = House(database)
        house.submit()
        begin = house.page_after(None).end
        house.submit()
        for _ in range(20):
            with pytest.raises(ZeroDivisionError):
                house.write(lambda tx: tx.x // 0)
        read = house.page_after(begin)
        node.kill()
        node.start()
        job_id = house.submit()
        schema.require(database)
        after = house.page_after(read.end)
        database.close()
    assert len(read.events) == 1
    assert names(after) == [(job_id, 1)]
    assert after.incarnation == read.incarnation


@pytest.mark.parametrize("seed", range(2))
def test_a_reader_beside_many_writers_misses_nothing(pg_house: House, seed: int) -> None:
    """Whatever the interleaving: read while they write, every event once."""
    house = pg_house
    claimed = house.claim_all([house.submit() for _ in range(4)])
    position = house.page_after(None).end
    before = stored(house)
    stop = threading.Event()
    seen: list[Name] = []

    def write(number: int) -> None:
        chance = random.Random(100 * seed + number)
        for _ in range(25):
            some = chance.sample(claimed, chance.randint(1, 3))
            reports = {c.job_id: (c.token, [LINE] * chance.randint(1, 2)) for c in some}
            house.database.write(lambda tx, given=reports: verbs.report(tx, given))  # type: ignore[misc]

    def read() -> None:
        nonlocal position
        while not stop.is_set():
            more, position = read_on(house, position, 3, hidden=True)
            seen.extend(more)

    with ThreadPoolExecutor(6) as pool:
        reading = pool.submit(read)
        for writing in [pool.submit(write, n) for n in range(5)]:
            writing.result(WAIT_SECONDS_MAX)
        stop.set()
        reading.result(WAIT_SECONDS_MAX)
    seen += read_on(house, position, 1000)[0]
    assert len(seen) == len(set(seen))
    assert set(seen) == stored(house) - before
    for job_id in {name for name, _ in seen}:
        sequences = [sequence for name, sequence in seen if name == job_id]
        assert sequences == sorted(sequences)


# The reader of a server, where transactions overlap.


@pytest.fixture
async def server(pg_house: House, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """It looks by itself only while something is hidden."""
    monkeypatch.setattr(services, "LOOK_SECONDS_MAX", 3600.0)
    threads = AsyncDatabase(pg_house.database, 4)
    made = Fleet(pg_house.database, threads, 3600.0, timedelta(hours=24))
    made.start()
    yield made
    await made.stop()
    threads.close()


async def told(stream: AsyncGenerator[Told | Beat, None]) -> Name | None:
    """The next event; None for a beat."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        message = await anext(stream)
    if isinstance(message, Beat):
        return None
    return message.found.event.job_id, message.found.event.sequence


async def test_it_looks_again_while_something_is_hidden(server: Fleet, pg_house: House) -> None:
    house = pg_house
    stream = server.watch(JobFilter(), None, 3600.0)
    assert await told(stream) is None
    with held(house, lambda tx: tx.x) as slow:
        job_id = house.submit()
        server.notify()
        waiting = asyncio.create_task(told(stream))
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not server.held_seconds:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        assert not waiting.done()
        slow.commit()
    assert await waiting == (job_id, 1)  # without another hint


async def test_from_now_on_is_not_what_was_hidden_when_it_began(
    server: Fleet, pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "BEGIN_SECONDS_MAX", WAIT_SECONDS_MAX)
    house = pg_house
    late = new_job()
    with held(house, lambda tx: submit(tx, [late], {})) as slow:
        house.submit()
        stream = server.watch(JobFilter(), None, 3600.0)
        beginning = asyncio.create_task(told(stream))
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not server.held_seconds:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        assert not beginning.done()
        slow.commit()
    assert await beginning is None
    job_id = house.submit()
    server.notify()
    assert await told(stream) == (job_id, 1)


async def test_draining_ends_who_is_waiting_to_begin(
    server: Fleet, pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "BEGIN_SECONDS_MAX", WAIT_SECONDS_MAX)
    house = pg_house
    with held(house, lambda tx: tx.x):
        house.submit()
        beginning = asyncio.create_task(told(server.watch(JobFilter(), None, 3600.0)))
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not server.held_seconds:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        server.drain()
        with pytest.raises(Draining):
            await beginning


async def test_it_does_not_wait_for_long_to_begin(
    server: Fleet, pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "BEGIN_SECONDS_MAX", 0.05)
    house = pg_house
    late = new_job()
    with held(house, lambda tx: submit(tx, [late], {})) as slow:
        early = house.submit()
        stream = server.watch(JobFilter(), None, 3600.0)
        assert await told(stream) is None
        slow.commit()
    assert [await told(stream), await told(stream)] == [(late.job_id, 1), (early, 1)]


async def test_a_failover_while_it_runs_ends_every_watch(
    server: Fleet, pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell what the standby that leads now has missed."""
    monkeypatch.setattr(services, "BEGIN_SECONDS_MAX", WAIT_SECONDS_MAX)
    house = pg_house
    stream = server.watch(JobFilter(), None, 3600.0)
    assert await told(stream) is None
    before = house.database.read(schema.identity)
    home = house.database.read(schema.home)
    elsewhere = home.replace("/00000001/", "/00000007/")
    house.write(lambda tx: tx.execute(sa.update(service).values(home=elsewhere)))
    house.submit()
    server.notify()
    with pytest.raises(ResumeTokenExpired, match="restored"):
        await told(stream)
    assert house.database.read(schema.identity).incarnation != before.incarnation
    stream = server.watch(JobFilter(), None, 3600.0)
    assert await told(stream) is None
    job_id = house.submit()
    server.notify()
    assert await told(stream) == (job_id, 1)
