"""ScheduleService over the wire, on the real services."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct
from structlog.testing import capture_logs

from generated.jobsvc.v1 import job_pb2, schedule_service_pb2_grpc
from generated.jobsvc.v1 import job_service_pb2 as jobs_pb
from generated.jobsvc.v1 import schedule_service_pb2 as pb
from jobsvc import metrics
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.rpc.schedule_service import ticked_job
from jobsvc.services.schedules import ticking
from jobsvc.store.tables import EPOCH, jobs, schedules
from tests.rpc.conftest import World
from tests.rpc.status import refused


def stub(world: World) -> Any:
    return schedule_service_pb2_grpc.ScheduleServiceStub(world.channel)


def schedule(schedule_id: str = "nightly", **fields: Any) -> pb.Schedule:
    values: dict[str, Any] = {"cron": "0 0 1 1 *", "request": {"job_type": "demo"}}
    return pb.Schedule(schedule_id=schedule_id, **(values | fields))


async def create(world: World, schedule_id: str = "nightly", **fields: Any) -> pb.Schedule:
    asked = pb.CreateScheduleRequest(schedule=schedule(schedule_id, **fields))
    answer: pb.CreateScheduleResponse = await stub(world).CreateSchedule(asked)
    return answer.schedule


async def get(world: World, schedule_id: str = "nightly") -> pb.Schedule:
    answer: pb.GetScheduleResponse = await stub(world).GetSchedule(
        pb.GetScheduleRequest(schedule_id=schedule_id)
    )
    return answer.schedule


async def update(world: World, *paths: str, **fields: Any) -> pb.Schedule:
    asked = pb.UpdateScheduleRequest(
        schedule=pb.Schedule(**({"schedule_id": "nightly"} | fields)),
        update_mask=FieldMask(paths=paths),
    )
    answer: pb.UpdateScheduleResponse = await stub(world).UpdateSchedule(asked)
    return answer.schedule


async def trigger(world: World) -> job_pb2.Job:
    answer: pb.TriggerScheduleResponse = await stub(world).TriggerSchedule(
        pb.TriggerScheduleRequest(schedule_id="nightly")
    )
    return answer.job


async def set_columns(world: World, **columns: Any) -> None:
    """Of every schedule, past the service."""
    statement = sa.update(schedules).values(columns)
    await world.threads.write(lambda tx: tx.execute(statement))


async def tick(world: World) -> int:
    count, _ = await world.threads.run(ticking(ticked_job), world.house.database, 10)
    return count


async def stored(world: World) -> int:
    return await world.threads.run(world.house.count, jobs)


async def bad_fields(call: Any) -> dict[str, str]:
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    violations = refusal.details["BadRequest"]["fieldViolations"]
    assert len(violations) == len({v["field"] for v in violations})
    return {v["field"]: v["description"] for v in violations}


# Rows.


async def test_a_schedule_is_answered_as_it_was_stored(world: World) -> None:
    payload = Struct()
    payload.update({"to": "x"})
    request = jobs_pb.SubmitJobRequest(
        job_type="demo", payload=payload, labels={"a": "b", "c": "d"}, ttl=Duration(seconds=60)
    )
    made = await create(
        world,
        cron="30 2 * * *",
        time_zone="Europe/Berlin",
        request=request,
        missed_ticks=pb.MISSED_TICKS_RUN_ONCE,
        overlap=pb.OVERLAP_SKIP,
    )
    assert made.request == request
    assert made.next_time.seconds > time.time()
    assert not made.HasField("last_time")
    assert (made.missed_ticks, made.overlap) == (pb.MISSED_TICKS_RUN_ONCE, pb.OVERLAP_SKIP)
    assert await get(world) == made


async def test_what_is_left_out_has_its_default(world: World) -> None:
    made = await create(world)
    assert (made.time_zone, made.missed_ticks) == ("UTC", pb.MISSED_TICKS_SKIP)
    assert (made.overlap, made.paused) == (pb.OVERLAP_ALLOW, False)


async def test_what_the_server_sets_is_ignored(world: World) -> None:
    made = await create(
        world,
        next_time={"seconds": 1},
        last_time={"seconds": 2, "nanos": -1},
        last_job_id="?",
        etag="x",
    )
    assert made.next_time.seconds > time.time()
    assert (made.HasField("last_time"), made.last_job_id) == (False, "")
    assert made.etag not in ("", "x")


async def test_an_id_that_is_taken(world: World) -> None:
    made = await create(world)
    refusal = await refused(create(world, cron="* * * * *"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SCHEDULE_EXISTS")
    assert refusal.metadata == {"schedule_id": "nightly"}
    assert await get(world) == made


async def test_an_unknown_schedule(world: World) -> None:
    asked = {"schedule_id": "no-such"}
    calls = [
        stub(world).GetSchedule(pb.GetScheduleRequest(**asked)),
        stub(world).DeleteSchedule(pb.DeleteScheduleRequest(**asked)),
        stub(world).TriggerSchedule(pb.TriggerScheduleRequest(**asked)),
        update(world, "paused", **asked),
    ]
    for call in calls:
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SCHEDULE_UNKNOWN")
        assert refusal.details["ResourceInfo"]["resourceName"] == "no-such"


async def test_an_id_that_can_be_none(world: World) -> None:
    for bad in ("", "A", "1a", "a_b", "a" * 64):
        asked = {"schedule_id": bad}
        for call in (
            stub(world).GetSchedule(pb.GetScheduleRequest(**asked)),
            stub(world).DeleteSchedule(pb.DeleteScheduleRequest(**asked)),
            stub(world).TriggerSchedule(pb.TriggerScheduleRequest(**asked)),
        ):
            assert list(await bad_fields(call)) == ["schedule_id"]
        for call in (create(world, bad), update(world, "paused", **asked)):
            assert list(await bad_fields(call)) == ["schedule.schedule_id"]
    await create(world, "a" * 63)


async def test_a_deleted_schedule_leaves_its_jobs(world: World) -> None:
    await create(world)
    await trigger(world)
    await stub(world).DeleteSchedule(pb.DeleteScheduleRequest(schedule_id="nightly"))
    assert (await refused(get(world))).reason == "SCHEDULE_UNKNOWN"
    assert await stored(world) == 1


async def test_lists_are_paged_by_id(world: World) -> None:
    for name in ("c", "a", "b"):
        await create(world, name)

    async def page(size: int, token: str = "") -> pb.ListSchedulesResponse:
        asked = pb.ListSchedulesRequest(page_size=size, page_token=token)
        answer: pb.ListSchedulesResponse = await stub(world).ListSchedules(asked)
        return answer

    first = await page(2)
    assert [each.schedule_id for each in first.schedules] == ["a", "b"]
    assert first.schedules[0] == await get(world, "a")
    rest = await page(5, first.next_page_token)
    assert [each.schedule_id for each in rest.schedules] == ["c"]
    assert rest.next_page_token == ""
    assert len((await page(0)).schedules) == 3
    assert list(await bad_fields(page(-1))) == ["page_size"]
    assert list(await bad_fields(page(2, first.next_page_token + "x"))) == ["page_token"]


async def test_a_page_ends_early_at_3_mebibytes(world: World) -> None:
    blob = job_pb2.Blob(data=b"x" * 1024 * 1000)
    for name in ("a", "b", "c", "d"):
        await create(world, name, request={"job_type": "demo", "payload_blob": blob})
    answer = await stub(world).ListSchedules(pb.ListSchedulesRequest())
    assert [each.schedule_id for each in answer.schedules] == ["a", "b", "c"]
    asked = pb.ListSchedulesRequest(page_token=answer.next_page_token)
    assert [s.schedule_id for s in (await stub(world).ListSchedules(asked)).schedules] == ["d"]


# Rules.


async def test_every_bad_field_is_named(world: World) -> None:
    bad = await bad_fields(
        create(
            world,
            "Nightly",
            cron="0 0 30 2 *",
            time_zone="Mars/Base",
            request={"queue": "Q", "priority": 10},
            missed_ticks=9,
            overlap=9,
        )
    )
    assert list(bad) == [
        "schedule.schedule_id",
        "schedule.cron",
        "schedule.time_zone",
        "schedule.request.job_type",
        "schedule.request.queue",
        "schedule.request.priority",
        "schedule.missed_ticks",
        "schedule.overlap",
    ]
    assert bad["schedule.cron"] == "its day of month is not valid, or in none of its months"
    assert bad["schedule.time_zone"].endswith("such as Europe/Berlin")
    empty = await bad_fields(stub(world).CreateSchedule(pb.CreateScheduleRequest()))
    assert list(empty) == ["schedule.schedule_id", "schedule.cron", "schedule.request.job_type"]


@pytest.mark.parametrize("cron", ["0 " * 6, "@daily", "0 0 * * *\n", "1," * 200 + "1 * * * *"])
async def test_bad_crons(world: World, cron: str) -> None:
    assert list(await bad_fields(create(world, cron=cron))) == ["schedule.cron"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule_time", {"seconds": 1}),
        ("delay", {}),
        ("expire_time", {"seconds": 1}),
        ("expire_time", {"seconds": 253402300799}),
        ("idempotency_key", "k"),
        ("validate_only", True),
    ],
)
async def test_what_a_request_may_not_set(world: World, field: str, value: Any) -> None:
    request = {"job_type": "demo", field: value}
    for call in (
        create(world, request=request),
        update(world, "request", request=request),
    ):
        bad = await bad_fields(call)
        assert list(bad) == [f"schedule.request.{field}"]
        assert bad[f"schedule.request.{field}"].startswith("must not be set: ")


async def test_a_payload_is_checked_against_what_a_worker_announced(world: World) -> None:
    schema = '{"type": "object", "required": ["to"]}'
    await create(world)
    await world.announce(JobTypeInfo("demo", payload_schema=schema))
    for call in (create(world, "other"), update(world, "request", request={"job_type": "demo"})):
        assert list(await bad_fields(call)) == ["schedule.request.payload.to"]
    # What was right when it was stored is the worker's to check.
    await set_columns(world, next_time=EPOCH, missed_ticks="RUN_ONCE")
    assert await tick(world) == 1
    assert (await get(world)).last_job_id


# Updates.


async def test_an_update_changes_what_its_mask_names(world: World) -> None:
    before = await create(world, cron="0 0 1 1 *")
    after = await update(
        world, "paused", "overlap", cron="bad", paused=True, overlap=pb.OVERLAP_SKIP
    )
    assert (after.paused, after.overlap, after.cron) == (True, pb.OVERLAP_SKIP, "0 0 1 1 *")
    assert after.etag != before.etag
    assert await get(world) == after
    after = await update(world, "request", "cron", request={"job_type": "other"}, cron="0 0 2 1 *")
    assert (after.request.job_type, after.cron) == ("other", "0 0 2 1 *")
    assert after.next_time.seconds - before.next_time.seconds == 86_400


async def test_what_a_mask_names_and_is_unset_becomes_the_default(world: World) -> None:
    await create(world, time_zone="Asia/Kathmandu", missed_ticks=2, overlap=2, paused=True)
    after = await update(world, "time_zone", "missed_ticks", "overlap", "paused")
    assert (after.time_zone, after.missed_ticks) == ("UTC", pb.MISSED_TICKS_SKIP)
    assert (after.overlap, after.paused) == (pb.OVERLAP_ALLOW, False)
    bad = await bad_fields(update(world, "cron", "request"))
    assert list(bad) == ["schedule.cron", "schedule.request.job_type"]


@pytest.mark.parametrize(
    "paths", [(), ("*",), ("paused", "etag"), ("schedule_id",), ("request.queue",), ("next_time",)]
)
async def test_bad_masks(world: World, paths: tuple[str, ...]) -> None:
    before = await create(world)
    bad = await bad_fields(update(world, *paths, paused=True))
    assert list(bad) == ["update_mask"]
    assert "cron, missed_ticks, overlap, paused, request, time_zone" in bad["update_mask"]
    assert await get(world) == before


async def test_an_etag_must_match(world: World) -> None:
    first = (await create(world)).etag
    second = (await update(world, "paused", paused=True, etag=first)).etag
    refusal = await refused(update(world, "paused", etag=first))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert (await get(world)).paused
    await update(world, "paused", etag=second)
    await update(world, "paused", paused=True)


# Jobs.


async def test_a_trigger_answers_the_job(world: World) -> None:
    payload = Struct()
    payload.update({"to": "x"})
    await create(world, paused=True, request={"job_type": "demo", "payload": payload})
    metadata = (("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"),)
    asked = pb.TriggerScheduleRequest(schedule_id="nightly")
    job = (await stub(world).TriggerSchedule(asked, metadata=metadata)).job
    assert (job.state, job.trace_id) == (job_pb2.JOB_STATE_QUEUED, "ab" * 16)
    assert job.WhichOneof("input") is None
    assert (await get(world)).last_job_id == job.job_id
    read = (await world.stub.GetJob(jobs_pb.GetJobRequest(job_id=job.job_id))).job
    assert read.payload == payload
    (event,) = await world.threads.run(world.house.events, job.job_id)
    assert event.actor == "anonymous"


async def test_a_tick_submits_as_its_schedule(world: World) -> None:
    await create(world, cron="* * * * *", request={"job_type": "demo", "ttl": {"seconds": 60}})
    now = await world.threads.run(world.house.now)
    await set_columns(world, next_time=now)
    counted = metrics.TICKS.labels("submitted")._value.get()
    with capture_logs() as records:
        assert await tick(world) == 1
    assert metrics.TICKS.labels("submitted")._value.get() == counted + 1
    job_id = (await get(world)).last_job_id
    assert records == [
        {
            "event": "schedule ticked",
            "log_level": "info",
            "schedule_id": "nightly",
            "outcome": "submitted",
            "tick": now.isoformat(),
            "job_id": job_id,
        }
    ]
    job = await world.threads.run(world.house.get, job_id)
    assert len(job.trace_id) == 32
    assert job.expire_time is not None
    assert (job.expire_time - job.create_time).total_seconds() == 60
    (event,) = await world.threads.run(world.house.events, job_id)
    assert event.actor == "schedule:nightly"


@pytest.mark.parametrize("request_bytes", [b"\xff\xff", b"", b"\x0a\x04demo\x28\x63"])
async def test_a_stored_request_that_is_no_good(world: World, request_bytes: bytes) -> None:
    """Bytes that are no message, one without a job type, one of priority 99."""
    await create(world, cron="* * * * *")
    await create(world, "other", cron="* * * * *")
    now = await world.threads.run(world.house.now)
    await set_columns(world, next_time=now)
    statement = sa.update(schedules).where(schedules.c.id == "nightly")
    broken = statement.values(request=request_bytes)
    await world.threads.write(lambda tx: tx.execute(broken))
    with capture_logs() as records:
        assert await tick(world) == 2
    levels = {(r["schedule_id"], r["event"], r["log_level"]) for r in records}
    assert levels == {("nightly", "schedule paused", "error"), ("other", "schedule ticked", "info")}
    assert (await get(world)).paused
    assert (await get(world, "other")).last_job_id
    assert len((await stub(world).ListSchedules(pb.ListSchedulesRequest())).schedules) == 2
    assert all(field.startswith("schedule.request") for field in await bad_fields(trigger(world)))
    await update(world, "request", "paused", request={"job_type": "demo"})
    await trigger(world)


async def test_a_trigger_whose_unique_key_is_held(world: World) -> None:
    unique = {"key": "k", "on_conflict": job_pb2.UNIQUE_CONFLICT_REJECT}
    await create(world, request={"job_type": "demo", "unique": unique})
    holder = await trigger(world)
    refusal = await refused(trigger(world))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "UNIQUE_CONFLICT")
    assert refusal.metadata == {"job_id": holder.job_id}
