from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import pytest

from jobsvc.broker.topology import Broker
from jobsvc.core.attempts import Input, JobTypeInfo
from jobsvc.core.model import Effects, NewJob, OnConflict, Unique
from jobsvc.core.states import JobState
from jobsvc.errors import (
    DatabaseUnavailable,
    IdempotencyKeyReused,
    JobUnknown,
    LimitReached,
    RegistryChanged,
    SequenceOutOfRange,
    UniqueConflict,
)
from jobsvc.outbox import Outbox
from jobsvc.services import submitting
from jobsvc.services.jobs import Jobs
from jobsvc.services.submitting import GroupCommit, Registry
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from jobsvc.store import queues, registry
from jobsvc.store.database import CommitUnknown, Database, Transaction
from jobsvc.store.tables import idempotency_keys, job_events, jobs, outbox
from jobsvc.store.verbs import Submitted
from tests.store.house import DONE, FATAL, House, new_id, new_job, worker
from tests.unit.conftest import POOL_SIZE, hasten

T = TypeVar("T")

SECONDS_MAX = 10.0
UNSTORABLE = 2**70  # for a priority: no integer of a database


class Disturbed(Database):
    """Counts its commits; `open` holds writers back; `lose` has the answer of the next COMMIT
    lost, before or after it took place."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=POOL_SIZE)
        hasten(self)
        self.commits = 0
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()
        self.lose = ""
        self.away = False

    def write(self, body: Callable[[Transaction], T], *, numbered: bool = False) -> T:
        self.held.set()
        assert self.open.wait(SECONDS_MAX)
        if self.away:
            raise DatabaseUnavailable
        lose, self.lose = self.lose, ""
        if lose == "before":
            raise CommitUnknown
        answer = super().write(body, numbered=numbered)
        self.commits += 1
        if lose:
            raise CommitUnknown
        return answer


class Teller(Outbox):
    """Remembers what it was told, and publishes nothing."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, Broker("memory://"))
        self.told: list[Effects] = []
        self.watched: list[bool] = []

    def tell(self, effects: Effects, *, watched: bool = True) -> None:
        self.told.append(effects)
        self.watched.append(watched)

    @property
    def dispatched(self) -> list[str]:
        return [d.job_id for effects in self.told for d in effects.dispatches]


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Disturbed]:
    made = Disturbed(sqlite_url)
    yield made
    made.close()


@pytest.fixture
async def threads(database: Disturbed) -> AsyncIterator[AsyncDatabase]:
    made = AsyncDatabase(database, 4)
    yield made
    database.open.set()
    await asyncio.to_thread(made.close)


@pytest.fixture
def teller(database: Disturbed) -> Teller:
    return Teller(database)


@pytest.fixture
async def group(database: Disturbed, threads: AsyncDatabase, teller: Teller) -> GroupCommit:
    return GroupCommit(database, threads, teller)


@pytest.fixture
async def service(
    database: Disturbed, threads: AsyncDatabase, teller: Teller
) -> AsyncIterator[Jobs]:
    hub = WatchHub(threads, 0.02)
    hub.start()
    yield Jobs(database, threads, teller, hub)
    await hub.stop()


@pytest.fixture
def known(database: Disturbed) -> Registry:
    return Registry(database.read(registry.registry_revision), {})


async def hold(database: Disturbed, group: GroupCommit, known: Registry) -> asyncio.Task[object]:
    """A first submit that is under way until `database.open` is set."""
    database.open.clear()
    database.held.clear()
    first = asyncio.create_task(group.submit(new_job(), known))
    await asyncio.sleep(0)
    await asyncio.to_thread(database.held.wait, SECONDS_MAX)
    return first


async def test_one_submit_waits_for_nobody(
    group: GroupCommit, house: House, known: Registry, teller: Teller
) -> None:
    job = new_job()
    submitted = await asyncio.wait_for(group.submit(job, known), SECONDS_MAX)
    assert submitted.job_id == job.job_id
    assert not submitted.already_existed
    assert house.history(job.job_id) == ["SUBMITTED>QUEUED"]
    assert teller.dispatched == [job.job_id]


async def test_a_queue_is_known_with_its_first_job(
    group: GroupCommit, known: Registry, database: Disturbed
) -> None:
    await group.submit(new_job(queue="first"), known)
    assert "first" in database.read(queues.generations)
    await group.submit_all([new_job(queue="second"), new_job(queue="first")], known)
    assert database.read(queues.generations) == {"first": 1, "second": 1}


async def test_many_at_once_share_commits(
    group: GroupCommit, database: Disturbed, known: Registry, teller: Teller
) -> None:
    first = await hold(database, group, known)
    new = [new_job() for _ in range(submitting.GROUP_MAX + 10)]
    tasks = [asyncio.create_task(group.submit(job, known)) for job in new]
    await asyncio.sleep(0)
    database.open.set()
    await first
    answers = await asyncio.gather(*tasks)
    assert [answer.job_id for answer in answers] == [job.job_id for job in new]
    assert database.commits == 3  # the first, a full group, the rest
    assert sorted(teller.dispatched[1:]) == sorted(job.job_id for job in new)


async def test_a_group_is_bounded_in_bytes(
    group: GroupCommit, database: Disturbed, known: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "GROUP_BYTES_MAX", 1000)
    first = await hold(database, group, known)
    tasks = [
        asyncio.create_task(group.submit(new_job(input=Input(b"x" * 600)), known)) for _ in range(6)
    ]
    await asyncio.sleep(0)
    database.open.set()
    await asyncio.gather(first, *tasks)
    assert database.commits == 1 + 3


async def test_a_bad_request_fails_alone(
    group: GroupCommit, database: Disturbed, house: House, known: Registry, teller: Teller
) -> None:
    first = await hold(database, group, known)
    fine = [new_job() for _ in range(4)]
    requests = [fine[0], fine[1], new_job(priority=UNSTORABLE), fine[2], fine[3]]
    tasks = [asyncio.create_task(group.submit(job, known)) for job in requests]
    await asyncio.sleep(0)
    database.open.set()
    await first
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[2], OverflowError)
    assert [a.job_id for a in answers if not isinstance(a, BaseException)] == [
        job.job_id for job in fine
    ]
    assert house.count(jobs) == 5
    assert sorted(teller.dispatched[1:]) == sorted(job.job_id for job in fine)


async def test_another_with_the_same_key_fails_alone(
    group: GroupCommit, database: Disturbed, house: House, known: Registry
) -> None:
    first = await hold(database, group, known)
    original = new_job(idempotency_key="k", request_hash=b"1")
    requests = [
        original,
        new_job(idempotency_key="k", request_hash=b"2"),
        new_job(idempotency_key="k", request_hash=b"1"),
        new_job(),
    ]
    tasks = [asyncio.create_task(group.submit(job, known)) for job in requests]
    await asyncio.sleep(0)
    database.open.set()
    await first
    one, other, same, plain = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(other, IdempotencyKeyReused)
    assert other.job_id == original.job_id
    assert not isinstance(one, BaseException)
    assert not isinstance(same, BaseException)
    assert (one.job_id, one.already_existed) == (original.job_id, False)
    assert (same.job_id, same.already_existed) == (original.job_id, True)
    assert not isinstance(plain, BaseException)
    assert house.count(jobs) == 3


async def test_another_with_the_same_unique_key_fails_alone(
    group: GroupCommit, database: Disturbed, house: House, known: Registry
) -> None:
    unique = Unique("k", on_conflict=OnConflict.REJECT)
    first = await hold(database, group, known)
    jobs = [new_job(unique=unique), new_job(unique=unique), new_job()]
    tasks = [asyncio.create_task(group.submit(job, known)) for job in jobs]
    await asyncio.sleep(0)
    database.open.set()
    one, rejected, other = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    assert isinstance(one, Submitted)
    assert isinstance(rejected, UniqueConflict)
    assert rejected.job_id == one.job_id
    assert isinstance(other, Submitted)
    assert database.commits == 2


async def test_of_a_job_that_was_replaced_its_watchers_are_told(
    group: GroupCommit, house: House, known: Registry, teller: Teller
) -> None:
    unique = Unique("k", on_conflict=OnConflict.REPLACE)
    old = await group.submit(new_job(unique=unique), known)
    new = await group.submit(new_job(unique=unique), known)
    await group.submit_all([new_job()], known)
    await group.submit_all([new_job(unique=unique)], known)
    assert teller.watched == [False, True, False, True]
    assert {change.job_id for change in teller.told[1].changes} == {old.job_id, new.job_id}
    assert [house.get(each.job_id).state for each in (old, new)] == [JobState.CANCELLED] * 2


async def test_whoever_hung_up_before_the_write_is_not_stored(
    group: GroupCommit, database: Disturbed, house: House, known: Registry
) -> None:
    first = await hold(database, group, known)
    gone, stays = new_job(), new_job()
    hung_up = asyncio.create_task(group.submit(gone, known))
    waits = asyncio.create_task(group.submit(stays, known))
    await asyncio.sleep(0)
    hung_up.cancel()
    database.open.set()
    await first
    await waits
    assert house.count(jobs) == 2
    with pytest.raises(JobUnknown):
        house.get(gone.job_id)


async def test_hanging_up_during_the_write_disturbs_nobody(
    group: GroupCommit, database: Disturbed, house: House, known: Registry
) -> None:
    first = await hold(database, group, known)
    first.cancel()
    other = asyncio.create_task(group.submit(new_job(), known))
    await asyncio.sleep(0)
    database.open.set()
    await other
    assert house.count(jobs) == 2


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_commit_of_unknown_outcome_is_looked_up(
    group: GroupCommit, database: Disturbed, house: House, known: Registry, lost: str
) -> None:
    job = new_job()
    database.lose = lost
    if lost == "before":
        with pytest.raises(DatabaseUnavailable):
            await group.submit(job, known)
        assert house.count(jobs) == 0
    else:
        assert (await group.submit(job, known)).job_id == job.job_id
        assert house.owed(job.job_id) == ["job"]  # for the relay


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_commit_of_unknown_outcome_of_many(
    group: GroupCommit, database: Disturbed, house: House, known: Registry, lost: str
) -> None:
    requests = [new_job() for _ in range(3)]
    database.lose = lost
    if lost == "before":
        with pytest.raises(DatabaseUnavailable):
            await group.submit_all(requests, known)
        assert house.count(jobs) == 0
    else:
        answers = await group.submit_all(requests, known)
        assert [a.job_id for a in answers] == [job.job_id for job in requests]


async def test_database_away_is_told_to_all_and_overcome(
    group: GroupCommit, database: Disturbed, known: Registry
) -> None:
    database.away = True
    answers = await asyncio.gather(
        *(group.submit(new_job(), known) for _ in range(3)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [DatabaseUnavailable] * 3
    database.away = False
    await group.submit(new_job(), known)


async def test_limit_of_waiting_requests(
    group: GroupCommit,
    database: Disturbed,
    house: House,
    known: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submitting, "WAITING_MAX", 3)
    first = await hold(database, group, known)
    waiting = [asyncio.create_task(group.submit(new_job(), known)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(LimitReached):
        await group.submit(new_job(), known)
    database.open.set()
    await asyncio.gather(first, *waiting)
    await group.submit(new_job(), known)
    assert house.count(jobs) == 5


async def test_all_or_none(
    group: GroupCommit, house: House, known: Registry, teller: Teller
) -> None:
    house.submit(idempotency_key="taken", request_hash=b"1")
    requests = [
        new_job(),
        new_job(idempotency_key="free", request_hash=b"1"),
        new_job(idempotency_key="taken", request_hash=b"2"),
    ]
    with pytest.raises(IdempotencyKeyReused) as raised:
        await group.submit_all(requests, known)
    assert raised.value.index == 2
    assert "requests[2]" in str(raised.value)
    assert house.count(jobs) == 1
    assert house.count(idempotency_keys) == 1
    assert teller.told == []
    with pytest.raises(OverflowError):
        await group.submit_all([new_job(), new_job(priority=UNSTORABLE)], known)
    assert house.count(jobs) == 1
    twice = new_job(idempotency_key="free", request_hash=b"1")
    answers = await group.submit_all([*requests[:2], twice], known)
    assert [(a.job_id, a.already_existed) for a in answers] == [
        (requests[0].job_id, False),
        (requests[1].job_id, False),
        (requests[1].job_id, True),
    ]


async def test_types_that_changed_are_checked_against_again(service: Jobs, house: House) -> None:
    checked: list[int | None] = []

    def prepare(types: Registry) -> NewJob:
        info = types.types.get("demo")
        checked.append(info.max_attempts if info else None)
        return new_job()

    await service.submit(prepare)
    house.announce(worker(), JobTypeInfo("demo", queue="special", max_attempts=3))
    submitted = await service.submit(prepare)
    assert checked == [None, None, 3]
    job = house.get(submitted.job_id)
    assert (job.queue, job.max_attempts) == ("special", 3)
    house.announce(worker(), JobTypeInfo("demo", max_attempts=4))
    (many,) = await service.submit_many(lambda types: [prepare(types)])
    assert checked[3:] == [3, 4]
    assert house.get(many.job_id).max_attempts == 4
    assert house.count(jobs) == 3
    # Nothing has changed: once is enough.
    await service.submit(prepare, heavy=True)
    assert checked[5:] == [4]


async def test_requests_checked_against_different_types_do_not_spoil_each_other(
    group: GroupCommit, database: Disturbed, house: House, known: Registry
) -> None:
    first = await hold(database, group, known)
    stale = replace(known, revision=known.revision - 1)
    tasks = [asyncio.create_task(group.submit(new_job(), types)) for types in (known, stale, known)]
    await asyncio.sleep(0)
    database.open.set()
    await first
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(a, RegistryChanged) for a in answers] == [False, True, False]
    assert house.count(jobs) == 3


async def test_preview_stores_nothing(service: Jobs, house: House) -> None:
    house.announce(worker(), JobTypeInfo("demo", max_attempts=3))
    key = new_job(idempotency_key="k", request_hash=b"1", priority=4)
    preview = await service.preview(lambda _: key)
    assert (preview.job_id, preview.already_existed) == ("", False)
    assert preview.job is not None
    assert (preview.job.job_id, preview.job.priority, preview.job.max_attempts) == ("", 4, 3)
    assert preview.job.state is JobState.QUEUED
    for table in (jobs, job_events, outbox, idempotency_keys):
        assert house.count(table) == 0
    job_id = (await service.submit(lambda _: key)).job_id
    again = replace(key, job_id=new_id())
    same = await service.preview(lambda _: again)
    assert (same.job_id, same.already_existed) == (job_id, True)
    with pytest.raises(IdempotencyKeyReused):
        await service.preview(lambda _: replace(again, request_hash=b"2"))
    assert house.count(jobs) == 1


async def test_result_waits_for_the_end(service: Jobs, house: House) -> None:
    claimed = house.start()
    early = await service.result(claimed.job_id, 0.05)
    assert (early.state, early.result, early.error) == (JobState.RUNNING, None, None)
    waiting = asyncio.create_task(service.result(claimed.job_id, SECONDS_MAX))
    await asyncio.sleep(0.05)
    house.finish(claimed, DONE)
    outcome = await waiting
    assert outcome.state is JobState.SUCCEEDED
    assert outcome.result == DONE.result
    assert await service.result(claimed.job_id, SECONDS_MAX) == outcome
    failed = house.start()
    house.finish(failed, FATAL)
    assert (await service.result(failed.job_id, SECONDS_MAX)).error is not None
    for seconds in (0.0, 1.0):
        with pytest.raises(JobUnknown):
            await service.result(new_id(), seconds)


async def test_events_of_nothing_more_of_nobody_and_of_beyond(service: Jobs, house: House) -> None:
    claimed = house.start()
    events = house.events(claimed.job_id)
    assert await service.list_events(claimed.job_id, 0, 10) == events
    assert await service.list_events(claimed.job_id, 0, 1) == events[:1]
    assert await service.list_events(claimed.job_id, 2, 10) == []
    with pytest.raises(SequenceOutOfRange) as raised:
        await service.list_events(claimed.job_id, 3, 10)
    assert raised.value.last == 2
    with pytest.raises(JobUnknown):
        await service.list_events(new_id(), 0, 10)


async def test_cancelling_a_running_job_tells_the_workers(
    service: Jobs, house: House, teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls: list[object] = []
    monkeypatch.setattr(teller, "control", controls.append)
    waiting, running = house.submit(), house.start().job_id
    assert (await service.cancel(waiting, "enough", "alice")).state is JobState.CANCELLED
    assert controls == []
    job = await service.cancel(running, "enough", "alice")
    assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    assert controls == [{"cancel": running}]
    assert [len(effects.changes) for effects in teller.told] == [1, 1]
