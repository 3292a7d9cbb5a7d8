"""Queues, workers, job types and explanations over the wire, on the real services."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from structlog.testing import capture_logs

from generated.jobsvc.v1 import admin_service_pb2 as pb
from generated.jobsvc.v1 import admin_service_pb2_grpc, job_pb2
from generated.jobsvc.v1 import job_service_pb2 as jobs_pb
from jobsvc.broker.topology import Broker
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.operations import WaitReason
from tests.rpc.conftest import World
from tests.rpc.status import refused

MINUTE = Duration(seconds=60)


def admin(world: World) -> Any:
    return admin_service_pb2_grpc.AdminServiceStub(world.channel)


async def update(world: World, *paths: str, queue: str = "q", **fields: Any) -> pb.Queue:
    request = pb.UpdateQueueRequest(queue=queue, update_mask=FieldMask(paths=paths), **fields)
    answer: pb.UpdateQueueResponse = await admin(world).UpdateQueue(request)
    return answer.queue


async def pause(world: World, queue: str = "q") -> pb.Queue:
    answer: pb.PauseQueueResponse = await admin(world).PauseQueue(pb.PauseQueueRequest(queue=queue))
    return answer.queue


async def resume(world: World, queue: str = "q") -> pb.Queue:
    request = pb.ResumeQueueRequest(queue=queue)
    answer: pb.ResumeQueueResponse = await admin(world).ResumeQueue(request)
    return answer.queue


async def listed(world: World, name: str = "q") -> pb.Queue:
    answer: pb.ListQueuesResponse = await admin(world).ListQueues(pb.ListQueuesRequest())
    (found,) = (queue for queue in answer.queues if queue.name == name)
    return found


async def submit(world: World, **fields: Any) -> str:
    request = jobs_pb.SubmitJobRequest(**({"job_type": "demo", "queue": "q"} | fields))
    answer: jobs_pb.SubmitJobResponse = await world.stub.SubmitJob(request)
    return answer.job.job_id


async def test_a_queue_is_paused_and_resumed(world: World) -> None:
    with capture_logs() as records:
        assert await pause(world) == pb.Queue(name="q", paused=True)
        assert await listed(world) == pb.Queue(name="q", paused=True)
        assert await pause(world) == pb.Queue(name="q", paused=True)
        job_id = await submit(world)
        assert await world.threads.run(world.house.claim_all, [job_id]) == ()
        resumed = await resume(world)
    assert (resumed.paused, resumed.queued_count) == (False, 1)
    assert resumed.HasField("oldest_queued_age")
    await world.start(job_id)
    assert (await listed(world)).running_count == 1
    told = [(each["event"], each["actor"]) for each in records if "queue" in each["event"]]
    assert told == [
        *[("queue paused", "anonymous")] * 2,
        ("queue resumed", "anonymous"),
    ]


async def test_limits_are_set_and_lifted(world: World) -> None:
    rate = pb.RateLimit(max_starts=3, period=Duration(seconds=1, nanos=500_000_000))
    queue = await update(world, "max_running", "rate_limit", max_running=2, rate_limit=rate)
    assert queue == pb.Queue(name="q", max_running=2, rate_limit=rate)
    queue = await update(world, "max_running")
    assert queue == pb.Queue(name="q", rate_limit=rate)
    assert await update(world, "rate_limit", max_running=7) == pb.Queue(name="q")


@pytest.mark.parametrize(
    ("fields", "paths", "bad"),
    [
        ({"queue": ""}, ["max_running"], {"queue"}),
        ({"queue": "Q"}, ["max_running"], {"queue"}),
        ({}, [], {"update_mask"}),
        ({}, ["paused"], {"update_mask"}),
        ({}, ["rate_limit.period"], {"update_mask"}),
        ({"max_running": -1}, ["max_running"], {"max_running"}),
        (
            {"rate_limit": pb.RateLimit()},
            ["rate_limit"],
            {"rate_limit.max_starts", "rate_limit.period"},
        ),
        (
            {"rate_limit": pb.RateLimit(max_starts=-1, period=Duration())},
            ["rate_limit"],
            {"rate_limit.max_starts", "rate_limit.period"},
        ),
        (
            {"rate_limit": pb.RateLimit(max_starts=1, period=Duration(seconds=-1))},
            ["rate_limit"],
            {"rate_limit.period"},
        ),
    ],
)
async def test_bad_limits_are_named(
    world: World, fields: dict[str, Any], paths: list[str], bad: set[str]
) -> None:
    mask = FieldMask(paths=paths)
    request = pb.UpdateQueueRequest(**({"queue": "q"} | fields), update_mask=mask)
    found = await refused(admin(world).UpdateQueue(request))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    violations = found.details["BadRequest"]["fieldViolations"]
    assert {violation["field"] for violation in violations} == bad


async def test_what_the_mask_does_not_name_is_not_looked_at(world: World) -> None:
    queue = await update(world, "max_running", max_running=1, rate_limit=pb.RateLimit())
    assert queue == pb.Queue(name="q", max_running=1)
    queue = await update(
        world, "rate_limit", max_running=-1, rate_limit=pb.RateLimit(max_starts=1, period=MINUTE)
    )
    assert queue.max_running == 1


async def test_the_longest_period_is_one_too(world: World) -> None:
    rate = pb.RateLimit(max_starts=1, period=Duration(seconds=315_576_000_000))
    assert (await update(world, "rate_limit", rate_limit=rate)).rate_limit == rate
    await world.start(await submit(world))
    explained = await explain(world, await submit(world))
    assert explained.reason == job_pb2.WAIT_REASON_NO_WORKER


async def test_the_counts_of_a_broker_out_of_reach_are_not_known(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list answers all the same."""
    monkeypatch.setattr(Broker, "depth", out_of_reach)
    for queue in (await pause(world), await listed(world)):
        assert (queue.paused, queue.ready_message_count) == (True, -1)


def out_of_reach(*_: object) -> int:
    raise ConnectionRefusedError


async def test_lists_have_pages(world: World) -> None:
    for name in ("c", "a", "b"):
        await pause(world, name)
    first = await admin(world).ListQueues(pb.ListQueuesRequest(page_size=2))
    assert [queue.name for queue in first.queues] == ["a", "b"]
    request = pb.ListQueuesRequest(page_token=first.next_page_token)
    rest = await admin(world).ListQueues(request)
    assert ([queue.name for queue in rest.queues], rest.next_page_token) == (["c"], "")
    other = pb.ListWorkersRequest(page_token=first.next_page_token)
    found = await refused(admin(world).ListWorkers(other))
    assert found.details["BadRequest"]["fieldViolations"][0]["field"] == "page_token"


async def test_workers_are_listed(world: World) -> None:
    await world.announce(JobTypeInfo("demo"))
    claimed = await world.start(await submit(world))
    answer = await admin(world).ListWorkers(pb.ListWorkersRequest())
    (worker,) = answer.workers
    assert (worker.worker_id, worker.host, worker.pid) == ("w1", "h", 1)
    assert list(worker.job_types) == ["demo"]
    assert list(worker.running_job_ids) == [claimed.job_id]
    assert worker.HasField("last_heartbeat_time")
    assert not worker.HasField("last_claim_time")


async def test_job_types_are_listed_with_their_defaults(world: World) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
    await world.announce(
        JobTypeInfo("full", "Does all.", json.dumps(schema), "q", 3, 60.0),
        JobTypeInfo("open", payload_schema="true"),
    )
    answer = await world.stub.ListJobTypes(jobs_pb.ListJobTypesRequest(page_size=1))
    (full,) = answer.job_types
    assert (full.name, full.description, full.queue) == ("full", "Does all.", "q")
    assert (full.max_attempts, full.timeout, full.live_worker_count) == (3, MINUTE, 1)
    assert full.payload_schema["properties"]["n"]["minimum"] == 1
    request = jobs_pb.ListJobTypesRequest(page_token=answer.next_page_token)
    answer = await world.stub.ListJobTypes(request)
    (open_,) = answer.job_types
    assert (open_.queue, open_.max_attempts, open_.timeout.seconds) == ("default", 10, 1800)
    assert not open_.HasField("payload_schema")
    assert answer.next_page_token == ""


async def explain(world: World, job_id: str) -> jobs_pb.ExplainJobResponse:
    request = jobs_pb.ExplainJobRequest(job_id=job_id)
    answer: jobs_pb.ExplainJobResponse = await world.stub.ExplainJob(request)
    return answer


async def test_a_job_is_explained(world: World) -> None:
    await pause(world)
    answer = await explain(world, await submit(world))
    assert answer.state == job_pb2.JOB_STATE_QUEUED
    assert answer.reason == job_pb2.WAIT_REASON_QUEUE_PAUSED
    assert dict(answer.facts) == {"queue": "q"}
    assert answer.message == "The queue q is paused: it starts nothing until it is resumed."
    for job_id, reason in (("x", "INVALID_FIELD"), (job_id_of_nobody(), "JOB_UNKNOWN")):
        found = await refused(world.stub.ExplainJob(jobs_pb.ExplainJobRequest(job_id=job_id)))
        assert found.reason == reason


def job_id_of_nobody() -> str:
    return "01a20fd4-d592-729d-9646-b420d5e14aab"


def test_every_reason_has_its_number_in_order() -> None:
    numbers = [job_pb2.WaitReason.Value(f"WAIT_REASON_{reason}") for reason in WaitReason]
    assert numbers == sorted(job_pb2.WaitReason.values())[1:]
