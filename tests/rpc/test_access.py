"""Who may call what."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from generated.jobsvc.v1 import job_service_pb2 as pb
from generated.jobsvc.v1.job_pb2 import JOB_STATE_QUEUED
from jobsvc.rpc import access
from jobsvc.rpc.access import LASTING, NEEDED, Access, follow_tokens
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.tokens import SCOPES, Token
from tests.rpc.conftest import World
from tests.rpc.status import Refusal, read_into, refused, stream_refused
from tests.rpc.test_server import METHODS, refusable

WAIT_SECONDS_MAX = 20
# By scope, as the contract says it; whatever is in none of them needs `admin`.
SUBMIT = {"SubmitJob", "SubmitJobs", "RunJob", "UpdateJob", "RetryJob"}
READ = {
    *("GetJob", "GetResult", "ListJobs", "ListJobEvents", "WatchJob", "WatchJobs"),
    *("ExplainJob", "ListJobTypes", "RunJob"),
}
CANCEL = {"CancelJob"}
UNAUTHENTICATED = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
SCOPE_MISSING = (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")

each_rpc = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)


def line(name: str, text: str, scopes: str) -> str:
    return f"{name}  {hashlib.sha256(text.encode()).hexdigest()}  {scopes}\n"


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {text}"),)


# One token for each scope, and one for each set of all but one; the text is as the scopes.
SETS = [*SCOPES, "submit read", "read cancel", "submit cancel", "submit read cancel"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("".join(line(scopes.replace(" ", "-"), scopes, scopes) for scopes in SETS))
    return path


@pytest.fixture
def boundary(path: Path, monkeypatch: pytest.MonkeyPatch) -> CallBoundary:
    monkeypatch.setattr(access, "FOLLOW_SECONDS", 0.02)
    return CallBoundary(Access(follow_tokens("", str(path))))


def needed(method: MethodDescriptor) -> set[str]:
    if method.containing_service.name == "JobService":
        scopes = {"submit": SUBMIT, "read": READ, "cancel": CANCEL}
        found = {scope for scope, names in scopes.items() if method.name in names}
        if found:
            return found
    return {"admin"}


async def call(world: World, method: MethodDescriptor, data: bytes, metadata: Any) -> Refusal:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.server_streaming:
        stream: Any = world.channel.unary_stream(path)
        return await stream_refused(stream(data, metadata=metadata, timeout=WAIT_SECONDS_MAX))
    unary: Any = world.channel.unary_unary(path)
    return await refused(unary(data, metadata=metadata, timeout=WAIT_SECONDS_MAX))


def test_the_table_has_every_rpc_of_the_protos() -> None:
    named = {f"{method.containing_service.name}/{method.name}": method for method in METHODS}
    assert {name: set(scopes) for name, scopes in NEEDED.items()} == {
        name: needed(method) for name, method in named.items()
    }


@each_rpc
async def test_nobody_calls_without_a_token(world: World, method: MethodDescriptor) -> None:
    for metadata in ((), bearer("unknown")):
        found = await call(world, method, b"\xff", metadata)  # not even decoded
        assert (found.code, found.reason) == UNAUTHENTICATED
        assert "unknown" not in found.message


@each_rpc
async def test_the_scopes_that_are_needed_are_enough_and_no_others_are(
    world: World, method: MethodDescriptor
) -> None:
    for scopes in SETS:
        allowed = "admin" in scopes or needed(method) <= set(scopes.split())
        data = refusable(method) if allowed else b"\xff"
        found = await call(world, method, data, bearer(scopes))
        if allowed:
            assert found.reason == "INVALID_FIELD"
        else:
            assert (found.code, found.reason) == SCOPE_MISSING
            assert all(scope in found.message for scope in needed(method))


@pytest.mark.parametrize(
    "values",
    [
        ["admin"],
        ["Bearer"],
        ["Bearer "],
        ["Basic admin"],
        ["Beareradmin"],
        ["Bearer admin x"],
        ["Bearer admin", "Bearer admin"],
        ["Bearer admin", "Bearer unknown"],
    ],
)
async def test_credentials_of_another_form_are_refused(world: World, values: list[str]) -> None:
    metadata = tuple(("authorization", value) for value in values)
    found = await refused(world.stub.GetJob(pb.GetJobRequest(), metadata=metadata))
    assert (found.code, found.reason) == UNAUTHENTICATED


async def test_the_scheme_may_be_written_in_any_case(world: World) -> None:
    metadata = (("authorization", "bearer  admin"),)
    found = await refused(world.stub.GetJob(pb.GetJobRequest(), metadata=metadata))
    assert found.reason == "INVALID_FIELD"


@pytest.mark.parametrize("scopes", ["", "submit"])
async def test_a_refusal_waits_for_no_request(world: World, scopes: str) -> None:
    never = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    unary: Any = world.channel.stream_unary("/jobsvc.v1.JobService/GetJob")
    metadata = bearer(scopes) if scopes else ()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        found = await refused(unary(silent(), metadata=metadata))
    assert (found.code, found.reason) == (SCOPE_MISSING if scopes else UNAUTHENTICATED)


async def test_health_and_reflection_ask_for_no_token(world: World) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="jobsvc.v1.JobService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))).status
    for version in ("v1", "v1alpha"):
        path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        reflection: Any = world.channel.stream_stream(path)
        list_services = b"\x3a\x01*"
        answers = [each async for each in reflection(iter([list_services]))]
        assert b"jobsvc.v1.JobService" in answers[0]


async def submitted(world: World, text: str) -> Any:
    request = pb.SubmitJobRequest(job_type="demo")
    return (await world.stub.SubmitJob(request, metadata=bearer(text))).job


async def test_the_actor_is_the_name_of_the_token(world: World) -> None:
    texts = ["submit", "admin", "submit read"] * 5
    jobs = await asyncio.gather(*(submitted(world, text) for text in texts))
    request = pb.CancelJobRequest(job_id=jobs[0].job_id)
    with capture_logs() as records:
        await world.stub.CancelJob(request, metadata=bearer("read cancel"))
    assert {each.get("actor") for each in records} == {"read-cancel"}
    for job, text in zip(jobs, texts, strict=True):
        listed = pb.ListJobEventsRequest(job_id=job.job_id)
        answer = await world.stub.ListJobEvents(listed, metadata=bearer("read"))
        assert answer.events[0].actor == text.replace(" ", "-")
        assert [each.actor for each in answer.events[1:]] == ["read-cancel"] * (job is jobs[0])


async def test_no_token_is_logged(world: World) -> None:
    with capture_logs() as records:
        await submitted(world, "submit read cancel")
        for text in ("hunter2 hunter2", "submit read cancel"):
            await refused(world.stub.GetJob(pb.GetJobRequest(), metadata=bearer(text)))
    refusals = [each for each in records if each["event"] == "call refused"]
    assert [each.get("actor") for each in refusals] == [None, "submit-read-cancel"]
    assert "hunter2" not in str(records)
    assert "submit read cancel" not in str(records)


def literal(name: bytes, value: bytes) -> bytes:
    """A header, as HPACK has it without any table."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def test_a_token_that_is_no_text_is_not_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    headers = b"".join(
        literal(name, value)
        for name, value in {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": b"/jobsvc.v1.JobService/GetJob",
            b":authority": b"localhost",
            b"content-type": b"application/grpc",
            b"te": b"trailers",
            b"authorization": b"Bearer hunter2\xff",
        }.items()
    )
    host, _, port = world.server.address.rpartition(":")
    with capture_logs() as records:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            writer.write(len(headers).to_bytes(3) + b"\1\5\0\0\0\1" + headers)
            await reader.readuntil(b"grpc-message")
            writer.close()
            await writer.wait_closed()
    assert [each["reason"] for each in records if each["event"] == "call refused"] == [
        "UNAUTHENTICATED"
    ]
    assert caplog.records == []
    assert "hunter2" not in str(records)


# Changes of the file.


async def watching(world: World, text: str) -> tuple[Any, Any]:
    """A stream that has begun and has nothing more to tell, and the call that it is of."""
    job = await submitted(world, "admin")
    request = pb.WatchJobRequest(job_id=job.job_id, after_sequence=1)
    call = world.stub.WatchJob(request, metadata=bearer(text), timeout=WAIT_SECONDS_MAX)
    stream = aiter(call)
    assert (await anext(stream)).HasField("heartbeat")
    return stream, call


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def edited(world: World, path: Path, text: str) -> None:
    """Returns once the change is known: a new token is part of it."""
    write(path, text + line("probe", str(len(text)), "read"))
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            request = world.stub.GetJob(pb.GetJobRequest(), metadata=bearer(str(len(text))))
            if (await refused(request)).reason == "INVALID_FIELD":
                return


async def test_a_token_that_is_taken_away_ends_its_streams_alone(world: World, path: Path) -> None:
    (ends, _), (narrowed, _), (_, stays) = [
        await watching(world, text) for text in ("read", "submit read", "read cancel")
    ]
    request = pb.RunJobRequest(request=pb.SubmitJobRequest(job_type="demo"))
    run = aiter(world.stub.RunJob(request, metadata=bearer("submit read cancel")))
    job_id = (await anext(run)).event.job_id
    await edited(
        world,
        path,
        line("x", "submit read", "submit")
        + line("x", "read cancel", "read")
        + line("admin", "admin", "admin"),
    )
    found = await stream_refused(ends)
    assert (found.code, found.reason) == UNAUTHENTICATED
    found = await stream_refused(narrowed)
    assert (found.code, found.reason) == SCOPE_MISSING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_into([], run)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    # The job of the run goes on, and so does the watch of the token that still may.
    job = await world.stub.GetJob(pb.GetJobRequest(job_id=job_id), metadata=bearer("admin"))
    assert job.job.state == JOB_STATE_QUEUED
    assert not stays.done()
    stays.cancel()


def test_calls_that_wait_are_known_to_last() -> None:
    waiting = {
        f"{method.containing_service.name}/{method.name}"
        for method in METHODS
        if "wait" in method.input_type.fields_by_name
    }
    assert waiting
    assert waiting <= LASTING


async def test_a_token_that_is_taken_away_ends_its_waits(world: World, path: Path) -> None:
    job = await submitted(world, "admin")
    request = pb.GetResultRequest(job_id=job.job_id, wait=Duration(seconds=50))
    ends, stays = (world.stub.GetResult(request, metadata=bearer(s)) for s in ("read", "admin"))
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while len(world.boundary.access._held) < 2:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)
        await edited(world, path, line("admin", "admin", "admin"))
        found = await refused(ends)
    assert (found.code, found.reason) == UNAUTHENTICATED
    assert not stays.done()
    stays.cancel()


async def test_a_file_that_is_touched_all_the_time_is_read(world: World, path: Path) -> None:
    async def touch() -> None:
        while True:
            os.utime(path)
            await asyncio.sleep(0.001)

    touching = asyncio.create_task(touch())
    await edited(world, path, line("admin", "admin", "admin"))
    touching.cancel()


async def test_a_bad_edit_takes_nothing_away(world: World, path: Path) -> None:
    _, call = await watching(world, "read")
    with capture_logs() as records:
        write(path, "hunter2\n")
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not any(  # noqa: ASYNC110 - a log has no event
                each["log_level"] == "error" for each in records
            ):
                await asyncio.sleep(0.01)
    assert "line 1" in str(records)
    assert "hunter2" not in str(records)
    await submitted(world, "submit")
    await edited(world, path, line("x", "read", "read"))
    assert not call.done()
    call.cancel()


async def test_an_empty_file_shuts_everybody_out(world: World, path: Path) -> None:
    stream, _ = await watching(world, "read")
    write(path, "# nobody\n")
    assert (await stream_refused(stream)).reason == "UNAUTHENTICATED"
    assert (await refused(world.stub.GetJob(pb.GetJobRequest()))).reason == "UNAUTHENTICATED"


async def test_a_request_that_comes_after_its_token_is_gone_is_refused(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted, go_on = asyncio.Event(), asyncio.Event()
    admit = world.boundary.access.admit

    def tell(*arguments: Any) -> Token:
        token = admit(*arguments)
        admitted.set()
        return token

    monkeypatch.setattr(world.boundary.access, "admit", tell)

    async def late() -> AsyncIterator[bytes]:
        await go_on.wait()
        yield b""

    unary: Any = world.channel.stream_unary("/jobsvc.v1.JobService/GetJob")
    asked = asyncio.ensure_future(refused(unary(late(), metadata=bearer("read"))))
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await admitted.wait()
        await edited(world, path, line("admin", "admin", "admin"))
        go_on.set()
        found = await asked
    assert (found.code, found.reason) == UNAUTHENTICATED


async def test_tokens_of_a_text_hold_for_good() -> None:
    tokens = follow_tokens(line("ci", "text", "read"), "")
    assert tokens is not None
    assert tokens.current.find("text")
    assert not tokens.refresh()
    assert follow_tokens("", "") is None
