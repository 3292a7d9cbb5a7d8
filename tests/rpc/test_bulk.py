"""CancelJobs, RetryJobs and DeleteJobs over the wire."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import grpc
import pytest

from generated.jobsvc.v1 import admin_service_pb2 as pb
from generated.jobsvc.v1 import admin_service_pb2_grpc, job_pb2
from jobsvc.core.model import Unique
from jobsvc.core.states import JobState
from jobsvc.outbox import Outbox
from jobsvc.services import bulk
from jobsvc.store import verbs
from jobsvc.store.tables import job_events, job_labels, jobs
from tests.rpc.conftest import World
from tests.rpc.status import refused
from tests.store.house import DONE, FATAL, WAIT_SECONDS_MAX, new_job

EVERY = job_pb2.JobFilter(queue="default")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BATCH", 3)


def admin(world: World) -> Any:
    return admin_service_pb2_grpc.AdminServiceStub(world.channel)


async def submit(world: World, count: int, **fields: Any) -> list[str]:
    requests = [new_job(**fields) for _ in range(count)]
    await world.threads.run(world.house.submit_all, requests)
    return [request.job_id for request in requests]


def states(world: World) -> Counter[str]:
    found = world.house.database.read(lambda c: c.execute(jobs.select()).all())
    return Counter(row.state for row in found)


def running_ids(world: World) -> list[str]:
    running = jobs.select().where(jobs.c.state == JobState.RUNNING)
    return [row.id for row in world.house.database.read(lambda c: c.execute(running).all())]


def counts(answer: Any) -> tuple[int, int, bool]:
    return answer.matched_count, answer.changed_count, answer.more


async def one_of_each(world: World) -> None:
    """A job in each state, but for RETRYING."""
    await submit(world, 1, delay=60.0)
    queued, running, done, failed, cancelled = await submit(world, 5, labels={"a": "b"})
    await world.start(running)
    await world.finish(await world.start(done), DONE)
    await world.finish(await world.start(failed), FATAL)
    await world.threads.run(world.house.cancel, cancelled)
    assert world.house.get(queued).state is JobState.QUEUED


async def test_those_that_have_not_ended_are_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Outbox, "control", lambda _self, body: told.append(body))
    await one_of_each(world)
    (running,) = running_ids(world)
    answer = await admin(world).CancelJobs(pb.CancelJobsRequest(filter=EVERY, reason="enough"))
    assert counts(answer) == (3, 3, False)
    assert states(world) == {"CANCELLED": 3, "RUNNING": 1, "SUCCEEDED": 1, "FAILED": 1}
    assert told == [{"cancel": running}]
    assert world.house.get(running).cancel_requested
    assert world.house.row(running).cancel_reason == "enough"
    # What is under way is not counted again, so that whoever repeats it comes to an end.
    answer = await admin(world).CancelJobs(pb.CancelJobsRequest(filter=EVERY))
    assert counts(answer) == (0, 0, False)


async def test_failed_and_cancelled_ones_are_retried(world: World) -> None:
    await one_of_each(world)
    before = states(world)
    answer = await admin(world).RetryJobs(pb.RetryJobsRequest(filter=EVERY))
    assert counts(answer) == (2, 2, False)
    assert states(world) == before - Counter(["FAILED", "CANCELLED"]) + Counter(["QUEUED"] * 2)


async def test_one_whose_unique_key_is_held_is_left_out(world: World) -> None:
    """Else whoever repeats it while there are more would never come to an end."""
    for _ in range(3):
        (job_id,) = await submit(world, 1, unique=Unique("k"))
        await world.finish(await world.start(job_id), FATAL)
    every = pb.RetryJobsRequest(filter=EVERY)
    assert counts(await admin(world).RetryJobs(every)) == (3, 1, False)
    dry = pb.RetryJobsRequest(filter=EVERY, dry_run=True)
    assert counts(await admin(world).RetryJobs(dry)) == (0, 0, False)
    assert counts(await admin(world).RetryJobs(every)) == (0, 0, False)


async def test_ended_ones_are_deleted_with_all_that_is_theirs(world: World) -> None:
    await one_of_each(world)
    answer = await admin(world).DeleteJobs(pb.DeleteJobsRequest(filter=EVERY))
    assert counts(answer) == (3, 3, False)
    assert states(world) == {"SCHEDULED": 1, "QUEUED": 1, "RUNNING": 1}
    assert world.house.count(job_labels) == 2
    assert world.house.count(job_events) == 4


async def test_a_dry_run_counts_and_changes_nothing(world: World) -> None:
    await one_of_each(world)
    before = states(world)
    for call, request, matched in (
        (admin(world).CancelJobs, pb.CancelJobsRequest, 3),
        (admin(world).RetryJobs, pb.RetryJobsRequest, 2),
        (admin(world).DeleteJobs, pb.DeleteJobsRequest, 3),
    ):
        assert counts(await call(request(filter=EVERY, dry_run=True))) == (matched, 0, False)
        answer = await call(request(filter=EVERY, dry_run=True, max_count=1))
        assert counts(answer) == (1, 0, True)
    assert states(world) == before


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("max_count", "expected", "more"),
    [(1, 1, True), (3, 3, True), (7, 7, True), (8, 8, False), (9, 8, False), (0, 8, False)],
)
async def test_max_count_bounds_it_and_more_says_so(
    world: World, max_count: int, expected: int, more: bool, dry_run: bool
) -> None:
    await submit(world, 8)
    await submit(world, 2, queue="slow")
    asked = pb.CancelJobsRequest(filter=EVERY, max_count=max_count, dry_run=dry_run)
    answer = await admin(world).CancelJobs(asked)
    assert counts(answer) == (expected, 0 if dry_run else expected, more)
    assert states(world)["CANCELLED"] == (0 if dry_run else expected)


async def test_the_states_of_the_filter_count_too(world: World) -> None:
    await one_of_each(world)
    failed = job_pb2.JobFilter(states=[job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_QUEUED])
    answer = await admin(world).DeleteJobs(pb.DeleteJobsRequest(filter=failed))
    assert counts(answer) == (1, 1, False)
    answer = await admin(world).RetryJobs(pb.RetryJobsRequest(filter=failed))
    assert counts(answer) == (0, 0, False)


async def test_what_changed_in_between_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that has started since it was found QUEUED is no longer what was asked for."""
    ids = await submit(world, 3)
    cancel_many = verbs.cancel_many

    def too_late(tx: Any, *arguments: Any) -> Any:
        tx.execute(
            jobs.update()
            .where(jobs.c.id == ids[1])
            .values(state="RUNNING", attempt=1, lease_token=ids[0], worker_id="w1")
        )
        return cancel_many(tx, *arguments)

    monkeypatch.setattr(verbs, "cancel_many", too_late)
    queued = job_pb2.JobFilter(states=[job_pb2.JOB_STATE_QUEUED])
    answer = await admin(world).CancelJobs(pb.CancelJobsRequest(filter=queued))
    assert counts(answer) == (3, 2, False)
    assert not world.house.get(ids[1]).cancel_requested


async def test_it_stops_when_its_caller_hangs_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(world, 9)
    begun, go_on, told, ended = *(threading.Event() for _ in range(3)), asyncio.Event()
    loop = asyncio.get_running_loop()
    cancel_many, go_through = verbs.cancel_many, bulk.Bulk._go_through

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_SECONDS_MAX)
        return cancel_many(*arguments)

    async def to_its_end(*arguments: Any) -> None:
        try:
            await go_through(*arguments)
        finally:
            loop.call_soon(ended.set)

    monkeypatch.setattr(Outbox, "tell", lambda *_: told.set())
    monkeypatch.setattr(verbs, "cancel_many", slowly)
    monkeypatch.setattr(bulk.Bulk, "_go_through", to_its_end)
    call = admin(world).CancelJobs(pb.CancelJobsRequest(filter=EVERY))
    task = asyncio.ensure_future(call)
    await asyncio.to_thread(begun.wait, WAIT_SECONDS_MAX)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await ended.wait()  # though its batch is still under way
    go_on.set()
    assert await asyncio.to_thread(told.wait, WAIT_SECONDS_MAX)  # which is told of all the same
    assert states(world) == {"CANCELLED": 3, "QUEUED": 6}


async def test_a_bad_request_is_refused_field_by_field(world: World) -> None:
    await submit(world, 1)
    for call, request in (
        (admin(world).CancelJobs, pb.CancelJobsRequest),
        (admin(world).RetryJobs, pb.RetryJobsRequest),
        (admin(world).DeleteJobs, pb.DeleteJobsRequest),
    ):
        unknown = job_pb2.JobFilter.FromString(b"\xa2\x06\x01x")  # a field of a newer client
        for fields, bad in (
            ({}, ["filter"]),
            ({"filter": job_pb2.JobFilter()}, ["filter"]),
            ({"filter": unknown}, ["filter"]),
            ({"filter": EVERY, "max_count": -1}, ["max_count"]),
            ({"filter": EVERY, "max_count": 100_001}, ["max_count"]),
            ({"filter": job_pb2.JobFilter(queue="Q")}, ["filter.queue"]),
        ):
            refusal = await refused(call(request(**fields)))
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", bad)
    asked = pb.CancelJobsRequest(filter=EVERY, max_count=100_000, reason="a\nb")
    assert (await refused(admin(world).CancelJobs(asked))).fields == ["reason"]
    assert states(world) == {"QUEUED": 1}
