"""What the server serves, its limits, its health and its end."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from generated.jobsvc.v1 import (
    admin_service_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    schedule_service_pb2,
)
from generated.jobsvc.v1.job_pb2 import JOB_STATE_QUEUED
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.rpc.server import OPTIONS, SERVICES, TLS_OPTIONS
from tests.rpc.conftest import World, running_world
from tests.rpc.status import read_into, refusal, refused, stream_refused

WAIT_SECONDS_MAX = 20
GRPCURL = shutil.which("grpcurl", path=Path(sys.executable).parent)
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)

METHODS = [
    method
    for file in (job_service_pb2, schedule_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def refusable(method: MethodDescriptor) -> bytes:
    """A request that the method refuses. To be empty is enough where anything is required."""
    request: Any = GetMessageClass(method.input_type)()
    for name, bad in (("page_size", -1), ("heartbeat_interval", Duration(seconds=-1))):
        if name in method.input_type.fields_by_name:
            request.MergeFrom(type(request)(**{name: bad}))
    data: bytes = request.SerializeToString()
    return data


def test_the_services_are_those_of_the_protos() -> None:
    assert {method.containing_service.full_name for method in METHODS} == set(SERVICES)


async def test_no_method_is_waited_for_by_itself(
    tmp_path: Path, boundary: CallBoundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each call would cost the more, the more methods there are."""
    registered = Mock()
    server = type(grpc.aio.server())
    monkeypatch.setattr(server, "add_registered_method_handlers", registered)
    async with running_world(tmp_path, boundary):
        pass
    assert registered.mock_calls == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_every_rpc_is_there_and_checks_what_it_is_given(
    world: World, method: MethodDescriptor
) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    request = refusable(method)
    if method.server_streaming:
        stream: Any = world.channel.unary_stream(path)
        found = await stream_refused(stream(request, timeout=WAIT_SECONDS_MAX))
    else:
        unary: Any = world.channel.unary_unary(path)
        found = await refused(unary(request, timeout=WAIT_SECONDS_MAX))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


# Limits.


def repeated(kind: Descriptor, path: str = "") -> Iterator[str]:
    """Its repeated fields, and those of what is in it, but for payloads."""
    for field in kind.fields:
        if field.is_repeated:
            yield path + field.name
        elif field.message_type is not None and field.message_type is not Struct.DESCRIPTOR:
            yield from repeated(field.message_type, f"{path}{field.name}.")


REPEATED = [(method, path) for method in METHODS for path in repeated(method.input_type)]


@pytest.mark.parametrize(
    ("method", "path"), REPEATED, ids=lambda value: getattr(value, "full_name", value)
)
async def test_what_is_repeated_too_often_is_refused_unseen(
    world: World, method: MethodDescriptor, path: str
) -> None:
    """One violation, however many elements there are."""
    request: Any = GetMessageClass(method.input_type)()
    part = request
    *places, name = path.split(".")
    for place in places:
        part = getattr(part, place)
        part.SetInParent()
    field = part.DESCRIPTOR.fields_by_name[name]
    many = getattr(part, name)
    for number in range(2_000):
        if field.message_type is None:
            many.append("" if field.type == field.TYPE_STRING else 99)
        elif field.message_type.GetOptions().map_entry:
            many[str(number)] = "\n"
        else:
            many.add()
    if path.endswith("labels") and "update_mask" in method.input_type.fields_by_name:
        request.update_mask.paths.append("labels" if path == "labels" else "request")
    rpc, data = f"/{method.containing_service.full_name}/{method.name}", request.SerializeToString()
    if method.server_streaming:
        stream: Any = world.channel.unary_stream(rpc)
        found = await stream_refused(stream(data, timeout=WAIT_SECONDS_MAX))
    else:
        unary: Any = world.channel.unary_unary(rpc)
        found = await refused(unary(data, timeout=WAIT_SECONDS_MAX))
    place = path.removesuffix(".paths")
    assert [field for field in found.fields if field.startswith(place)] == [place]


async def test_a_message_over_the_limit_is_refused_by_grpc(world: World) -> None:
    blob = job_service_pb2.SubmitJobRequest(job_type="demo")
    blob.payload_blob.data = b"x" * 5 * 1024 * 1024
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.SubmitJob(blob)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_over_the_limit_is_refused_by_grpc(world: World) -> None:
    request = job_service_pb2.SubmitJobRequest(job_type="demo")
    metadata = (("x", "y" * 20_000),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.SubmitJob(request, metadata=metadata, timeout=WAIT_SECONDS_MAX)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_taken_port_is_an_error(world: World) -> None:
    other = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    with pytest.raises(RuntimeError):
        other.add_insecure_port(world.server.address)
    host, _, port = world.server.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_grpc_knows_the_options_by_their_names() -> None:
    """What it does not know it ignores, without a word."""
    (core,) = Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")
    known = core.read_bytes()
    for name, _ in (*OPTIONS, *TLS_OPTIONS):
        assert name.encode() + b"\0" in known, name


async def test_a_client_that_waits_may_ping_once_a_second(world: World) -> None:
    """Three pings that come too early would end its connection."""
    job = (await world.stub.SubmitJob(job_service_pb2.SubmitJobRequest(job_type="demo"))).job
    request = job_service_pb2.GetResultRequest(job_id=job.job_id, wait=Duration(seconds=6))
    options = [("grpc.keepalive_time_ms", 1_000), ("grpc.http2.max_pings_without_data", 0)]
    async with grpc.aio.insecure_channel(world.server.address, options=options) as channel:
        stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
        answer = await stub.GetResult(request, timeout=WAIT_SECONDS_MAX)
    assert answer.state == JOB_STATE_QUEUED


# Reflection.


async def grpcurl(world: World, *arguments: str) -> str:
    assert GRPCURL is not None
    process = await asyncio.create_subprocess_exec(
        *(GRPCURL, "-plaintext", "-max-time", str(WAIT_SECONDS_MAX), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    text = output.decode()
    assert process.returncode == 0, text
    return text


async def test_a_stranger_finds_everything_by_reflection(world: World) -> None:
    address = world.server.address
    assert (await grpcurl(world, address, "list")).split() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "jobsvc.v1.AdminService",
        "jobsvc.v1.JobService",
        "jobsvc.v1.ScheduleService",
    ]
    for service in (*SERVICES, "grpc.reflection.v1.ServerReflection"):
        assert "rpc " in await grpcurl(world, address, "describe", service)
    data = '{"job_type": "demo", "payload": {"a": 1}}'
    answer = await grpcurl(world, "-d", data, address, "jobsvc.v1.JobService/SubmitJob")
    assert "JOB_STATE_QUEUED" in answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_under_both_names(world: World, version: str) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call: Any = world.channel.stream_stream(path)
    # file_containing_symbol = 4
    name = b"jobsvc.v1.JobService"
    answers = [each async for each in call(iter([b"\x22" + bytes([len(name)]) + name]))]
    assert len(answers) == 1
    assert b"jobsvc/v1/job_service.proto" in answers[0]


# Health.


async def health(world: World) -> set[int]:
    """The statuses of all services and of the server as a whole."""
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    return {
        (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
        for service in ("", *SERVICES)
    }


async def test_health_follows_what_the_server_is_told(world: World) -> None:
    assert await health(world) == {SERVING}
    world.server.set_serving(False)
    assert await health(world) == {NOT_SERVING}
    world.server.set_serving(True)
    assert await health(world) == {SERVING}


# The end.


async def next_status(statuses: Any) -> int:
    answer = await anext(statuses)
    status: int = answer.status
    return status


async def test_a_drain_sends_streams_away_and_finishes_what_has_begun(world: World) -> None:
    job = (await world.stub.SubmitJob(job_service_pb2.SubmitJobRequest(job_type="demo"))).job
    watch = aiter(
        world.stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.job_id, after_sequence=1))
    )
    assert (await anext(watch)).HasField("heartbeat")
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
    assert await next_status(statuses) == SERVING

    async with asyncio.timeout(WAIT_SECONDS_MAX):
        submits = [
            asyncio.ensure_future(
                world.stub.SubmitJob(job_service_pb2.SubmitJobRequest(job_type="demo"))
            )
            for _ in range(20)
        ]
        # Those have begun once one of them is answered, or are refused as late comers.
        await asyncio.wait(submits, return_when=asyncio.FIRST_COMPLETED)
        await world.server.stop(grace_seconds=WAIT_SECONDS_MAX)
        assert await next_status(statuses) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_into([], watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(caught.value).reason == "DRAINING"
        answered = [
            each
            for each in await asyncio.gather(*submits, return_exceptions=True)
            if isinstance(each, job_service_pb2.SubmitJobResponse)
        ]
    assert answered
    for each in answered:
        await world.threads.run(world.house.get, each.job.job_id)


async def test_a_drain_is_over_when_its_grace_is(world: World) -> None:
    held = asyncio.Event()

    async def hold() -> None:
        with world.boundary._under_way:
            await held.wait()

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await world.server.stop(grace_seconds=0.05)
    held.set()
    await holding
