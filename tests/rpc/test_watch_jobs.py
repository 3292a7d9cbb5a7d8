"""WatchJobs over the wire."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import uuid4

import grpc
import pytest
import sqlalchemy as sa

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import Log
from jobsvc.rpc import convert
from jobsvc.rpc.resume import ResumeTokens
from jobsvc.rpc.signing import Signer
from jobsvc.store import schema
from jobsvc.store.tables import service
from tests.rpc.conftest import World
from tests.rpc.status import stream_refused
from tests.store.house import DONE

WAIT_SECONDS_MAX = 20
Name = tuple[str, int]  # job id, sequence


async def submit(world: World, **fields: Any) -> str:
    request = pb.SubmitJobRequest(job_type="demo", **fields)
    answer: pb.SubmitJobResponse = await world.stub.SubmitJob(request)
    return answer.job.job_id


def watch(world: World, **fields: Any) -> Any:
    return world.stub.WatchJobs(pb.WatchJobsRequest(**fields), timeout=WAIT_SECONDS_MAX)


async def begun(world: World, **fields: Any) -> tuple[Any, pb.WatchJobsResponse]:
    """A stream, and its first message."""
    stream = aiter(watch(world, **fields))
    first: pb.WatchJobsResponse = await anext(stream)
    assert first.WhichOneof("message") == "heartbeat"
    assert first.heartbeat.last_sequence == 0
    assert first.heartbeat.time.seconds > 0
    assert first.resume_token
    return stream, first


async def take(stream: Any, count: int) -> list[pb.WatchJobsResponse]:
    """The next events."""
    messages: list[pb.WatchJobsResponse] = []
    while len(messages) < count:
        message = await anext(stream)
        assert message.resume_token
        if message.HasField("event"):
            messages.append(message)
    return messages


def names(messages: list[pb.WatchJobsResponse]) -> list[Name]:
    return [(message.event.job_id, message.event.sequence) for message in messages]


async def identity(world: World) -> schema.Identity:
    return await world.threads.read(schema.identity)


async def test_a_heartbeat_and_then_every_event_as_watch_job_tells_it(world: World) -> None:
    stream, _ = await begun(world)
    job_id = await submit(world)
    claimed = await world.start(job_id)
    await world.report(claimed, Log("INFO", "line"))
    await world.finish(claimed, DONE)
    messages = await take(stream, 4)
    assert names(messages) == [(job_id, n) for n in range(1, 5)]
    alone = world.stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=WAIT_SECONDS_MAX)
    assert [message.event for message in messages] == [m.event async for m in alone]
    tokens = [message.resume_token for message in messages]
    assert len(set(tokens)) == 4


async def test_a_token_leads_on_with_another_filter_too(world: World) -> None:
    filtered = job_pb2.JobFilter(labels={"a": "b"})
    stream, first = await begun(world, filter=filtered)
    hidden = await submit(world)
    shown = await submit(world, labels={"a": "b"})
    (message,) = await take(stream, 1)
    assert names([message]) == [(shown, 1)]
    again, same = await begun(world, resume_token=first.resume_token)
    assert same.resume_token == first.resume_token
    assert names(await take(again, 2)) == [(hidden, 1), (shown, 1)]
    again, _ = await begun(world, filter=filtered, resume_token=message.resume_token)
    last = await submit(world, labels={"a": "b"})
    assert names(await take(again, 1)) == [(last, 1)]


async def test_an_event_is_encoded_once_for_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Name] = []
    encode = convert.fleet_event

    def counting(event: Any, token: str) -> bytes:
        encoded.append((event.job_id, event.sequence))
        return encode(event, token)

    monkeypatch.setattr(convert, "fleet_event", counting)
    streams = [(await begun(world))[0] for _ in range(5)]
    job_id = await submit(world)
    messages = [(await take(stream, 1))[0] for stream in streams]
    assert messages == messages[:1] * 5
    assert encoded == [(job_id, 1)]


async def test_bad_fields_are_all_named(world: World) -> None:
    request = pb.WatchJobsRequest(filter=job_pb2.JobFilter(queue="Q"))
    request.filter.states.append(99)  # type: ignore[arg-type]
    request.heartbeat_interval.seconds = 51
    refusal = await stream_refused(world.stub.WatchJobs(request))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refusal.fields == ["filter.states[0]", "filter.queue", "heartbeat_interval"]


async def test_forged_tokens_are_refused(world: World) -> None:
    secret = (await identity(world)).secret
    _, first = await begun(world)
    good = first.resume_token
    for token in (
        "x",
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        good + "A",
        Signer(secret).seal("another purpose", b"x" * 56),
        Signer(b"another secret").seal("WatchJobs", b"x" * 56),
    ):
        refusal = await stream_refused(watch(world, resume_token=token))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.reason == "INVALID_FIELD"
        assert refusal.fields == ["resume_token"]


async def test_tokens_that_are_good_no_more(world: World) -> None:
    tokens = ResumeTokens(Signer((await identity(world)).secret))
    _, first = await begun(world)
    mark = tokens.mark(first.resume_token)
    assert mark is not None
    for bad in (
        mark._replace(time=mark.time - timedelta(hours=24, minutes=1)),
        mark._replace(incarnation=str(uuid4())),
        mark._replace(position=(mark.position[0] + 10**9, *mark.position[1:])),
    ):
        refusal = await stream_refused(watch(world, resume_token=tokens.token(bad)))
        assert refusal.code is grpc.StatusCode.OUT_OF_RANGE
        assert refusal.reason == "RESUME_TOKEN_EXPIRED"


async def test_a_restore_ends_a_stream_that_is_open(world: World) -> None:
    stream, _ = await begun(world)
    refusing = asyncio.create_task(stream_refused(stream))
    begin = sa.update(service).values(incarnation=str(uuid4()))
    await world.threads.write(lambda tx: tx.execute(begin))
    refusal = await refusing
    assert refusal.reason == "RESUME_TOKEN_EXPIRED"


async def test_a_server_that_goes_sends_its_watchers_to_another(world: World) -> None:
    stream, _ = await begun(world)
    refusing = asyncio.create_task(stream_refused(stream))
    await world.server.stop(grace_seconds=5)
    refusal = await refusing
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_client_that_leaves_is_forgotten(world: World) -> None:
    stream = watch(world)
    await stream.read()
    assert world.fleet.watcher_count == 1
    stream.cancel()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while world.fleet.watcher_count:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
