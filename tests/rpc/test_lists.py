"""ListJobs and ListFailureGroups over the wire."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import admin_service_pb2 as admin
from generated.jobsvc.v1 import admin_service_pb2_grpc, job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import AttemptFailed, Input, JobError
from jobsvc.rpc.paging import PAGE_BYTES_MAX
from jobsvc.services import lists
from tests.rpc.conftest import World
from tests.rpc.status import refused
from tests.store.house import DONE, new_job

FAILED = AttemptFailed(JobError("ValueError", "no", "line 1"))


def failing(error_type: str, *, retryable: bool = False) -> AttemptFailed:
    return AttemptFailed(JobError(error_type, "no", "line 1", retryable), retry_after=60.0)


async def submit(world: World, count: int = 1, job_type: str = "demo", **fields: Any) -> list[str]:
    """Their ids, the newest first."""
    requests = [new_job(job_type, **fields) for _ in range(count)]
    await world.threads.run(world.house.submit_all, requests)
    return [request.job_id for request in reversed(requests)]


async def listed(world: World, **fields: Any) -> tuple[list[str], str]:
    answer = await world.stub.ListJobs(pb.ListJobsRequest(**fields))
    return [job.job_id for job in answer.jobs], answer.next_page_token


async def groups(world: World, **fields: Any) -> tuple[list[Any], str]:
    stub: Any = admin_service_pb2_grpc.AdminServiceStub(world.channel)
    answer = await stub.ListFailureGroups(admin.ListFailureGroupsRequest(**fields))
    return list(answer.failure_groups), answer.next_page_token


async def test_jobs_come_newest_first_a_page_at_a_time(world: World) -> None:
    ids = await submit(world, 5)
    first, token = await listed(world, page_size=2)
    assert first == ids[:2]
    await submit(world)  # newer ones change nothing of what follows
    second, token = await listed(world, page_size=2, page_token=token)
    assert second == ids[2:4]
    assert await listed(world, page_size=7, page_token=token) == (ids[4:], "")
    assert len((await listed(world, page_size=0))[0]) == 6


async def test_a_filter_may_name_everything(world: World) -> None:
    (wanted,) = await submit(
        world, job_type="other", queue="slow", labels={"a": "b"}, idempotency_key="k"
    )
    await submit(world, 3)
    await world.finish(await world.start(wanted), FAILED)
    job = (await world.stub.GetJob(pb.GetJobRequest(job_id=wanted))).job
    asked = job_pb2.JobFilter(
        states=[job_pb2.JOB_STATE_FAILED],
        job_types=["other", "more"],
        queue="slow",
        labels={"a": "b"},
        error_types=["ValueError"],
        idempotency_key="k",
        create_time_after=job.create_time,
        finish_time_after=job.finish_time,
    )
    assert await listed(world, filter=asked) == ([wanted], "")
    just_after = Timestamp(seconds=job.finish_time.seconds, nanos=job.finish_time.nanos + 1)
    asked.finish_time_before.CopyFrom(just_after)
    assert await listed(world, filter=asked) == ([wanted], "")
    asked.finish_time_after.CopyFrom(just_after)
    assert await listed(world, filter=asked) == ([], "")
    asked.ClearField("finish_time_after")
    asked.finish_time_before.CopyFrom(job.finish_time)
    assert await listed(world, filter=asked) == ([], "")


async def test_the_view_says_how_much(world: World) -> None:
    payload = Struct()
    payload.update({"to": "x"})
    (job_id,) = await submit(world, input=Input(payload.SerializeToString()))
    await world.finish(await world.start(job_id), FAILED)
    whole = (await world.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job
    full = await world.stub.ListJobs(pb.ListJobsRequest(view=job_pb2.JOB_VIEW_FULL))
    assert list(full.jobs) == [whole]
    assert whole.error.traceback == "line 1"
    assert whole.payload == payload
    whole.error.traceback = ""
    whole.ClearField("payload")
    for view in (job_pb2.JOB_VIEW_BASIC, job_pb2.JOB_VIEW_UNSPECIFIED):
        basic = await world.stub.ListJobs(pb.ListJobsRequest(view=view))
        assert list(basic.jobs) == [whole]


async def test_a_page_ends_at_3_mib(world: World) -> None:
    blob = Input(bytes(900_000), "a/b")
    ids = await submit(world, 5, input=blob)
    answer = await world.stub.ListJobs(pb.ListJobsRequest(view=job_pb2.JOB_VIEW_FULL))
    assert [job.job_id for job in answer.jobs] == ids[:3]
    assert answer.ByteSize() <= PAGE_BYTES_MAX + 1_000
    rest = pb.ListJobsRequest(view=job_pb2.JOB_VIEW_FULL, page_token=answer.next_page_token)
    answer = await world.stub.ListJobs(rest)
    assert [job.job_id for job in answer.jobs] == ids[3:]
    assert not answer.next_page_token
    assert await listed(world) == (ids, "")


async def test_a_token_is_good_for_its_list_alone(world: World) -> None:
    await submit(world, 4)
    _, token = await listed(world, page_size=1)
    other = job_pb2.JobFilter(queue="slow")
    forged = token[:-1] + ("A" if token[-1] != "A" else "B")
    for fields in ({"page_token": token, "filter": other}, {"page_token": forged}):
        refusal = await refused(world.stub.ListJobs(pb.ListJobsRequest(**fields)))
        assert (refusal.code, refusal.fields) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["page_token"],
        )
    full = pb.ListJobsRequest(page_token=token, view=job_pb2.JOB_VIEW_FULL, page_size=2)
    assert len((await world.stub.ListJobs(full)).jobs) == 2
    stub: Any = admin_service_pb2_grpc.AdminServiceStub(world.channel)
    elsewhere = admin.ListFailureGroupsRequest(page_token=token)
    assert (await refused(stub.ListFailureGroups(elsewhere))).fields == ["page_token"]


async def test_a_bad_list_is_refused_field_by_field(world: World) -> None:
    asked = pb.ListJobsRequest(page_size=-1, view=7)  # type: ignore[arg-type]
    asked.filter.states.extend([0, 99])  # type: ignore[list-item]
    asked.filter.queue = "Q"
    refusal = await refused(world.stub.ListJobs(asked))
    assert refusal.reason == "INVALID_FIELD"
    assert refusal.fields == [
        *("filter.states[0]", "filter.states[1]", "filter.queue"),
        *("view", "page_size"),
    ]


# Failures.


async def test_failures_are_grouped_most_jobs_first(world: World) -> None:
    ids = await submit(world, 7)
    (other,) = await submit(world, job_type="other")
    for job_id in ids:
        await world.finish(await world.start(job_id), failing("ValueError"))
    await world.finish(await world.start(other), failing("ValueError", retryable=True))
    (fine,) = await submit(world)
    await world.finish(await world.start(fine), DONE)
    found, token = await groups(world)
    assert [(g.job_type, g.error_type, g.job_count) for g in found] == [
        ("demo", "ValueError", 7),
        ("other", "ValueError", 1),
    ]
    assert not token
    assert list(found[0].sample_job_ids) == ids[:5]
    ends = [world.house.get(job_id).finish_time for job_id in ids]
    assert found[0].first_time.ToDatetime(ends[0].tzinfo) == min(ends)  # type: ignore[union-attr,type-var]
    assert found[0].last_time.ToDatetime(ends[0].tzinfo) == max(ends)  # type: ignore[union-attr,type-var]
    failed_at = world.house.events(other)[-1].event_time
    assert found[1].first_time.ToDatetime(failed_at.tzinfo) == failed_at
    found, _ = await groups(world, filter=job_pb2.JobFilter(states=[job_pb2.JOB_STATE_RETRYING]))
    assert [list(g.sample_job_ids) for g in found] == [[other]]


async def test_a_group_has_the_jobs_that_a_list_finds(world: World) -> None:
    """Whatever became of them: filters say what is left out."""
    recovered, cancelled, retried = await submit(world, 3)
    for job_id in (recovered, retried):
        await world.finish(await world.start(job_id), failing("TIMEOUT", retryable=True))
    world.house.wait(61)
    world.house.promote()
    await world.finish(await world.start(recovered), DONE)
    await world.threads.run(world.house.cancel, cancelled)
    found, _ = await groups(world)
    for group in found:
        same = job_pb2.JobFilter(job_types=[group.job_type], error_types=[group.error_type])
        ids, _ = await listed(world, filter=same)
        assert (len(ids), ids) == (group.job_count, list(group.sample_job_ids))
    assert {(g.error_type, g.job_count) for g in found} == {("TIMEOUT", 2), ("CANCELLED", 1)}


async def test_failure_groups_come_a_page_at_a_time(world: World) -> None:
    for number, error_type in enumerate(["A b", "A", "C", "D"]):
        for job_id in await submit(world, 1 + number // 2):
            await world.finish(await world.start(job_id), failing(error_type))
    whole, _ = await groups(world)
    assert [g.error_type for g in whole] == ["C", "D", "A", "A b"]
    for size in (1, 2, 3, 4):
        pages: list[Any] = []
        token = ""
        while not pages or token:
            found, token = await groups(world, page_size=size, page_token=token)
            assert 0 < len(found) <= size
            pages += found
        assert pages == whole


async def test_the_newest_failures_alone_are_grouped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "GROUPED_MAX", 5)
    monkeypatch.setattr(lists, "GROUPED_AT_ONCE", 2)
    ids = await submit(world, 8)
    for job_id in ids:
        await world.finish(await world.start(job_id), failing("ValueError"))
    ((group,), _) = await groups(world)
    assert (group.job_count, list(group.sample_job_ids)) == (5, ids[:5])
    before = world.house.now() - timedelta(days=1)
    none = job_pb2.JobFilter()
    none.finish_time_before.FromDatetime(before)
    assert await groups(world, filter=none) == ([], "")
