"""The commands for lists, changes, queues, workers and schedules: what they send and print."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import admin_service_pb2 as admin
from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as jobs
from generated.jobsvc.v1 import schedule_service_pb2 as schedules
from jobsvc.cli import tables
from jobsvc.cli.tables import lines
from tests.unit.cli.conftest import Refusal, Run, Script
from tests.unit.cli.examples import JOB_ID, history, job

ANSWERS: dict[str, Any] = {
    "ListJobs": jobs.ListJobsResponse(jobs=[job(), job()]),
    "ExplainJob": jobs.ExplainJobResponse(
        state=job_pb2.JOB_STATE_QUEUED,
        reason=job_pb2.WAIT_REASON_QUEUE_LIMIT,
        message="2 of 2 run",
        facts={"limit": "2"},
    ),
    "UpdateJob": jobs.UpdateJobResponse(job=job()),
    "RetryJob": jobs.RetryJobResponse(job=job()),
    "CancelJob": jobs.CancelJobResponse(job=job()),
    "DeleteJob": jobs.DeleteJobResponse(),
    "CancelJobs": admin.CancelJobsResponse(matched_count=3, changed_count=2, more=True),
    "RetryJobs": admin.RetryJobsResponse(matched_count=3, changed_count=3),
    "DeleteJobs": admin.DeleteJobsResponse(matched_count=3, changed_count=3),
    "ListJobTypes": jobs.ListJobTypesResponse(
        job_types=[job_pb2.JobType(name="demo.echo", description="Says it again.")]
    ),
    "ListQueues": admin.ListQueuesResponse(
        queues=[
            admin.Queue(
                name="default",
                paused=True,
                rate_limit=admin.RateLimit(max_starts=5, period=Duration(seconds=90)),
                ready_message_count=-1,
                oldest_queued_age=Duration(seconds=3, nanos=400_000_000),
            )
        ]
    ),
    "PauseQueue": admin.PauseQueueResponse(queue=admin.Queue(name="q", live_worker_count=1)),
    "ResumeQueue": admin.ResumeQueueResponse(queue=admin.Queue(name="q", queued_count=1)),
    "UpdateQueue": admin.UpdateQueueResponse(queue=admin.Queue(name="q", running_count=1)),
    "ListWorkers": admin.ListWorkersResponse(
        workers=[admin.Worker(worker_id="w", concurrency=4, running_job_ids=[JOB_ID])]
    ),
    "ListFailureGroups": admin.ListFailureGroupsResponse(
        failure_groups=[
            admin.FailureGroup(
                job_type="t", error_type="ValueError", job_count=7, sample_job_ids=[JOB_ID]
            )
        ]
    ),
    "ListSchedules": schedules.ListSchedulesResponse(
        schedules=[schedules.Schedule(schedule_id="nightly", cron="0 3 * * *")]
    ),
    "GetSchedule": schedules.GetScheduleResponse(
        schedule=schedules.Schedule(
            schedule_id="nightly", request=jobs.SubmitJobRequest(job_type="t", queue="q"), etag="7"
        )
    ),
    "CreateSchedule": schedules.CreateScheduleResponse(),
    "UpdateSchedule": schedules.UpdateScheduleResponse(),
    "DeleteSchedule": schedules.DeleteScheduleResponse(),
    "TriggerSchedule": schedules.TriggerScheduleResponse(job=job()),
}


@pytest.fixture(autouse=True)
def answers(script: Script) -> None:
    script.answers.update(ANSWERS)


SENT: list[tuple[str, dict[str, Any]]] = [
    ("list --limit 7", {"view": "JOB_VIEW_BASIC", "page_size": 7, "filter": {}}),
    ("list --full", {"view": "JOB_VIEW_FULL", "page_size": 50, "filter": {}}),
    (
        (
            "list --limit 0 --state failed --state CANCELLED --type a --type b --queue q"
            " --label x=1 --label y=2 --error-type E --key k"
            " --created-after 2026-01-31T12:00:00Z --finished-before 2026-01-31T12:00:00+01:00"
        ),
        {
            "view": "JOB_VIEW_BASIC",
            "page_size": 1000,
            "filter": {
                "states": ["JOB_STATE_FAILED", "JOB_STATE_CANCELLED"],
                "job_types": ["a", "b"],
                "queue": "q",
                "labels": {"x": "1", "y": "2"},
                "error_types": ["E"],
                "idempotency_key": "k",
                "create_time_after": "2026-01-31T12:00:00Z",
                "finish_time_before": "2026-01-31T11:00:00Z",
            },
        },
    ),
    (f"explain {JOB_ID}", {"job_id": JOB_ID}),
    (f"update {JOB_ID} --priority 0", {"job_id": JOB_ID, "update_mask": "priority"}),
    (
        f"update {JOB_ID} --label a=b --schedule-time 2026-01-31T12:00:00Z",
        {
            "job_id": JOB_ID,
            "labels": {"a": "b"},
            "schedule_time": "2026-01-31T12:00:00Z",
            "update_mask": "labels,scheduleTime",
        },
    ),
    (f"update {JOB_ID} --no-labels", {"job_id": JOB_ID, "update_mask": "labels"}),
    (f"retry {JOB_ID}", {"job_id": JOB_ID}),
    (f"delete {JOB_ID}", {"job_id": JOB_ID}),
    (f"cancel {JOB_ID} --reason why", {"job_id": JOB_ID, "reason": "why"}),
    (
        "cancel --queue q --reason why --max-count 9 --dry-run",
        {"filter": {"queue": "q"}, "reason": "why", "max_count": 9, "dry_run": True},
    ),
    ("retry --state failed", {"filter": {"states": ["JOB_STATE_FAILED"]}}),
    ("delete --type t --yes", {"filter": {"job_types": ["t"]}}),
    ("types", {}),
    ("workers", {}),
    (
        "failures --type t",
        {
            "filter": {
                "job_types": ["t"],
                "states": [
                    f"JOB_STATE_{name}"
                    for name in ("SCHEDULED", "QUEUED", "RUNNING", "RETRYING", "FAILED")
                ],
            }
        },
    ),
    ("failures --state succeeded", {"filter": {"states": ["JOB_STATE_SUCCEEDED"]}}),
    ("queues list", {}),
    ("queues pause q", {"queue": "q"}),
    ("queues resume q", {"queue": "q"}),
    (
        "queues update q --max-running 3",
        {"queue": "q", "max_running": 3, "update_mask": "maxRunning"},
    ),
    (
        "queues update q --rate-limit 100/1m --max-running 0",
        {
            "queue": "q",
            "rate_limit": {"max_starts": 100, "period": "60s"},
            "update_mask": "maxRunning,rateLimit",
        },
    ),
    ("queues update q --rate-limit 0", {"queue": "q", "update_mask": "rateLimit"}),
    ("schedules list", {}),
    ("schedules get nightly", {"schedule_id": "nightly"}),
    ("schedules trigger nightly", {"schedule_id": "nightly"}),
    ("schedules delete nightly", {"schedule_id": "nightly"}),
    (
        "schedules update nightly --cron * --pause --overlap skip --missed-ticks run-once --etag 3",
        {
            "schedule": {
                "schedule_id": "nightly",
                "cron": "*",
                "paused": True,
                "overlap": "OVERLAP_SKIP",
                "missed_ticks": "MISSED_TICKS_RUN_ONCE",
                "etag": "3",
            },
            "update_mask": "cron,paused,missedTicks,overlap",
        },
    ),
    (
        "schedules update nightly --resume",
        {"schedule": {"schedule_id": "nightly"}, "update_mask": "paused"},
    ),
]


@pytest.mark.parametrize(("words", "expected"), SENT, ids=[words for words, _ in SENT])
def test_what_is_sent(script: Script, jobsvc: Run, words: str, expected: dict[str, Any]) -> None:
    ended = jobsvc(*words.split())
    assert (ended.code, ended.err) == (0, "")
    assert MessageToDict(script.requests[-1], preserving_proto_field_name=True) == expected


def test_a_schedule_is_created(script: Script, jobsvc: Run) -> None:
    words = ("nightly", "0 3 * * *", "t", '{"a": 1}', "--time-zone", "Europe/Berlin")
    assert jobsvc("schedules", "create", *words, "--queue", "q", "--paused").code == 0
    (request,) = script.requests
    schedule = request.schedule
    assert (schedule.schedule_id, schedule.cron) == ("nightly", "0 3 * * *")
    assert (schedule.time_zone, schedule.paused) == ("Europe/Berlin", True)
    assert (schedule.request.job_type, schedule.request.queue) == ("t", "q")
    assert dict(schedule.request.payload) == {"a": 1}


def test_a_new_payload_leaves_the_rest_of_the_request(script: Script, jobsvc: Run) -> None:
    assert jobsvc("schedules", "update", "nightly", "--payload", '{"b": 2}').code == 0
    request = script.requests[-1]
    assert list(request.update_mask.paths) == ["request"]
    assert (request.schedule.request.job_type, request.schedule.request.queue) == ("t", "q")
    assert dict(request.schedule.request.payload) == {"b": 2}
    assert request.schedule.etag == "7"


def test_a_span_is_a_time_ago_or_ahead(script: Script, jobsvc: Run) -> None:
    now = datetime.now(UTC)
    assert jobsvc("list", "--created-after", "2h").code == 0
    after = script.requests[-1].filter.create_time_after.ToDatetime(UTC)
    assert abs(after - (now - timedelta(hours=2))) < timedelta(minutes=1)
    assert jobsvc("update", JOB_ID, "--schedule-time", "2h").code == 0
    due = script.requests[-1].schedule_time.ToDatetime(UTC)
    assert abs(due - (now + timedelta(hours=2))) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cancel"], "give a JOB_ID, or options that name jobs"),
        (["delete", JOB_ID, "--queue", "q"], "not both"),
        (["watch", JOB_ID, "--queue", "q"], "not both"),
        (["watch", "--after-sequence", "3"], "goes with a JOB_ID"),
        (["update", JOB_ID], "say what to change"),
        (["update", JOB_ID, "--label", "a=b", "--no-labels"], "not both"),
        (["update", JOB_ID, "--schedule-time", "tomorrow"], "neither a time"),
        (["list", "--created-after", "2026-01-31T12:00:00"], "neither a time"),
        (["list", "--state", "lost"], "is not one of"),
        (["queues", "update", "q"], "say what to change"),
        (["queues", "update", "q", "--rate-limit", "5"], "not of the form 100/1m"),
        (["schedules", "update", "nightly"], "say what to change"),
    ],
)
def test_usage(jobsvc: Run, words: list[str], message: str) -> None:
    ended = jobsvc(*words)
    assert (ended.code, ended.out) == (2, "")
    assert message in " ".join(ended.err.replace("│", " ").split())


def test_lists_are_one_resource_a_line(jobsvc: Run) -> None:
    ended = jobsvc("list")
    assert [json.loads(line)["job_id"] for line in ended.lines] == [JOB_ID, JOB_ID]
    assert jobsvc("list", "--limit", "1").lines == ended.lines[:1]


def test_every_page_is_read(script: Script, jobsvc: Run) -> None:
    pages = [
        jobs.ListJobsResponse(jobs=[job()], next_page_token="next"),
        jobs.ListJobsResponse(next_page_token="empty"),
        jobs.ListJobsResponse(jobs=[job()]),
    ]
    script.answers["ListJobs"] = lambda: pages.pop(0)
    assert len(jobsvc("list").lines) == 2
    assert [request.page_token for request in script.requests] == ["", "next", "empty"]


def test_bulk_answers_are_printed(jobsvc: Run) -> None:
    assert jobsvc("cancel", "--queue", "q").json == {
        "matched_count": 3,
        "changed_count": 2,
        "more": True,
    }


@pytest.mark.parametrize(
    "words",
    ["list", "types", "queues list", "workers", "failures", "schedules list"],
)
def test_tables_fit(jobsvc: Run, words: str) -> None:
    ended = jobsvc(*words.split(), "--output", "table")
    assert ended.code == 0
    assert len(ended.lines) >= 2
    assert ended.lines[0].isupper()
    assert max(map(len, ended.lines)) <= 100


def test_a_table_of_queues(jobsvc: Run) -> None:
    titles, row = (line.split() for line in jobsvc("queues", "list", "--output", "table").lines)
    found = dict(zip(titles, row, strict=True))
    assert (found["PAUSED"], found["RATE"], found["READY"]) == ("yes", "5/1m30s", "-")
    assert (found["OLDEST"], found["MAX"]) == ("3.4s", "-")


def test_the_widest_columns_give_way() -> None:
    rows = [["x" * 80, "i" * 36, "y" * 20], ["x", "i", "y"]]
    shown = list(lines(["A", "ID", "B"], rows, [False, True, False], 100))
    assert max(map(len, shown)) == 100
    assert "i" * 36 in shown[1]
    assert "y" * 20 in shown[1]
    assert "…" in shown[1]


def test_spans_and_ages() -> None:
    for seconds, text in ((0, "0s"), (0.25, "0.2s"), (59, "59s"), (60, "1m"), (90, "1m30s")):
        assert tables.span(_duration(seconds)) == text
    assert tables.span(_duration(100_000)) == "1d3h"
    ahead = Timestamp()
    ahead.FromDatetime(datetime.now(UTC) + timedelta(hours=5, minutes=30))
    assert tables.age(ahead) == "+5h29m"


def _duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def test_watching_all_jobs(script: Script, jobsvc: Run) -> None:
    events = [
        jobs.WatchJobsResponse(event=event, resume_token=f"t{event.sequence}")
        for event in history()
    ]
    heartbeat = jobs.WatchJobsResponse(heartbeat=job_pb2.Heartbeat(), resume_token="t0")
    refusal = Refusal(grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING", "no")
    streams: list[Any] = [[heartbeat, *events], refusal]
    script.answers["WatchJobs"] = lambda: streams.pop(0)
    ended = jobsvc("watch", "--queue", "q", "--output", "table")
    assert ended.code == 4
    assert [line.split()[1:4] for line in ended.lines] == [
        [JOB_ID, str(event.sequence), name]
        for event, name in zip(
            history(), ("SUBMITTED", "STARTED", "PROGRESS", "LOG", "SUCCEEDED"), strict=True
        )
    ]
    assert ended.err.splitlines()[0] == "to go on from here: --resume-token t5"
    assert [request.resume_token for request in script.requests][:2] == ["", "t5"]


@pytest.mark.parametrize("words", ["pause", "resume", "update --max-running 3"])
def test_a_queue_that_nobody_uses_is_pointed_out(script: Script, jobsvc: Run, words: str) -> None:
    verb, *options = words.split()
    made = admin.Queue(name="typo")
    script.answers["PauseQueue"] = admin.PauseQueueResponse(queue=made)
    script.answers["ResumeQueue"] = admin.ResumeQueueResponse(queue=made)
    script.answers["UpdateQueue"] = admin.UpdateQueueResponse(queue=made)
    ended = jobsvc("queues", verb, "typo", *options)
    assert (ended.code, ended.json) == (0, {"name": "typo"})
    assert ended.err == "nobody consumes the queue 'typo', and no job is in it: is it meant?\n"
