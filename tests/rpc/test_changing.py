"""RetryJob, UpdateJob, DeleteJob and unique keys, as a client sees them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import AttemptFailed, Input, JobError, Succeeded
from jobsvc.store import verbs
from jobsvc.store.database import Transaction
from tests.rpc.conftest import World
from tests.rpc.status import refused, stream_refused

UNKNOWN = "01a20fd4-d592-729d-9646-b420d5e14aab"
WAIT_SECONDS_MAX = 20
BROKEN = AttemptFailed(JobError("ValueError", "no"))
DONE = Succeeded(Input(Value(bool_value=True).SerializeToString()))


def unique(how: str = "RETURN_EXISTING", key: str = "k") -> job_pb2.Unique:
    return job_pb2.Unique(key=key, on_conflict=f"UNIQUE_CONFLICT_{how}")  # type: ignore[arg-type]


def request(**fields: Any) -> pb.SubmitJobRequest:
    return pb.SubmitJobRequest(job_type="demo", **fields)


async def submit(world: World, **fields: Any) -> job_pb2.Job:
    answer: pb.SubmitJobResponse = await world.stub.SubmitJob(request(**fields))
    return answer.job


async def failed(world: World, **fields: Any) -> str:
    claimed = await world.start((await submit(world, **fields)).job_id)
    await world.finish(claimed, BROKEN)
    return claimed.job_id


async def retry(world: World, job_id: str) -> job_pb2.Job:
    return (await world.stub.RetryJob(pb.RetryJobRequest(job_id=job_id))).job  # type: ignore[no-any-return]


async def update(world: World, job_id: str, *paths: str, **fields: Any) -> job_pb2.Job:
    asked = pb.UpdateJobRequest(job_id=job_id, update_mask=FieldMask(paths=paths), **fields)
    return (await world.stub.UpdateJob(asked)).job  # type: ignore[no-any-return]


async def delete(world: World, job_id: str) -> None:
    answer = await world.stub.DeleteJob(pb.DeleteJobRequest(job_id=job_id))
    assert answer == pb.DeleteJobResponse()


async def history(world: World, job_id: str) -> list[job_pb2.JobEvent]:
    answer = await world.stub.ListJobEvents(pb.ListJobEventsRequest(job_id=job_id))
    return list(answer.events)


def watch(world: World, job_id: str, after: int = 0) -> Any:
    asked = pb.WatchJobRequest(job_id=job_id, after_sequence=after)
    return world.stub.WatchJob(asked, timeout=WAIT_SECONDS_MAX)


async def test_a_retried_job_is_watched_through_its_second_run(world: World) -> None:
    job_id = await failed(world, ttl={"seconds": 1000})
    job = await retry(world, job_id)
    assert (job.state, job.attempt, job.last_sequence) == (job_pb2.JOB_STATE_QUEUED, 1, 5)
    for field in ("finish_time", "purge_time", "expire_time", "error", "payload"):
        assert not job.HasField(field)
    assert not job.cancel_requested
    event = (await history(world, job_id))[-1]
    assert event.type == job_pb2.JOB_EVENT_TYPE_RETRIED
    assert (event.state, event.actor) == (job_pb2.JOB_STATE_QUEUED, "anonymous")
    call = watch(world, job_id, after=4)
    stream = aiter(call)
    assert (await anext(stream)).event == event
    await world.finish(await world.start(job_id), DONE)
    told = [message.event.sequence async for message in stream]
    assert told == [6, 7]
    assert (await call.code()) is grpc.StatusCode.OK


async def test_what_cannot_be_retried(world: World) -> None:
    job_id = (await submit(world)).job_id
    refusal = await refused(retry(world, job_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    assert refusal.metadata == {"job_id": job_id, "state": "JOB_STATE_QUEUED"}
    for call in (retry, delete):
        refusal = await refused(call(world, UNKNOWN))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
        assert (await refused(call(world, "x"))).fields == ["job_id"]


async def test_a_retry_finds_its_key_held(world: World) -> None:
    first = await failed(world, unique=unique())
    second = (await submit(world, unique=unique())).job_id
    refusal = await refused(retry(world, first))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UNIQUE_CONFLICT")
    assert refusal.metadata == {"job_id": second}


async def test_an_update_changes_what_its_mask_names(world: World) -> None:
    job = await submit(world, priority=1, labels={"a": "b"})
    changed = await update(world, job.job_id, "priority", priority=7, labels={"c": "d"})
    assert (changed.priority, dict(changed.labels)) == (7, {"a": "b"})
    changed = await update(world, job.job_id, "labels", priority=3, labels={"c": "d"})
    assert (changed.priority, dict(changed.labels)) == (7, {"c": "d"})
    events = (await history(world, job.job_id))[1:]
    assert [job_pb2.JobEventType.Name(event.type) for event in events] == [
        *["JOB_EVENT_TYPE_UPDATED"] * 2
    ]
    assert {event.actor for event in events} == {"anonymous"}


async def test_an_update_moves_a_job_ahead_and_back(world: World) -> None:
    job_id = (await submit(world)).job_id
    due = Timestamp(seconds=int(time.time()) + 3600)
    job = await update(world, job_id, "schedule_time", schedule_time=due)
    assert (job.state, job.schedule_time) == (job_pb2.JOB_STATE_SCHEDULED, due)
    job = await update(world, job_id, "schedule_time", schedule_time=Timestamp())
    assert job.state == job_pb2.JOB_STATE_QUEUED
    assert job.schedule_time.seconds < due.seconds


async def test_what_cannot_be_updated(world: World) -> None:
    claimed = await world.start((await submit(world)).job_id)
    refusal = await refused(update(world, claimed.job_id, "priority", priority=7))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    assert refusal.metadata == {"job_id": claimed.job_id, "state": "JOB_STATE_RUNNING"}
    refusal = await refused(update(world, UNKNOWN, "priority"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN")
    assert (await refused(update(world, claimed.job_id))).fields == ["update_mask"]


async def test_a_deleted_job_is_gone_and_its_key_is_not(world: World) -> None:
    submitted = request(idempotency_key="i")
    job_id = (await world.stub.SubmitJob(submitted)).job.job_id
    refusal = await refused(delete(world, job_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    await world.finish(await world.start(job_id), DONE)
    await delete(world, job_id)
    for call in (
        world.stub.GetJob(pb.GetJobRequest(job_id=job_id)),
        world.stub.GetResult(pb.GetResultRequest(job_id=job_id)),
        world.stub.ListJobEvents(pb.ListJobEventsRequest(job_id=job_id)),
        delete(world, job_id),
    ):
        assert (await refused(call)).reason == "JOB_UNKNOWN"
    assert (await stream_refused(watch(world, job_id))).reason == "JOB_UNKNOWN"
    assert await world.stub.SubmitJob(submitted) == pb.SubmitJobResponse(
        job=job_pb2.Job(job_id=job_id), already_existed=True
    )
    submitted.priority = 1
    refusal = await refused(world.stub.SubmitJob(submitted))
    assert refusal.reason == "IDEMPOTENCY_KEY_REUSED"
    assert refusal.metadata == {"job_id": job_id}


async def test_who_watches_a_job_that_is_deleted_is_told(world: World) -> None:
    """Of a job that ended and was retried, and that others cancelled and deleted before a look."""
    job_id = await failed(world)
    await retry(world, job_id)
    stream = aiter(watch(world, job_id, after=5))
    assert (await anext(stream)).HasField("heartbeat")

    def behind_its_back(tx: Transaction) -> None:
        verbs.cancel(tx, job_id, "", "alice")
        verbs.delete(tx, job_id)

    await world.threads.write(behind_its_back)
    assert (await stream_refused(stream)).reason == "JOB_UNKNOWN"


async def test_the_holder_of_a_unique_key_answers(world: World) -> None:
    first = await submit(world, unique=unique())
    for validate_only in (True, False):
        again = await world.stub.SubmitJob(
            request(unique=unique(), priority=9, validate_only=validate_only)
        )
        assert (again.job, again.already_existed) == (first, True)


async def test_a_request_is_rejected_for_its_unique_key(world: World) -> None:
    first = await submit(world, unique=unique())
    for validate_only in (True, False):
        rejected = request(unique=unique("REJECT"), validate_only=validate_only)
        refusal = await refused(world.stub.SubmitJob(rejected))
        assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
        assert refusal.reason == "UNIQUE_CONFLICT"
        assert refusal.metadata == {"job_id": first.job_id}
        many = pb.SubmitJobsRequest(requests=[request(labels={"a": "b"}), rejected])
        refusal = await refused(world.stub.SubmitJobs(many))
        assert refusal.metadata == {"job_id": first.job_id, "index": "1"}
    listed = await world.stub.GetJob(pb.GetJobRequest(job_id=first.job_id))
    assert listed.job.last_sequence == 1


async def test_a_replaced_job_is_cancelled_before_its_watchers_eyes(world: World) -> None:
    first = await submit(world, unique=unique())
    stream = aiter(watch(world, first.job_id, after=1))
    assert (await anext(stream)).HasField("heartbeat")
    preview = await world.stub.SubmitJob(request(unique=unique("REPLACE"), validate_only=True))
    assert (preview.job.job_id, preview.already_existed) == ("", False)
    second = await submit(world, unique=unique("REPLACE"))
    (event,) = [message.event async for message in stream]
    assert event.type == job_pb2.JOB_EVENT_TYPE_CANCELLED
    assert (event.error.type, event.actor) == ("CANCELLED", "anonymous")
    assert second.job_id in event.error.message


async def test_a_hundred_at_once_are_one_job(world: World) -> None:
    """Some of them share a transaction, in which those that are refused fail alone."""
    calls = [
        world.stub.SubmitJob(request(unique=unique(how)))
        for how in ("RETURN_EXISTING", "REJECT")
        for _ in range(50)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    ids = {a.job.job_id for a in answers if isinstance(a, pb.SubmitJobResponse)}
    assert len(ids) == 1
    refusals = [a for a in answers if isinstance(a, BaseException)]
    assert len(refusals) in (49, 50)
    for refusal in refusals:
        assert isinstance(refusal, grpc.aio.AioRpcError)
        assert refusal.code() is grpc.StatusCode.ALREADY_EXISTS
