"""Whatever a client sends, it is answered by the table of errors, and never with INTERNAL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.rpc.access import Access
from jobsvc.rpc.interceptors import CallBoundary
from tests.rpc.conftest import running_world
from tests.rpc.status import refusal

JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
SECONDS_MAX = 20
REASONS = {
    *("INVALID_FIELD", "UNDECODABLE"),
    *("JOB_UNKNOWN", "IDEMPOTENCY_KEY_REUSED", "UNIQUE_CONFLICT"),
}
REQUESTS: dict[str, type[Message]] = {
    "SubmitJob": pb.SubmitJobRequest,
    "SubmitJobs": pb.SubmitJobsRequest,
    "RunJob": pb.RunJobRequest,
    "GetJob": pb.GetJobRequest,
    "GetResult": pb.GetResultRequest,
    "WatchJob": pb.WatchJobRequest,
    "ListJobEvents": pb.ListJobEventsRequest,
    "CancelJob": pb.CancelJobRequest,
    "RetryJob": pb.RetryJobRequest,
    "UpdateJob": pb.UpdateJobRequest,
    "DeleteJob": pb.DeleteJobRequest,
}
STREAMS = {"RunJob", "WatchJob"}

# Each kind of field: often what passes, so that what lies behind it is reached too.
TEXTS = st.sampled_from(["demo", "default", "k", "priority", "", JOB_ID]) | st.text()
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=100),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_ENUM: st.integers(-2, 9),
    FieldDescriptor.TYPE_INT32: st.integers(0, 9) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(0, 9_999) | st.integers(-(2**63), 2**63 - 1),
}
DEPTH_MAX = 6


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 0) -> Message:
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if depth <= DEPTH_MAX and draw(st.booleans()):
            fill(draw, made, field, depth)
    return made


def fill(draw: Any, made: Any, field: Any, depth: int = 0) -> None:
    kind: Any = field.message_type
    if kind is None and field.is_repeated:
        getattr(made, field.name).extend(draw(st.lists(SCALARS[field.type], max_size=3)))
        return
    if kind is None:
        setattr(made, field.name, draw(SCALARS[field.type]))
        return
    target = getattr(made, field.name)
    if kind.GetOptions().map_entry:
        value = kind.fields_by_name["value"].message_type
        for key in draw(st.lists(TEXTS, max_size=3)):
            if value is None:
                target[key] = draw(TEXTS)
            else:
                target[key].CopyFrom(draw(messages(GetMessageClass(value), depth + 1)))
    elif field.is_repeated:
        inner = messages(GetMessageClass(kind), depth + 1)
        target.extend(draw(st.lists(inner, max_size=3)))
    else:
        target.CopyFrom(draw(messages(GetMessageClass(kind), depth + 1)))


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    """To a server in a thread of its own: hypothesis knows no coroutines."""
    address: Future[str] = Future()
    stop = threading.Event()

    async def serve() -> None:
        directory = tmp_path_factory.mktemp("fuzz")
        async with running_world(directory, CallBoundary(Access(None))) as world:
            address.set_result(world.server.address)
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        with grpc.insecure_channel(address.result(SECONDS_MAX)) as channel:
            yield channel
    finally:
        stop.set()
        thread.join()


def call(channel: grpc.Channel, method: str, data: bytes) -> str:
    """The reason that the call is refused for; empty if it is not. Of a stream one message is
    enough."""
    path = f"/jobsvc.v1.JobService/{method}"
    try:
        if method in STREAMS:
            stream: Any = channel.unary_stream(path)
            answers = stream(data, timeout=SECONDS_MAX)
            next(answers)
            answers.cancel()
        else:
            unary: Any = channel.unary_unary(path)
            unary(data, timeout=SECONDS_MAX)
    except grpc.RpcError as error:
        return refusal(error).reason
    return ""


@pytest.mark.parametrize("method", REQUESTS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(channel: grpc.Channel, method: str, data: bytes) -> None:
    assert call(channel, method, data) in REASONS | {""}


@pytest.mark.parametrize("method", REQUESTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_messages(channel: grpc.Channel, method: str, data: st.DataObject) -> None:
    request = data.draw(messages(REQUESTS[method]))
    assert call(channel, method, request.SerializeToString()) in REASONS | {""}


@pytest.mark.parametrize("name", [field.name for field in pb.SubmitJobRequest.DESCRIPTOR.fields])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_one_random_field_in_a_request_that_passes(
    channel: grpc.Channel, name: str, data: st.DataObject
) -> None:
    """Among many some are always refused, and nothing is stored."""
    request = pb.SubmitJobRequest(job_type="demo")
    fill(data.draw, request, request.DESCRIPTOR.fields_by_name[name])
    assert call(channel, "SubmitJob", request.SerializeToString()) in REASONS | {""}
