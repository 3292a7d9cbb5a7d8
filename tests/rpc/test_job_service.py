"""JobService over the wire, on the real services."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Input,
    JobError,
    JobTypeInfo,
    Log,
    Output,
    Progress,
    Stopped,
    Succeeded,
)
from jobsvc.rpc import convert, validate
from jobsvc.store.tables import jobs
from tests.rpc.conftest import World
from tests.rpc.status import read_into, refused, stream_refused

UNKNOWN = "01a20fd4-d592-729d-9646-b420d5e14aab"
WAIT_SECONDS_MAX = 20


def request(job_type: str = "demo", **fields: Any) -> pb.SubmitJobRequest:
    return pb.SubmitJobRequest(job_type=job_type, **fields)


async def submit(world: World, **fields: Any) -> str:
    answer: pb.SubmitJobResponse = await world.stub.SubmitJob(request(**fields))
    return answer.job.job_id


def done(value: Value) -> Succeeded:
    return Succeeded(Input(value.SerializeToString()))


def watch(world: World, job_id: str, after: int = 0) -> Any:
    asked = pb.WatchJobRequest(job_id=job_id, after_sequence=after)
    return world.stub.WatchJob(asked, timeout=WAIT_SECONDS_MAX)


def types(events: list[job_pb2.JobEvent]) -> list[str]:
    names = job_pb2.JobEventType.Name
    return [names(event.type).removeprefix("JOB_EVENT_TYPE_") for event in events]


async def stored(world: World) -> int:
    """How many jobs there are."""
    return await world.threads.run(world.house.count, jobs)


# Submitting.


async def test_a_submitted_job_is_stored_with_its_payload(world: World) -> None:
    payload = Struct()
    payload.update({"to": "x", "count": 3})
    metadata = (("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"),)
    answer = await world.stub.SubmitJob(
        request(payload=payload, labels={"a": "b"}), metadata=metadata
    )
    assert not answer.already_existed
    assert answer.job.state == job_pb2.JOB_STATE_QUEUED
    assert answer.job.trace_id == "ab" * 16
    assert answer.job.WhichOneof("input") is None
    read = (await world.stub.GetJob(pb.GetJobRequest(job_id=answer.job.job_id))).job
    assert read.payload == payload
    read.ClearField("payload")
    assert read == answer.job


async def test_a_blob_comes_back_as_it_was(world: World) -> None:
    blob = job_pb2.Blob(content_type="a/b", data=bytes(range(256)))
    job_id = await submit(world, payload_blob=blob)
    read = (await world.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job
    assert read.payload_blob == blob


async def test_a_bad_request_stores_nothing(world: World) -> None:
    refusal = await refused(world.stub.SubmitJob(request(queue="Q", priority=10)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refusal.fields == ["queue", "priority"]
    assert await stored(world) == 0


async def test_a_payload_is_checked_against_what_a_worker_announces_later(world: World) -> None:
    await submit(world)  # the server knows the job types as they were before
    schema = '{"type": "object", "required": ["to"]}'
    await world.announce(JobTypeInfo("demo", payload_schema=schema, queue="mail"))
    refusal = await refused(world.stub.SubmitJob(request()))
    assert refusal.fields == ["payload.to"]
    payload = Struct()
    payload.update({"to": "x"})
    assert (await world.stub.SubmitJob(request(payload=payload))).job.queue == "mail"


async def test_an_idempotency_key_gives_the_first_job(world: World) -> None:
    first = await world.stub.SubmitJob(request(idempotency_key="k"))
    again = await world.stub.SubmitJob(request(idempotency_key="k"))
    assert (again.job.job_id, again.already_existed) == (first.job.job_id, True)
    refusal = await refused(world.stub.SubmitJob(request(idempotency_key="k", priority=1)))
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "IDEMPOTENCY_KEY_REUSED"
    assert refusal.metadata == {"job_id": first.job.job_id}


async def test_a_key_outlives_its_job_as_the_bare_id(world: World) -> None:
    job_id = await submit(world, idempotency_key="k")
    await world.threads.run(world.house.forget_job, job_id)
    answer = await world.stub.SubmitJob(request(idempotency_key="k"))
    assert answer == pb.SubmitJobResponse(job=job_pb2.Job(job_id=job_id), already_existed=True)


async def test_validate_only_stores_nothing(world: World) -> None:
    answer = await world.stub.SubmitJob(
        request(idempotency_key="k", priority=3, validate_only=True)
    )
    assert answer.job.job_id == ""
    assert answer.job.priority == 3
    assert await stored(world) == 0
    job_id = await submit(world, idempotency_key="k", priority=3)
    answer = await world.stub.SubmitJob(
        request(idempotency_key="k", priority=3, validate_only=True)
    )
    assert (answer.job.job_id, answer.already_existed) == (job_id, True)


async def test_many_submits_are_answered_in_order(world: World) -> None:
    requests = [request(priority=n) for n in range(5)]
    answer = await world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=requests))
    assert [each.job.priority for each in answer.responses] == [0, 1, 2, 3, 4]


async def test_many_submits_are_all_or_none(world: World) -> None:
    bad = [request(), request(queue="Q"), request(job_type="")]
    refusal = await refused(world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=bad)))
    assert refusal.fields == ["requests[1].queue", "requests[2].job_type"]
    first = await submit(world, idempotency_key="k")
    clash = [request(), request(idempotency_key="k", priority=1)]
    refusal = await refused(world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=clash)))
    assert refusal.reason == "IDEMPOTENCY_KEY_REUSED"
    assert refusal.metadata == {"job_id": first, "index": "1"}
    assert await stored(world) == 1


async def test_validate_only_among_many_submits(world: World) -> None:
    first = await submit(world, idempotency_key="k")
    mixed = [
        request(priority=1, validate_only=True),
        request(priority=2),
        request(idempotency_key="k", validate_only=True),
    ]
    answer = await world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=mixed))
    assert [each.job.priority for each in answer.responses] == [1, 2, 0]
    assert answer.responses[0].job.job_id == ""
    assert answer.responses[1].job.job_id != ""
    assert answer.responses[2].job.job_id == first
    assert await stored(world) == 2
    mixed[2].priority = 9
    refusal = await refused(world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=mixed)))
    assert refusal.metadata == {"job_id": first, "index": "2"}
    assert await stored(world) == 2


async def test_many_that_only_validate_store_nothing(world: World) -> None:
    only = [request(validate_only=True), request(job_type="", validate_only=True)]
    refusal = await refused(world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=only)))
    assert refusal.fields == ["requests[1].job_type"]
    answer = await world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=only[:1] * 3))
    assert [each.job.job_id for each in answer.responses] == ["", "", ""]
    assert await stored(world) == 0


async def test_what_takes_long_to_check_or_to_answer_is_beside_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are served meanwhile."""
    threads: set[threading.Thread] = set()

    def noting(function: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            threads.add(threading.current_thread())
            return function(*arguments)

        return noted

    monkeypatch.setattr(validate, "submit_jobs", noting(validate.submit_jobs))
    monkeypatch.setattr(validate, "submit_job", noting(validate.submit_job))
    large = Struct(fields={str(index): Value(number_value=1) for index in range(2_000)})
    assert large.ByteSize() < 64 * 1024
    only = request(payload=large, validate_only=True)
    await world.stub.SubmitJob(request(payload=large))
    await world.stub.SubmitJob(only)
    await world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=[only] * 10))
    monkeypatch.setattr(convert, "submit_response", noting(convert.submit_response))
    await world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=[request()] * 100))
    assert len(threads) > 0
    assert threading.main_thread() not in threads


async def test_1000_bad_requests_get_an_answer_that_fits(world: World) -> None:
    bad = [request(job_type="", queue="Q" * 50, priority=10)] * 1_000
    refusal = await refused(world.stub.SubmitJobs(pb.SubmitJobsRequest(requests=bad)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields[:3] == [f"requests[0].{f}" for f in ("job_type", "queue", "priority")]


async def test_a_request_just_over_4_mebibytes_is_told_so(world: World) -> None:
    blob = request(payload_blob=job_pb2.Blob(data=b"x" * 1024 * 1024))
    many = pb.SubmitJobsRequest(requests=[blob] * 4)
    assert (await refused(world.stub.SubmitJobs(many))).fields == ["requests"]


# Reading.


async def test_unknown_jobs(world: World) -> None:
    for call in (
        world.stub.GetJob(pb.GetJobRequest(job_id=UNKNOWN)),
        world.stub.GetResult(pb.GetResultRequest(job_id=UNKNOWN)),
        world.stub.ListJobEvents(pb.ListJobEventsRequest(job_id=UNKNOWN)),
        world.stub.CancelJob(pb.CancelJobRequest(job_id=UNKNOWN)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
        assert refusal.details["ResourceInfo"]["resourceName"] == UNKNOWN
    assert (await stream_refused(watch(world, UNKNOWN))).reason == "JOB_UNKNOWN"


async def test_a_result_is_waited_for(world: World) -> None:
    job_id = await submit(world)
    asked = pb.GetResultRequest(job_id=job_id)
    answer = await world.stub.GetResult(asked)
    assert answer == pb.GetResultResponse(job_id=job_id, state=job_pb2.JOB_STATE_QUEUED)
    asked.wait.seconds = 50
    waiting = asyncio.ensure_future(world.stub.GetResult(asked, timeout=WAIT_SECONDS_MAX))
    claimed = await world.start(job_id)
    await world.finish(claimed, done(Value(number_value=7)))
    answer = await waiting
    assert answer.state == job_pb2.JOB_STATE_SUCCEEDED
    assert answer.result == Value(number_value=7)


async def test_a_result_that_does_not_come_in_time_is_no_error(world: World) -> None:
    job_id = await submit(world)
    asked = pb.GetResultRequest(job_id=job_id)
    asked.wait.FromMilliseconds(100)
    start = time.monotonic()
    answer = await world.stub.GetResult(asked)
    assert time.monotonic() - start >= 0.1
    assert answer == pb.GetResultResponse(job_id=job_id, state=job_pb2.JOB_STATE_QUEUED)


async def test_a_failed_job_has_its_error_as_the_outcome(world: World) -> None:
    claimed = await world.start(await submit(world, max_attempts=1))
    await world.finish(claimed, AttemptFailed(JobError("ValueError", "no", "here")))
    answer = await world.stub.GetResult(pb.GetResultRequest(job_id=claimed.job_id))
    assert answer.error == job_pb2.JobError(type="ValueError", message="no", traceback="here")


async def a_history(world: World) -> Claimed:
    """SUBMITTED, STARTED, and one of each that a handler tells."""
    claimed = await world.start(await submit(world))
    told = Progress(1, 2, "p"), Log("INFO", "l"), Output(text="t"), Output(data=b"d")
    await world.report(claimed, *told)
    return claimed


async def test_events_are_listed_in_pages(world: World) -> None:
    claimed = await a_history(world)
    asked = pb.ListJobEventsRequest(job_id=claimed.job_id, page_size=4)
    page = await world.stub.ListJobEvents(asked)
    assert types(page.events) == ["SUBMITTED", "STARTED", "PROGRESS", "LOG"]
    assert page.next_after_sequence == 4
    asked.after_sequence = 4
    page = await world.stub.ListJobEvents(asked)
    assert types(page.events) == ["OUTPUT", "OUTPUT"]
    assert page.next_after_sequence == 0
    asked.after_sequence = 6
    assert await world.stub.ListJobEvents(asked) == pb.ListJobEventsResponse()
    asked.after_sequence = 7
    refusal = await refused(world.stub.ListJobEvents(asked))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.OUT_OF_RANGE,
        "SEQUENCE_OUT_OF_RANGE",
    )
    assert refusal.metadata == {"oldest_sequence": "1", "last_sequence": "6"}


# Watching.


async def test_a_watch_replays_and_follows_to_the_end(world: World) -> None:
    claimed = await a_history(world)
    messages: list[pb.WatchJobResponse] = []
    reading = asyncio.create_task(read_into(messages, watch(world, claimed.job_id)))
    await world.finish(claimed, done(Value(null_value=NULL_VALUE)))
    await reading
    events = [each.event for each in messages if each.HasField("event")]
    assert [event.sequence for event in events] == list(range(1, 8))
    listed = await world.stub.ListJobEvents(pb.ListJobEventsRequest(job_id=claimed.job_id))
    assert events == list(listed.events)
    assert types(events)[-1] == "SUCCEEDED"


async def test_a_watch_resumes_after_what_was_seen(world: World) -> None:
    claimed = await a_history(world)
    messages = aiter(watch(world, claimed.job_id, after=5))
    assert (await anext(messages)).event.sequence == 6
    await world.finish(claimed, done(Value(bool_value=True)))
    assert [each.event.sequence async for each in messages] == [7]
    # The end was seen already: OK at once.
    assert [each async for each in watch(world, claimed.job_id, after=7)] == []
    refusal = await stream_refused(watch(world, claimed.job_id, after=8))
    assert refusal.metadata == {"oldest_sequence": "1", "last_sequence": "7"}


async def test_a_quiet_watch_begins_with_a_heartbeat(world: World) -> None:
    job_id = await submit(world)
    call = watch(world, job_id, after=1)
    first = await anext(aiter(call))
    assert first.heartbeat.last_sequence == 1
    assert abs(first.heartbeat.time.ToSeconds() - time.time()) < 60
    call.cancel()


async def test_a_bad_watch_is_refused(world: World) -> None:
    refusal = await stream_refused(watch(world, "x", after=-1))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ["job_id", "after_sequence"]


# Running.


async def test_run_job_ends_with_the_result(world: World) -> None:
    call = world.stub.RunJob(pb.RunJobRequest(request=request()), timeout=WAIT_SECONDS_MAX)
    messages: list[pb.RunJobResponse] = [await anext(aiter(call))]
    job_id = messages[0].event.job_id
    reading = asyncio.create_task(read_into(messages, call))
    claimed = await world.start(job_id)
    await world.finish(claimed, done(Value(string_value="r")))
    await reading
    events = [each.event for each in messages if each.HasField("event")]
    assert types(events) == ["SUBMITTED", "STARTED", "SUCCEEDED"]
    assert messages[-1].result == pb.GetResultResponse(
        job_id=job_id, state=job_pb2.JOB_STATE_SUCCEEDED, result=Value(string_value="r")
    )
    assert len([each for each in messages if each.HasField("result")]) == 1


async def test_run_job_of_a_job_that_fails_ends_with_ok(world: World) -> None:
    call = world.stub.RunJob(
        pb.RunJobRequest(request=request(max_attempts=1)), timeout=WAIT_SECONDS_MAX
    )
    messages: list[pb.RunJobResponse] = [await anext(aiter(call))]
    reading = asyncio.create_task(read_into(messages, call))
    claimed = await world.start(messages[0].event.job_id)
    await world.finish(claimed, AttemptFailed(JobError("ValueError", "no")))
    await reading
    assert messages[-1].result.error.type == "ValueError"
    assert await call.code() is grpc.StatusCode.OK


async def test_hanging_up_leaves_the_job_running(world: World) -> None:
    call = world.stub.RunJob(pb.RunJobRequest(request=request()), timeout=WAIT_SECONDS_MAX)
    job_id = (await anext(aiter(call))).event.job_id
    claimed = await world.start(job_id)
    call.cancel()
    await world.boundary.wait_idle(WAIT_SECONDS_MAX)
    await world.report(claimed, Progress(1, 2))
    job = (await world.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job
    assert job.state == job_pb2.JOB_STATE_RUNNING
    assert not job.cancel_requested


async def test_run_job_does_not_only_validate(world: World) -> None:
    bad = pb.RunJobRequest(request=request(queue="Q", validate_only=True))
    refusal = await stream_refused(world.stub.RunJob(bad))
    assert refusal.fields == ["request.queue", "request.validate_only"]


# Cancelling.


def cancel(world: World, job_id: str, reason: str = "") -> Any:
    return world.stub.CancelJob(pb.CancelJobRequest(job_id=job_id, reason=reason))


async def test_a_waiting_job_is_cancelled_at_once(world: World) -> None:
    job_id = await submit(world)
    job = (await cancel(world, job_id, "changed my mind")).job
    assert job.state == job_pb2.JOB_STATE_CANCELLED
    assert (job.error.type, job.error.message) == ("CANCELLED", "changed my mind")
    assert job.WhichOneof("input") is None
    assert (await cancel(world, job_id, "again")).job == job
    events = (await world.stub.ListJobEvents(pb.ListJobEventsRequest(job_id=job_id))).events
    assert [event.actor for event in events] == ["anonymous", "anonymous"]


async def test_a_running_job_is_asked_to_stop(world: World) -> None:
    claimed = await world.start(await submit(world))
    job = (await cancel(world, claimed.job_id)).job
    assert (job.state, job.cancel_requested) == (job_pb2.JOB_STATE_RUNNING, True)
    await world.finish(claimed, Stopped())
    answer = await world.stub.GetResult(pb.GetResultRequest(job_id=claimed.job_id))
    assert answer.error.type == "CANCELLED"


async def test_an_ended_job_cannot_be_cancelled(world: World) -> None:
    claimed = await world.start(await submit(world))
    await world.finish(claimed, done(Value(bool_value=True)))
    refusal = await refused(cancel(world, claimed.job_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    assert refusal.metadata == {"job_id": claimed.job_id, "state": "JOB_STATE_SUCCEEDED"}
