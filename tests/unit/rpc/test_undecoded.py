"""What is refused of a request before it is decoded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from generated.jobsvc.v1 import admin_service_pb2, job_pb2, schedule_service_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.rpc.validate import MESSAGE_BYTES_MAX, undecoded
from jobsvc.rpc.validate.admin import cancel_jobs
from jobsvc.rpc.validate.undecoded import _INPUTS, BYTES_MAX, PLAIN_BYTES_MAX

MIB = 1024 * 1024
SUBMIT = "JobService/SubmitJob"
SUBMITS = "JobService/SubmitJobs"


def found(method: str, data: bytes) -> list[str]:
    return [violation.field for violation in undecoded(method, data)]


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def member(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def number(message: type[Message], name: str) -> int:
    return message.DESCRIPTOR.fields_by_name[name].number


def empties(message: type[Message], name: str, count: int = 2_000_000) -> bytes:
    return member(number(message, name), b"") * count


def text(value: str) -> Struct:
    return Struct(fields={"a": Value(string_value=value)})


def filtered(data: bytes) -> bytes:
    return member(number(pb.ListJobsRequest, "filter"), data)


@pytest.mark.parametrize(
    ("method", "data", "path"),
    [
        (
            "JobService/ListJobs",
            filtered(member(number(job_pb2.JobFilter, "states"), b"\x7f" * 4_000_000)),
            "filter.states",
        ),
        (
            "JobService/ListJobs",
            filtered(empties(job_pb2.JobFilter, "job_types")),
            "filter.job_types",
        ),
        (
            "JobService/WatchJobs",
            pb.WatchJobsRequest(resume_token="x" * MIB).SerializeToString(),
            "resume_token",
        ),
        (
            "AdminService/CancelJobs",
            filtered(empties(job_pb2.JobFilter, "labels")),
            "filter.labels",
        ),
        (
            "AdminService/UpdateQueue",
            admin_service_pb2.UpdateQueueRequest(
                update_mask={"paths": [""] * 2_000_000}  # type: ignore[arg-type]
            ).SerializeToString(),
            "update_mask",
        ),
        ("JobService/GetJob", b"\x78\x01" * MIB, "request"),
        ("/grpc.health.v1.Health/Check", b"\x0a\x00" * MIB, "request"),
        (SUBMIT, empties(pb.SubmitJobRequest, "labels"), "labels"),
        (
            "JobService/RunJob",
            pb.RunJobRequest(
                request=pb.SubmitJobRequest(payload_blob=job_pb2.Blob(data=b"x" * 3 * MIB))
            ).SerializeToString(),
            "request.payload_blob.data",
        ),
        (SUBMITS, empties(pb.SubmitJobsRequest, "requests"), "requests"),
        (SUBMITS, b"\x78\x01" * 2 * MIB, "requests"),
        (SUBMITS, b"\x7b\x7c" + empties(pb.SubmitJobsRequest, "requests"), "requests"),
        (
            SUBMITS,
            pb.SubmitJobsRequest(
                requests=[
                    pb.SubmitJobRequest(job_type="demo"),
                    pb.SubmitJobRequest(payload=text("x" * 2 * MIB)),
                ]
            ).SerializeToString(),
            "requests[1].payload",
        ),
    ],
)
def test_what_makes_a_request_too_long_is_named(method: str, data: bytes, path: str) -> None:
    assert len(data) > MIB / 2
    assert found(method, data) == [path]


def test_a_thousand_requests_of_four_mebibytes_in_all_are_fine() -> None:
    request = pb.SubmitJobRequest(job_type="demo", payload=text("x" * 4_100))
    data = pb.SubmitJobsRequest(requests=[request] * 1_000).SerializeToString()
    assert MESSAGE_BYTES_MAX * 0.9 < len(data) < MESSAGE_BYTES_MAX
    assert found(SUBMITS, data) == []


def test_a_request_that_is_as_long_as_other_rules_allow_is_fine() -> None:
    wide = "\U0001f600"
    wanted = job_pb2.JobFilter(
        states=[job_pb2.JOB_STATE_QUEUED] * 100,
        job_types=["x" * 100] * 100,
        queue="q" * 50,
        labels={f"l{index:061}": wide * 255 for index in range(32)},
        error_types=[wide * 255] * 100,
        idempotency_key=wide * 255,
    )
    request = admin_service_pb2.CancelJobsRequest(filter=wanted, reason=wide * 1_000)
    assert cancel_jobs(request) == []
    data = request.SerializeToString()
    assert len(data) < PLAIN_BYTES_MAX * 0.9
    assert found("AdminService/CancelJobs", data) == []


def inside(kind: Descriptor, above: tuple[Descriptor, ...] = ()) -> Iterator[FieldDescriptor]:
    for field in kind.fields:
        yield field
        if field.message_type is not None and field.message_type not in above:
            yield from inside(field.message_type, (*above, kind))


@pytest.mark.parametrize("method", _INPUTS)
def test_what_carries_a_payload_may_be_longer(method: str) -> None:
    carries = any(field.type == field.TYPE_BYTES for field in inside(_INPUTS[method]))
    assert carries == (method in BYTES_MAX)


@settings(deadline=None)
@given(st.sampled_from([SUBMITS, SUBMIT, "JobService/ListJobs"]), st.binary(max_size=200))
def test_bytes_of_any_kind_are_looked_at(method: str, start: bytes) -> None:
    assert undecoded(method, start) == []
    limit = BYTES_MAX.get(method, PLAIN_BYTES_MAX)
    assert method == SUBMITS or len(undecoded(method, start + bytes(limit))) == bool(start)


def test_a_schedule_may_carry_a_payload() -> None:
    request = schedule_service_pb2.CreateScheduleRequest()
    request.schedule.request.payload.CopyFrom(text("x" * (MIB - 100)))
    assert found("ScheduleService/CreateSchedule", request.SerializeToString()) == []
