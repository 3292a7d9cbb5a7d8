"""The error boundary, around servicers that misbehave in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import grpc.aio
import pytest
import structlog
from structlog.testing import capture_logs

from generated.jobsvc.v1 import job_pb2, job_service_pb2_grpc
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.errors import JobUnknown, LimitReached
from jobsvc.rpc import interceptors
from jobsvc.rpc.access import Access
from jobsvc.rpc.interceptors import CallBoundary
from tests.rpc.status import read_into, refused, stream_refused
from tests.rpc.status import refusal as refusal_of

SECRET = "hunter2"
JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
WAIT_SECONDS_MAX = 10

Get = Callable[[], Awaitable[pb.GetJobResponse]]
Watch = Callable[[], AsyncGenerator[pb.WatchJobResponse]]


class Servicer(job_service_pb2_grpc.JobServiceServicer):
    """Does in GetJob and WatchJob what the test says; none of its other methods is called."""

    get: Get
    watch: Watch

    async def GetJob(self, request: Any, context: Any) -> pb.GetJobResponse:  # noqa: N802
        return await self.get()

    async def WatchJob(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncGenerator[pb.WatchJobResponse]:
        async for message in self.watch():
            yield message


@dataclass
class World:
    servicer: Servicer
    boundary: CallBoundary
    channel: grpc.aio.Channel
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = job_service_pb2_grpc.JobServiceStub(self.channel)

    def get(self) -> Any:
        return self.stub.GetJob(pb.GetJobRequest(job_id=JOB_ID), timeout=WAIT_SECONDS_MAX)

    def watch(self) -> Any:
        return self.stub.WatchJob(pb.WatchJobRequest(job_id=JOB_ID), timeout=WAIT_SECONDS_MAX)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    boundary = CallBoundary(Access(None), write_seconds_max=0.3, abort_seconds_max=0.2)
    server = grpc.aio.server(interceptors=[boundary])
    servicer = Servicer()  # type: ignore[abstract]  # the others are not called
    job_service_pb2_grpc.add_JobServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield World(servicer, boundary, channel)
    await server.stop(None)


def raising(error: BaseException) -> Get:
    async def get() -> pb.GetJobResponse:
        raise error

    return get


def watching(error: BaseException) -> Watch:
    async def watch() -> AsyncGenerator[pb.WatchJobResponse]:
        yield pb.WatchJobResponse()
        raise error

    return watch


async def answering() -> pb.GetJobResponse:
    return pb.GetJobResponse()


@pytest.mark.parametrize(("level", "times"), [("info", 0), ("debug", 1)])
async def test_nothing_is_computed_for_a_record_that_is_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch, level: str, times: int
) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    fields = Mock(wraps=interceptors._caller)
    monkeypatch.setattr(interceptors, "_caller", fields)
    world.servicer.get = answering
    with capture_logs() as records:
        await world.get()
    assert fields.call_count == len(records) == times


OURS = [
    RuntimeError(f"password {SECRET}"),
    SystemExit(SECRET),
    KeyboardInterrupt(SECRET),
    MemoryError(SECRET),
    RecursionError(SECRET),
    StopAsyncIteration(SECRET),
    BaseException(SECRET),
]


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
async def test_an_unknown_error_tells_an_id_and_nothing_else(
    world: World, error: BaseException
) -> None:
    world.servicer.get = raising(error)
    with capture_logs() as records:
        refusal = await refused(world.get())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert SECRET not in str(refusal)
    assert type(error).__name__ not in str(refusal)
    error_id = refusal.metadata["error_id"]
    assert error_id in refusal.message
    (record,) = [each for each in records if each["log_level"] == "error"]
    assert record["error_id"] == error_id
    assert record["exc_info"] is not None
    # The server goes on.
    world.servicer.get = answering
    assert await world.get() == pb.GetJobResponse()


async def test_a_stream_that_fails_in_the_middle_tells_an_id(world: World) -> None:
    world.servicer.watch = watching(SystemExit(SECRET))
    refusal = await stream_refused(world.watch(), expected_messages=1)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert SECRET not in str(refusal)


async def test_a_cancel_from_within_is_our_bug_and_not_silence(world: World) -> None:
    """grpc would leave the client without an answer until its deadline."""
    world.servicer.get = raising(asyncio.CancelledError())
    assert (await refused(world.get())).reason == "INTERNAL"


async def test_a_domain_error_is_told_by_the_table(world: World) -> None:
    world.servicer.get = raising(JobUnknown(JOB_ID))
    refusal = await refused(world.get())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
    assert refusal.details["ResourceInfo"]["resourceName"] == JOB_ID


async def test_a_limit_pushes_back(world: World) -> None:
    world.servicer.get = raising(LimitReached("full", retry_seconds=2.5))
    refusal = await refused(world.get())
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.trailers["grpc-retry-pushback-ms"] == "2500"
    assert refusal.details["RetryInfo"] == {"retryDelay": "2.500s"}


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x02\xff\xff", b"\x0a\x7f"])
async def test_bytes_that_are_no_request_are_undecodable(world: World, data: bytes) -> None:
    world.servicer.get = answering
    unary: Any = world.channel.unary_unary("/jobsvc.v1.JobService/GetJob")
    refusal = await refused(unary(data, timeout=WAIT_SECONDS_MAX))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE")
    stream: Any = world.channel.unary_stream("/jobsvc.v1.JobService/WatchJob")
    refusal = await stream_refused(stream(data, timeout=WAIT_SECONDS_MAX))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE")


async def test_a_method_that_nobody_knows_is_refused_by_grpc(world: World) -> None:
    unknown: Any = world.channel.unary_unary("/jobsvc.v1.JobService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unknown(b"", timeout=WAIT_SECONDS_MAX)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_its_call(world: World, stream: bool) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def wait_for_ever() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def get() -> pb.GetJobResponse:
        await wait_for_ever()
        return pb.GetJobResponse()

    async def watch() -> AsyncGenerator[pb.WatchJobResponse]:
        await wait_for_ever()
        yield pb.WatchJobResponse()

    world.servicer.get, world.servicer.watch = get, watch
    with capture_logs() as records:
        call = world.watch() if stream else world.get()
        reading = asyncio.create_task(call.read() if stream else call.wait_for_connection())
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await begun.wait()
            call.cancel()
            await cancelled.wait()
            await world.boundary.wait_idle(WAIT_SECONDS_MAX)
        await asyncio.gather(reading, return_exceptions=True)
    assert [each["event"] for each in records] == ["call left by its client"]


def endless(closed: asyncio.Event) -> Watch:
    """More than any buffer holds."""

    async def watch() -> AsyncGenerator[pb.WatchJobResponse]:
        message = pb.WatchJobResponse()
        message.event.log.message = "x" * 64 * 1024
        try:
            while True:
                yield message
        finally:
            closed.set()

    return watch


async def test_a_watcher_that_does_not_read_is_ended(world: World) -> None:
    closed = asyncio.Event()
    world.servicer.watch = endless(closed)
    messages = aiter(world.watch())
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await anext(messages)
        await closed.wait()
        await world.boundary.wait_idle(WAIT_SECONDS_MAX)
        # It finds out when it reads on.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_into([], messages)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert refusal_of(caught.value).reason == "WATCHER_TOO_SLOW"


async def test_a_stream_that_is_silent_for_long_is_not_blocked(world: World) -> None:
    async def now_and_then() -> AsyncGenerator[pb.WatchJobResponse]:
        for number in range(3):
            yield pb.WatchJobResponse(event=job_pb2.JobEvent(sequence=number))
            await asyncio.sleep(0.35)

    world.servicer.watch = now_and_then
    assert [message.event.sequence async for message in world.watch()] == [0, 1, 2]


async def test_a_watcher_that_leaves_while_a_write_is_blocked_ends_quietly(world: World) -> None:
    closed = asyncio.Event()
    world.servicer.watch = endless(closed)
    with capture_logs() as records:
        call = world.watch()
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await call.read()
            call.cancel()
            await closed.wait()
            await world.boundary.wait_idle(WAIT_SECONDS_MAX)
    assert [each["event"] for each in records] == ["call left by its client"]


async def test_calls_are_refused_once_it_drains_and_those_begun_are_finished(
    world: World,
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def get() -> pb.GetJobResponse:
        begun.set()
        await go_on.wait()
        return pb.GetJobResponse()

    world.servicer.get = get
    call = asyncio.ensure_future(world.get())
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await begun.wait()
        world.boundary.refuse_calls()
        refusal = await refused(world.get())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refusal.trailers["grpc-retry-pushback-ms"] == "1000"
        assert (await stream_refused(world.watch())).reason == "DRAINING"
        idle = asyncio.create_task(world.boundary.wait_idle(WAIT_SECONDS_MAX))
        await asyncio.sleep(0)
        assert not idle.done()
        go_on.set()
        assert await call == pb.GetJobResponse()
        await idle
