"""CancelJob, RetryJob, UpdateJob, DeleteJob, and the same in bulk."""

from __future__ import annotations

from datetime import timedelta

from tests.conformance.callers import Json, Reply
from tests.conformance.scenarios import scenario
from tests.conformance.scene import (
    LONG_BACKOFF,
    UNSERVED,
    Scene,
    events_of,
    moment,
    nobody,
    now,
    state,
    steps,
    timestamp,
    types,
)

LONG = {"seconds": 600}
TOO_MANY = 100_001


def _forbidden(scene: Scene, rpc: str, job_id: str, where: str, /, **request: object) -> Reply:
    """The state forbids it, and is told."""
    reply = scene.refused("FAILED_PRECONDITION", "JOB_STATE", rpc, job_id=job_id, **request)
    assert reply.metadata == {"job_id": job_id, "state": f"JOB_STATE_{where}"}, reply
    return reply


@scenario()
def unknown_jobs_cannot_be_changed(scene: Scene) -> None:
    update = {"update_mask": "priority"}
    for rpc in ("CancelJob", "RetryJob", "DeleteJob", "ExplainJob", "UpdateJob"):
        request = update if rpc == "UpdateJob" else {}
        job_id = nobody()
        reply = scene.refused("NOT_FOUND", "JOB_UNKNOWN", rpc, job_id=job_id, **request)
        assert reply.detail("ResourceInfo")["resource_name"] == job_id
        scene.invalid("job_id", rpc, job_id=job_id.upper(), **request)


# Cancel.


@scenario()
def a_waiting_job_is_cancelled_at_once(scene: Scene) -> None:
    job_id = scene.submit(payload={"a": 1})["job_id"]
    job = scene.cancel(job_id, reason="no longer needed: Ü")
    assert state(job) == "CANCELLED"
    assert (job["error"]["type"], job["error"]["message"]) == ("CANCELLED", "no longer needed: Ü")
    assert job["finish_time"]
    assert "payload" not in job
    assert "cancel_requested" not in job
    assert scene.ended(job_id)["error"] == job["error"]
    events = scene.history(job_id)
    assert steps(events) == [("SUBMITTED", "QUEUED"), ("CANCELLED", "CANCELLED")]
    assert events[1]["error"] == job["error"]
    assert events[1]["actor"] == events[0]["actor"]
    again = scene.cancel(job_id, reason="another")
    assert again == job


@scenario()
def every_kind_of_waiting_is_cancelled(scene: Scene) -> None:
    scheduled = scene.submit(delay="3600s")["job_id"]
    retrying = scene.submit("demo.fail", retry_policy=LONG_BACKOFF)["job_id"]
    scene.happened(retrying, "ATTEMPT_FAILED")
    for job_id in (scheduled, retrying):
        job = scene.cancel(job_id)
        assert state(job) == "CANCELLED"
        assert job["error"]["type"] == "CANCELLED"
        assert "next_attempt_time" not in job


@scenario()
def a_running_job_is_asked_to_stop(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(job_id)
    job = scene.cancel(job_id, reason="enough")
    assert state(job) in {"RUNNING", "CANCELLED"}
    assert job["cancel_requested"] is True
    error = scene.ended(job_id)["error"]
    assert (error["type"], error["message"]) == ("CANCELLED", "enough")
    events = scene.history(job_id)
    assert types(events) == ["SUBMITTED", "STARTED", "CANCEL_REQUESTED", "CANCELLED"]
    assert events[2]["actor"]
    assert state(events[2]) == "RUNNING"
    assert events[3]["error"] == error


@scenario()
def what_has_ended_otherwise_is_not_cancelled(scene: Scene) -> None:
    _forbidden(scene, "CancelJob", scene.run(), "SUCCEEDED")
    failed = scene.run("demo.fail", payload={"retryable": False})
    _forbidden(scene, "CancelJob", failed, "FAILED")


@scenario()
def a_reason_has_its_bounds(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    for reason in ("x" * 1001, "a\nb", "\x00", "\x7f"):
        scene.invalid("reason", "CancelJob", job_id=job_id, reason=reason)
    assert scene.cancel(job_id, reason="ü" * 1000)["error"]["message"] == "ü" * 1000


# Retry.


@scenario()
def a_failed_job_begins_again(scene: Scene) -> None:
    """With a fresh budget; sequence and attempt go on."""
    job_id = scene.run("demo.fail", payload={"times": 3}, max_attempts=1)
    before = scene.get(job_id)
    job = scene.ok("RetryJob", job_id=job_id)["job"]
    assert state(job) == "QUEUED"
    assert "payload" not in job
    cleared = {"finish_time", "purge_time", "error", "cancel_requested", "next_attempt_time"}
    assert not job.keys() & cleared, job
    assert int(job["last_sequence"]) == int(before["last_sequence"]) + 1
    after = int(before["last_sequence"])
    with scene.stream("WatchJob", job_id=job_id, after_sequence=after) as stream:
        events = events_of(stream)
        assert stream.reply.code == "OK", stream.reply
    assert types(events) == ["RETRIED", "STARTED", "ATTEMPT_FAILED", "FAILED"]
    assert state(events[0]) == "QUEUED"
    assert events[0]["actor"]
    assert scene.get(job_id)["attempt"] == 2
    scene.ok("RetryJob", job_id=job_id)
    scene.ended(job_id)
    scene.ok("RetryJob", job_id=job_id)
    assert scene.succeeded(job_id) == {"attempt": 4}


@scenario()
def a_cancelled_job_begins_again(scene: Scene) -> None:
    running = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(running)
    scene.cancel(running)
    scene.ended(running)
    job = scene.ok("RetryJob", job_id=running)["job"]
    assert "cancel_requested" not in job
    assert state(job) == "QUEUED"
    waiting = scene.submit()["job_id"]
    scene.cancel(waiting)
    assert state(scene.ok("RetryJob", job_id=waiting)["job"]) == "QUEUED"
    assert state(scene.get(waiting)) == "QUEUED"


@scenario()
def a_job_that_begins_again_does_not_expire(scene: Scene) -> None:
    job_id = scene.submit(expire_time="2001-01-01T00:00:00Z")["job_id"]
    assert scene.ended(job_id)["error"]["type"] == "EXPIRED"
    job = scene.ok("RetryJob", job_id=job_id)["job"]
    assert state(job) == "QUEUED"
    assert "expire_time" not in job
    assert state(scene.ok("GetResult", job_id=job_id, wait="0.5s")) == "QUEUED"


@scenario()
def only_failed_and_cancelled_jobs_begin_again(scene: Scene) -> None:
    _forbidden(scene, "RetryJob", scene.submit()["job_id"], "QUEUED")
    _forbidden(scene, "RetryJob", scene.submit(delay="3600s")["job_id"], "SCHEDULED")
    _forbidden(scene, "RetryJob", scene.run(), "SUCCEEDED")


@scenario()
def a_unique_key_is_checked_again(scene: Scene) -> None:
    unique = {"key": scene.tag, "on_conflict": "UNIQUE_CONFLICT_REJECT"}
    first = scene.submit(unique=unique)["job_id"]
    scene.cancel(first)
    second = scene.submit(unique=unique)["job_id"]
    reply = scene.refused("ALREADY_EXISTS", "UNIQUE_CONFLICT", "RetryJob", job_id=first)
    assert reply.metadata["job_id"] == second
    scene.cancel(second)
    assert state(scene.ok("RetryJob", job_id=first)["job"]) == "QUEUED"


# Update.


@scenario()
def what_the_mask_names_is_changed(scene: Scene) -> None:
    job_id = scene.submit(labels={"a": "1"}, priority=2)["job_id"]
    changed = {"priority": 8, "labels": {"b": "2"}}
    job = scene.ok("UpdateJob", job_id=job_id, **changed, update_mask="priority")["job"]
    assert (job["priority"], job["labels"]) == (8, {"a": "1"})
    assert "payload" not in job
    job = scene.ok("UpdateJob", job_id=job_id, **changed, update_mask="priority,labels")["job"]
    assert (job["priority"], job["labels"]) == (8, {"b": "2"})
    job = scene.ok("UpdateJob", job_id=job_id, update_mask="priority,labels")["job"]
    assert not job.keys() & {"priority", "labels"}
    stored = scene.get(job_id)
    assert {**stored, "payload": None} == {**job, "payload": None}
    updates = [event for event in scene.history(job_id) if event["type"].endswith("_UPDATED")]
    assert updates
    assert all(event["actor"] and state(event) == "QUEUED" for event in updates)


@scenario()
def a_new_time_schedules_or_makes_due(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    due = now() + timedelta(days=2)
    mask = {"update_mask": "scheduleTime"}
    job = scene.ok("UpdateJob", job_id=job_id, schedule_time=timestamp(due), **mask)["job"]
    assert state(job) == "SCHEDULED"
    assert moment(job["schedule_time"]) == due
    assert steps(scene.history(job_id))[-1] == ("UPDATED", "SCHEDULED")
    past = "2001-01-01T00:00:00Z"
    job = scene.ok("UpdateJob", job_id=job_id, schedule_time=past, **mask)["job"]
    assert state(job) == "QUEUED"
    later = scene.submit("demo.echo", payload={"a": 1}, delay="3600s")["job_id"]
    scene.ok("UpdateJob", job_id=later, schedule_time=past, **mask)
    assert scene.succeeded(later) == {"a": 1}


@scenario()
def a_retry_can_be_brought_forward(scene: Scene) -> None:
    job_id = scene.submit("demo.fail", retry_policy=LONG_BACKOFF)["job_id"]
    scene.happened(job_id, "ATTEMPT_FAILED")
    past = "2001-01-01T00:00:00Z"
    scene.ok("UpdateJob", job_id=job_id, schedule_time=past, update_mask="scheduleTime")
    assert scene.succeeded(job_id) == {"attempt": 2}


@scenario()
def an_update_names_its_bad_fields(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    scene.invalid("update_mask", "UpdateJob", job_id=job_id, priority=1)
    for path in ("queue", "colour", "priority,jobType", "labels.a"):
        scene.invalid("update_mask", "UpdateJob", job_id=job_id, update_mask=path)
    bad: list[tuple[str, Json]] = [
        ("priority", {"priority": 10, "update_mask": "priority"}),
        ("priority", {"priority": -1, "update_mask": "priority"}),
        ('labels["A"]', {"labels": {"A": "x"}, "update_mask": "labels"}),
        (
            "schedule_time",
            {
                "schedule_time": timestamp(now() + timedelta(days=367)),
                "update_mask": "scheduleTime",
            },
        ),
    ]
    for path, request in bad:
        scene.invalid(path, "UpdateJob", job_id=job_id, **request)
    assert scene.get(job_id)["last_sequence"] == "1"


@scenario()
def only_a_waiting_job_is_updated(scene: Scene) -> None:
    mask = {"priority": 1, "update_mask": "priority"}
    running = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(running)
    _forbidden(scene, "UpdateJob", running, "RUNNING", **mask)
    _forbidden(scene, "UpdateJob", scene.run(), "SUCCEEDED", **mask)


# Delete.


@scenario()
def an_ended_job_is_deleted(scene: Scene) -> None:
    for job_id in (scene.run(), scene.run("demo.fail", payload={"retryable": False})):
        assert scene.ok("DeleteJob", job_id=job_id) == {}
        for rpc in ("GetJob", "GetResult", "ListJobEvents", "DeleteJob"):
            scene.refused("NOT_FOUND", "JOB_UNKNOWN", rpc, job_id=job_id)


@scenario()
def an_active_job_is_not_deleted(scene: Scene) -> None:
    _forbidden(scene, "DeleteJob", scene.submit()["job_id"], "QUEUED")
    _forbidden(scene, "DeleteJob", scene.submit(delay="3600s")["job_id"], "SCHEDULED")
    running = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(running)
    _forbidden(scene, "DeleteJob", running, "RUNNING")


# In bulk.


def _submitted(scene: Scene, count: int) -> tuple[Json, list[str]]:
    """So many idle jobs, and a filter for them while they wait."""
    request = {"job_type": scene.idle, "labels": {"run": scene.tag}}
    answers = scene.ok("SubmitJobs", requests=[request] * count)["responses"]
    return request, [answer["job"]["job_id"] for answer in answers]


@scenario()
def many_are_cancelled(scene: Scene) -> None:
    """A dry run changes nothing; `max_count` bounds both counts."""
    _, ids = _submitted(scene, 3)
    waiting = {"labels": {"run": scene.tag}, "states": ["JOB_STATE_QUEUED"]}
    dry = scene.ok("CancelJobs", filter=waiting, dry_run=True)
    assert dry == {"matched_count": 3}
    dry = scene.ok("CancelJobs", filter=waiting, dry_run=True, max_count=2)
    assert dry == {"matched_count": 2, "more": True}
    assert {state(scene.get(job_id)) for job_id in ids} == {"QUEUED"}
    done = scene.ok("CancelJobs", filter=waiting, max_count=2, reason="in bulk")
    assert done == {"matched_count": 2, "changed_count": 2, "more": True}
    done = scene.ok("CancelJobs", filter=waiting, reason="in bulk")
    assert done == {"matched_count": 1, "changed_count": 1}
    assert scene.ok("CancelJobs", filter=waiting) == {}
    for job_id in ids:
        job = scene.get(job_id)
        assert (state(job), job["error"]["message"]) == ("CANCELLED", "in bulk")
        assert scene.history(job_id)[-1]["actor"]


@scenario()
def many_begin_again_and_are_deleted(scene: Scene) -> None:
    _, ids = _submitted(scene, 3)
    own = {"labels": {"run": scene.tag}}
    cancelled = {**own, "states": ["JOB_STATE_CANCELLED"]}
    scene.ok("CancelJobs", filter=own)
    assert scene.ok("RetryJobs", filter=cancelled, dry_run=True) == {"matched_count": 3}
    done = scene.ok("RetryJobs", filter=cancelled, max_count=2)
    assert done == {"matched_count": 2, "changed_count": 2, "more": True}
    states = sorted(state(scene.get(job_id)) for job_id in ids)
    assert states == ["CANCELLED", "QUEUED", "QUEUED"]
    scene.ok("CancelJobs", filter=own)
    assert scene.ok("DeleteJobs", filter=cancelled, dry_run=True) == {"matched_count": 3}
    done = scene.ok("DeleteJobs", filter=cancelled)
    assert done == {"matched_count": 3, "changed_count": 3}
    for job_id in ids:
        scene.refused("NOT_FOUND", "JOB_UNKNOWN", "GetJob", job_id=job_id)


@scenario()
def bulk_leaves_alone_what_does_not_match(scene: Scene) -> None:
    _submitted(scene, 2)
    other = scene.submit(labels={"run": scene.tag, "keep": "yes"}, queue=UNSERVED)["job_id"]
    matching = {"labels": {"run": scene.tag}, "queue": "default"}
    done = scene.ok("CancelJobs", filter=matching)
    assert done == {"matched_count": 2, "changed_count": 2}
    assert state(scene.get(other)) == "QUEUED"


@scenario()
def bulk_names_its_bad_fields(scene: Scene) -> None:
    own = {"labels": {"run": scene.tag}}
    for rpc in ("CancelJobs", "RetryJobs", "DeleteJobs"):
        scene.invalid("filter", rpc)
        scene.invalid("filter", rpc, filter={}, dry_run=True)
        for count in (-1, TOO_MANY):
            scene.invalid("max_count", rpc, filter=own, max_count=count)
        assert scene.ok(rpc, filter=own, max_count=TOO_MANY - 1) == {}
    scene.invalid("reason", "CancelJobs", filter=own, reason="x" * 1001)
