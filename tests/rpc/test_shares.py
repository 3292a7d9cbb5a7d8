"""What a caller can hold of the server, and that the others are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from generated.jobsvc.v1 import job_service_pb2 as pb
from generated.jobsvc.v1 import job_service_pb2_grpc
from jobsvc.rpc.access import Access
from jobsvc.rpc.crowd import Crowd
from jobsvc.rpc.intake import MIB, Intake, IntakeLimits
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.rpc.unread import Unread, UnreadLimits
from scripts.attacks.wire import Wire
from tests.rpc.conftest import World, running_world
from tests.rpc.status import refusal, refused

WAIT_SECONDS_MAX = 20
SERVICE = "/jobsvc.v1.JobService/"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
# Room for two messages in all, and for one of each connection.
SMALL = IntakeLimits(bytes_max=9 * MIB, caller_bytes_max=5 * MIB)


@pytest.fixture
async def wires(world: World) -> AsyncIterator[list[Wire]]:
    """To be filled; they hang up at the end."""
    opened: list[Wire] = []
    yield opened
    for wire in opened:
        wire.hang_up()


def boundary_with(**parts: Any) -> CallBoundary:
    return CallBoundary(Access(None), abort_seconds_max=0.1, **parts)


@pytest.fixture
def boundary() -> CallBoundary:
    """All of its limits are small, and its patience is short."""
    return boundary_with(
        intake=Intake(
            IntakeLimits(SMALL.bytes_max, SMALL.caller_bytes_max, 10, 1.0, pressed_seconds_max=0.1)
        ),
        unread=Unread(UnreadLimits(bytes_max=2 * MIB, seconds_max=0.5)),
        crowd=Crowd(connection_max=2, streams_max=3),
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


async def until_answered(wire: Wire) -> None:
    await until(lambda: not wire.open_streams)


async def served(world: World) -> None:
    """An ordinary caller on a connection of its own."""
    async with grpc.aio.insecure_channel(world.server.address) as channel:
        stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
        request = pb.SubmitJobRequest(job_type="demo")
        await stub.SubmitJob(request, timeout=WAIT_SECONDS_MAX)


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("method", [f"{SERVICE}SubmitJob", f"{SERVICE}WatchJob"])
async def test_a_request_that_does_not_come_is_refused(world: World, method: str) -> None:
    call: Any = world.channel.stream_unary(method)
    found = await refused(call(never(), timeout=WAIT_SECONDS_MAX))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert "no request came within 1 s" in found.message


async def test_a_call_without_a_request_is_answered(world: World) -> None:
    call: Any = world.channel.stream_unary(f"{SERVICE}SubmitJob")
    found = await refused(call(iter(()), timeout=WAIT_SECONDS_MAX))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE")


async def test_others_are_served_while_half_a_message_is_held(
    world: World, wires: list[Wire]
) -> None:
    """By one caller, and by as many as take all the room there is."""
    for _ in range(4):
        wires.append(await Wire.open(world.server.address))
        for _ in range(2):
            wires[-1].call(f"{SERVICE}SubmitJob", bytes(4 * MIB), keep_back=1)
        await served(world)
    for wire in wires:
        await until_answered(wire)


async def test_more_calls_than_may_wait_are_refused(world: World) -> None:
    """One is received, and ten may wait."""
    call: Any = world.channel.stream_unary(f"{SERVICE}SubmitJob")
    calls = [refused(call(never(), timeout=WAIT_SECONDS_MAX)) for _ in range(30)]
    messages = [found.message for found in await asyncio.gather(*calls)]
    assert sum("10 calls wait for their requests" in each for each in messages) == 19
    await served(world)


async def submitted(world: World, text: str) -> bytes:
    request = pb.SubmitJobRequest(job_type="demo")
    request.payload.update({"text": text})
    job = (await world.stub.SubmitJob(request)).job
    return pb.GetJobRequest(job_id=job.job_id).SerializeToString()


@pytest.mark.parametrize("length", [1, 500_000])
async def test_an_answer_that_is_not_read_is_let_go(
    world: World, wires: list[Wire], length: int
) -> None:
    """For its time is up, or because there is no room for it."""
    request = await submitted(world, "x" * length)
    wires.append(await Wire.open(world.server.address, window=0, reads=False))
    for _ in range(8):
        wires[0].call(f"{SERVICE}GetJob", request)
    await until(lambda: wires[0].open_streams <= 1)
    await served(world)  # grpc.aio itself holds the call that came last, until another comes
    await until_answered(wires[0])
    await until(lambda: world.boundary._unread._held == 0)


async def test_what_a_slow_watcher_left_is_let_go(world: World, wires: list[Wire]) -> None:
    request = pb.WatchJobRequest.FromString(await submitted(world, "x"))
    world.boundary._write_seconds_max = 0.2
    wires.append(await Wire.open(world.server.address, window=0, reads=False))
    for _ in range(2):
        wires[0].call(f"{SERVICE}WatchJob", request.SerializeToString())
    await until(lambda: wires[0].open_streams <= 1)
    await served(world)
    await until_answered(wires[0])


# Who needs no token.


async def test_a_health_watch_that_is_not_read_holds_up_nobody(
    world: World, wires: list[Wire]
) -> None:
    wires.append(await Wire.open(world.server.address, window=0, reads=False))
    wires[0].call(WATCH, b"")
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS_MAX))
    assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING
    world.server.set_serving(False)
    assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_an_unknown_service_has_no_health(world: World) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    request = health_pb2.HealthCheckRequest(service="nobody")
    found = await refused(stub.Check(request, timeout=WAIT_SECONDS_MAX))
    assert found.code is grpc.StatusCode.NOT_FOUND
    answer = await anext(aiter(stub.Watch(request, timeout=WAIT_SECONDS_MAX)))
    assert answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("path", [WATCH, REFLECTION])
async def test_a_connection_has_few_streams_without_a_token(world: World, path: str) -> None:
    open_calls = []
    call: Any = world.channel.stream_stream(WATCH)
    for _ in range(2):
        open_calls.append(call(iter([b""]), timeout=WAIT_SECONDS_MAX))
        await open_calls[-1].read()
    call = world.channel.stream_stream(path)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(never(), timeout=WAIT_SECONDS_MAX).read()
    assert refusal(caught.value).reason == "LIMIT_REACHED"
    open_calls.pop().cancel()


async def test_the_connection_that_has_most_makes_room(world: World, wires: list[Wire]) -> None:
    for count in (2, 1):
        wires.append(await Wire.open(world.server.address))
        for _ in range(count):
            wires[-1].call(WATCH, b"")
    await until(lambda: len(world.boundary._crowd._streams) == 3)
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS_MAX)
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    await until(lambda: wires[0].open_streams == 1)
    assert (wires[0].open_streams, wires[1].open_streams) == (1, 1)


# A crowd that does nothing wrong.


@pytest.mark.timeout(120)
async def test_all_of_an_honest_crowd_are_answered(tmp_path: Path) -> None:
    async with running_world(tmp_path, CallBoundary(Access(None))) as world:
        request = pb.GetJobRequest.FromString(await submitted(world, "x"))
        calls = [world.stub.GetJob(request, timeout=100) for _ in range(5_000)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [each for each in answers if isinstance(each, BaseException)] == []
