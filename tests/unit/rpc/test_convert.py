"""Messages to the model and back."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import Input, JobError, Log, Output, Progress, Report
from jobsvc.core.model import (
    Concurrency,
    Job,
    JobEvent,
    JobOutcome,
    NewJob,
    OnConflict,
    RetryPolicy,
    Unique,
    UniqueScope,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.rpc import convert
from jobsvc.rpc.paging import page_size
from jobsvc.services.jobs import Submitted
from jobsvc.services.watch import Heartbeat

JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TIME = datetime(2026, 11, 24, 23, 12, 16, 278_084, UTC)
ERROR = JobError("ValueError", "no", "line 1", retryable=True)


def new_job(text: str) -> NewJob:
    request = text_format.Merge(text, pb.SubmitJobRequest(job_type="demo"))
    return convert.new_job(request, "alice", TRACE_ID)


def test_what_the_caller_left_out_stays_open() -> None:
    job = new_job("")
    assert UUID(job.job_id).version == 7
    assert str(UUID(job.job_id)) == job.job_id
    assert job == NewJob(job.job_id, "demo", actor="alice", trace_id=TRACE_ID)


def test_every_field_of_a_request_arrives() -> None:
    job = new_job(
        "queue: 'q' priority: 3 schedule_time { seconds: 1 nanos: 2999 } ttl { nanos: 500000000 }"
        " max_attempts: 4 retry_policy { initial_backoff { seconds: 2 } backoff_multiplier: 3"
        " max_backoff { seconds: 4 } jitter: 0.5 } timeout { seconds: 6 } retention { seconds: 7 }"
        " labels { key: 'a' value: 'b' } concurrency { key: 'c' max_running: 8 }"
        " unique { key: 'u' scope: UNIQUE_SCOPE_WAITING on_conflict: UNIQUE_CONFLICT_REJECT }"
        " payload_blob { content_type: 'c/d' data: 'e' }"
    )
    assert job == NewJob(
        job_id=job.job_id,
        job_type="demo",
        input=Input(b"e", "c/d"),
        queue="q",
        priority=3,
        schedule_time=datetime(1970, 1, 1, 0, 0, 1, 2, UTC),
        ttl=0.5,
        max_attempts=4,
        retry_policy=RetryPolicy(2, 3, 4, 0.5),
        timeout=6,
        unique=Unique("u", UniqueScope.WAITING, OnConflict.REJECT),
        concurrency=Concurrency("c", 8),
        retention=7,
        labels={"a": "b"},
        actor="alice",
        trace_id=TRACE_ID,
    )
    assert new_job("unique { key: 'u' }").unique == Unique("u")
    other = new_job("delay {} expire_time { seconds: -1 }")
    assert other.delay == 0.0
    assert other.expire_time == datetime(1969, 12, 31, 23, 59, 59, 0, UTC)


def test_the_edges_of_time() -> None:
    assert new_job("schedule_time { seconds: -62135596800 }").schedule_time == datetime(
        1, 1, 1, tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", RetryPolicy(10, 2, 3600, 0.2)),
        ("backoff_multiplier: 1 jitter: 0", RetryPolicy(10, 1, 3600, 0)),
        ("initial_backoff {}", RetryPolicy(0, 2, 3600, 0.2)),
        ("initial_backoff { seconds: 7200 }", RetryPolicy(7200, 2, 7200, 0.2)),
        ("max_backoff { seconds: 20 }", RetryPolicy(10, 2, 20, 0.2)),
    ],
)
def test_defaults_of_the_retry_policy(text: str, policy: RetryPolicy) -> None:
    assert new_job(f"retry_policy {{ {text} }}").retry_policy == policy


def test_a_payload_is_kept_in_wire_form() -> None:
    job = new_job("payload { fields { key: 'a' value { number_value: -0.0 } } }")
    assert job.input.content_type is None
    payload = Struct.FromString(job.input.data)
    assert str(payload.fields["a"].number_value) == "-0.0"
    assert new_job("payload {}").input == Input(b"", None)
    assert new_job("payload_blob {}").input == Input(b"", "")


def request_hash(text: str) -> bytes:
    return new_job(f"idempotency_key: 'k' {text}").request_hash


def test_equal_requests_have_equal_hashes() -> None:
    pairs = [f"labels {{ key: 'k{n}' value: 'v' }}" for n in range(20)]
    values = [f"fields {{ key: 'k{n}' value {{ number_value: {n} }} }}" for n in range(20)]
    one = request_hash(f"{' '.join(pairs)} payload {{ {' '.join(values)} }}")
    other = request_hash(f"{' '.join(pairs[::-1])} payload {{ {' '.join(values[::-1])} }}")
    assert one == other
    assert len(one) == 32
    assert request_hash("validate_only: true priority: 3") == request_hash("priority: 3")


@pytest.mark.parametrize(
    "text",
    [
        *("priority: 1", "labels { key: 'a' value: 'b' }", "payload {}", "payload_blob {}"),
        *("delay {}", "ttl { seconds: 1 }", "timeout { seconds: 1 }", "retry_policy {}"),
    ],
)
def test_other_requests_have_other_hashes(text: str) -> None:
    assert request_hash(text) != request_hash("")


def test_only_a_key_needs_a_hash() -> None:
    assert new_job("priority: 3").request_hash == b""


def test_hashing_leaves_the_request_as_it_was() -> None:
    request = pb.SubmitJobRequest(job_type="demo", idempotency_key="k", validate_only=True)
    convert.new_job(request, "alice", TRACE_ID)
    assert request.validate_only


@pytest.mark.parametrize(("asked", "size"), [(0, 50), (1, 1), (1_000, 1_000), (1_001, 1_000)])
def test_page_sizes(asked: int, size: int) -> None:
    assert page_size(asked) == size


def test_heartbeat_intervals() -> None:
    request = pb.WatchJobRequest()
    assert convert.heartbeat_seconds(request) == 15
    request.heartbeat_interval.FromMilliseconds(1_500)
    assert convert.heartbeat_seconds(request) == 1.5


# Answers.

JOB = Job(
    job_id=JOB_ID,
    job_type="demo",
    queue="q",
    state=JobState.RETRYING,
    priority=1,
    attempt=2,
    max_attempts=3,
    retry_policy=RetryPolicy(1.5, 2, 3, 0.4),
    timeout=4,
    create_time=TIME,
    last_sequence=5,
    labels={"a": "b"},
    idempotency_key="k",
    unique=Unique("u", UniqueScope.WAITING, OnConflict.REPLACE),
    concurrency=Concurrency("c", 8),
    schedule_time=TIME + timedelta(seconds=1),
    start_time=TIME + timedelta(seconds=2),
    finish_time=TIME + timedelta(seconds=3),
    next_attempt_time=TIME + timedelta(seconds=4),
    expire_time=TIME + timedelta(seconds=5),
    purge_time=TIME + timedelta(seconds=6),
    progress=Progress(6, 7, "p"),
    error=ERROR,
    worker_id="w",
    cancel_requested=True,
    trace_id=TRACE_ID,
)
BARE = Job(
    *(JOB_ID, "demo", "q", JobState.QUEUED, 0, 0, 10, RetryPolicy(), 1800.0, TIME, 1),
    schedule_time=TIME,
)


def as_dict(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def test_every_field_of_a_job_is_told() -> None:
    assert as_dict(convert.job(JOB)) == {
        "job_id": JOB_ID,
        "job_type": "demo",
        "queue": "q",
        "state": "JOB_STATE_RETRYING",
        "labels": {"a": "b"},
        "priority": 1,
        "attempt": 2,
        "max_attempts": 3,
        "retry_policy": {
            "initial_backoff": "1.500s",
            "backoff_multiplier": 2.0,
            "max_backoff": "3s",
            "jitter": 0.4,
        },
        "timeout": "4s",
        "idempotency_key": "k",
        "unique": {
            "key": "u",
            "scope": "UNIQUE_SCOPE_WAITING",
            "on_conflict": "UNIQUE_CONFLICT_REPLACE",
        },
        "concurrency": {"key": "c", "max_running": 8},
        "create_time": "2026-11-24T23:12:16.278084Z",
        "schedule_time": "2026-11-24T23:12:17.278084Z",
        "start_time": "2026-11-24T23:12:18.278084Z",
        "finish_time": "2026-11-24T23:12:19.278084Z",
        "next_attempt_time": "2026-11-24T23:12:20.278084Z",
        "expire_time": "2026-11-24T23:12:21.278084Z",
        "purge_time": "2026-11-24T23:12:22.278084Z",
        "progress": {"current": 6.0, "total": 7.0, "message": "p"},
        "error": {"type": "ValueError", "message": "no", "traceback": "line 1", "retryable": True},
        "worker_id": "w",
        "cancel_requested": True,
        "last_sequence": "5",
        "trace_id": TRACE_ID,
    }


def test_the_model_has_no_field_that_the_message_lacks() -> None:
    model = {each.name for each in fields(Job)} - {"input"}
    message = set(job_pb2.Job.DESCRIPTOR.fields_by_name)
    lacking = {"payload", "payload_blob"}
    assert model == message - lacking


def test_what_a_job_does_not_have_stays_unset() -> None:
    told = {field.name for field, _ in convert.job(BARE).ListFields()}
    assert told == {
        *("job_id", "job_type", "queue", "state", "max_attempts", "retry_policy", "timeout"),
        *("create_time", "schedule_time", "last_sequence"),
    }


def test_spans_are_told_to_the_nanosecond() -> None:
    made = convert.job(replace(BARE, timeout=1.999999999))
    assert (made.timeout.seconds, made.timeout.nanos) == (1, 999_999_999)
    made = convert.job(replace(BARE, timeout=86_399.999999999))
    assert (made.timeout.seconds, made.timeout.nanos) == (86_399, 999_999_999)


def test_times_before_1970_have_nanos_that_go_forward() -> None:
    made = convert.job(replace(BARE, expire_time=datetime(1969, 12, 31, 23, 59, 59, 250_000, UTC)))
    assert (made.expire_time.seconds, made.expire_time.nanos) == (-1, 250_000_000)


def test_the_payload_comes_only_where_it_was_asked_for() -> None:
    payload = Struct()
    payload.update({"a": [1, None]})
    with_payload = replace(BARE, input=Input(payload.SerializeToString()))
    assert convert.job(with_payload).WhichOneof("input") is None
    assert convert.get_response(with_payload).job.payload == payload
    empty = convert.get_response(replace(BARE, input=Input())).job
    assert empty.WhichOneof("input") == "payload"
    blob = convert.get_response(replace(BARE, input=Input(b"\xff", ""))).job
    assert blob.WhichOneof("input") == "payload_blob"
    assert blob.payload_blob == job_pb2.Blob(data=b"\xff")
    with pytest.raises(ValueError, match="without its payload"):
        convert.get_response(BARE)


def test_of_a_deleted_job_its_id_is_left() -> None:
    told = convert.submit_response(Submitted(JOB_ID, None, already_existed=True))
    assert told == pb.SubmitJobResponse(job=job_pb2.Job(job_id=JOB_ID), already_existed=True)


def test_results() -> None:
    def told(state: JobState, **outcome: Any) -> pb.GetResultResponse:
        return convert.result(JobOutcome(JOB_ID, state, **outcome))

    assert told(JobState.RUNNING) == pb.GetResultResponse(
        job_id=JOB_ID, state=job_pb2.JOB_STATE_RUNNING
    )
    null = told(JobState.SUCCEEDED, result=Input(Value(null_value=NULL_VALUE).SerializeToString()))
    assert null.result.WhichOneof("kind") == "null_value"
    blob = told(JobState.SUCCEEDED, result=Input(b"x", "a/b"))
    assert blob.result_blob == job_pb2.Blob(content_type="a/b", data=b"x")
    failed = told(JobState.FAILED, error=ERROR)
    assert failed.WhichOneof("outcome") == "error"
    assert failed.error.type == "ValueError"


# Events.


def event(sequence: int = 3, report: Report | None = None, **more: Any) -> JobEvent:
    kind = EventType.PROGRESS if report else EventType.STARTED
    return JobEvent(*(JOB_ID, sequence, kind, TIME, JobState.RUNNING, 1), report=report, **more)


def test_every_field_of_an_event_is_told() -> None:
    failed = event(worker_id="w", error=ERROR, next_attempt_time=TIME, actor="alice")
    assert as_dict(convert.event(failed)) == {
        "job_id": JOB_ID,
        "sequence": "3",
        "type": "JOB_EVENT_TYPE_STARTED",
        "event_time": "2026-11-24T23:12:16.278084Z",
        "state": "JOB_STATE_RUNNING",
        "attempt": 1,
        "worker_id": "w",
        "error": {"type": "ValueError", "message": "no", "traceback": "line 1", "retryable": True},
        "next_attempt_time": "2026-11-24T23:12:16.278084Z",
        "actor": "alice",
    }


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (Progress(1, 2, "m"), "progress { current: 1 total: 2 message: 'm' }"),
        (Log("WARNING", "m"), "log { level: LOG_LEVEL_WARNING message: 'm' }"),
        (Output(text="t"), "output { text: 't' }"),
        (Output(text=""), "output { text: '' }"),
        (Output(data=b"d"), "output { data: 'd' }"),
        (Output(data=b""), "output { data: '' }"),
    ],
)
def test_reports(report: Report, told: str) -> None:
    expected = text_format.Merge(told, convert.event(event()))
    expected.type = job_pb2.JOB_EVENT_TYPE_PROGRESS
    assert convert.event(event(report=report)) == expected


def test_streams() -> None:
    beat = Heartbeat(TIME, 7)
    assert convert.watch_response(event()).event == convert.event(event())
    assert convert.watch_response(beat).heartbeat.last_sequence == 7
    assert convert.run_response(event()).event == convert.event(event())
    assert convert.run_response(beat).heartbeat.time.ToDatetime(UTC) == TIME
    outcome = JobOutcome(JOB_ID, JobState.FAILED, error=ERROR)
    assert convert.run_response(outcome).result == convert.result(outcome)


def test_a_page_of_events() -> None:
    three = [event(n) for n in (5, 6, 7)]
    page = convert.events_page(three, 2)
    assert [each.sequence for each in page.events] == [5, 6]
    assert page.next_after_sequence == 6
    page = convert.events_page(three, 3)
    assert [each.sequence for each in page.events] == [5, 6, 7]
    assert page.next_after_sequence == 0
    assert convert.events_page([], 3) == pb.ListJobEventsResponse()


def test_a_page_of_events_ends_at_3_mebibytes() -> None:
    chunks = [event(n, Output(data=b"x" * 64 * 1024)) for n in range(1, 61)]
    page = convert.events_page(chunks, 60)
    assert 2.9 * 1024 * 1024 < page.ByteSize() <= 3 * 1024 * 1024
    assert page.next_after_sequence == page.events[-1].sequence < 60
    # One that is larger by itself still goes on its way.
    page = convert.events_page([event(1, Output(data=b"x" * 4 * 1024 * 1024)), event(2)], 2)
    assert page.next_after_sequence == 1
