"""Unique and concurrency keys, expiration, times, priority."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import (
    Scene,
    moment,
    now,
    state,
    steps,
    timestamp,
    types,
)

SHORT = {"seconds": 0.5}
LONG = {"seconds": 600}
PAST = "2001-02-03T04:05:06Z"


def _unique(scene: Scene, conflict: str = "", scope: str = "") -> Json:
    made = {"key": scene.tag}
    if conflict:
        made["on_conflict"] = f"UNIQUE_CONFLICT_{conflict}"
    if scope:
        made["scope"] = f"UNIQUE_SCOPE_{scope}"
    return made


# Unique.


@scenario()
def a_unique_job_is_returned(scene: Scene) -> None:
    """By default to whoever asks for another, until it has ended; per job type."""
    request: Json = {"job_type": scene.idle, "unique": _unique(scene)}
    first = scene.ok("SubmitJob", **request)
    assert "already_existed" not in first
    assert first["job"]["unique"]["key"] == scene.tag
    again = scene.ok("SubmitJob", **request, priority=5)
    assert again["already_existed"] is True
    assert again["job"]["job_id"] == first["job"]["job_id"]
    assert "priority" not in again["job"]
    scene.submit(f"{scene.idle}.other", unique=_unique(scene))
    explicit = _unique(scene, "RETURN_EXISTING", "ACTIVE")
    same = scene.ok("SubmitJob", job_type=scene.idle, unique=explicit)
    assert same["job"]["job_id"] == first["job"]["job_id"]
    scene.cancel(first["job"]["job_id"])
    new = scene.submit(unique=_unique(scene))
    assert new["job_id"] != first["job"]["job_id"]


@scenario()
def a_unique_job_is_guarded(scene: Scene) -> None:
    job_id = scene.submit(unique=_unique(scene), delay="3600s")["job_id"]
    reply = scene.refused(
        "ALREADY_EXISTS",
        "UNIQUE_CONFLICT",
        "SubmitJob",
        job_type=scene.idle,
        unique=_unique(scene, "REJECT"),
    )
    assert reply.metadata["job_id"] == job_id


@scenario()
def a_unique_job_that_waits_is_replaced(scene: Scene) -> None:
    unique = _unique(scene, "REPLACE")
    first = scene.submit(unique=unique)["job_id"]
    second = scene.submit(unique=unique)["job_id"]
    assert first != second
    assert scene.ended(first)["error"]["type"] == "CANCELLED"
    assert types(scene.history(first)) == ["SUBMITTED", "CANCELLED"]
    assert state(scene.get(second)) == "QUEUED"
    third = scene.ok("SubmitJob", job_type=scene.idle, unique=_unique(scene))
    assert third["job"]["job_id"] == second


@scenario()
def a_unique_job_that_runs_is_left_alone(scene: Scene) -> None:
    """The one that replaces it waits, or runs, beside it."""
    unique = _unique(scene, "REPLACE")
    running = scene.submit("demo.sleep", payload=LONG, unique=unique)["job_id"]
    scene.started(running)
    beside = scene.submit("demo.sleep", payload={"seconds": 0}, unique=unique)["job_id"]
    assert beside != running
    scene.succeeded(beside)
    job = scene.get(running)
    assert state(job) == "RUNNING"
    assert "cancel_requested" not in job


@scenario()
def the_scope_says_who_holds_a_key(scene: Scene) -> None:
    """WAITING: a running job does not. ACTIVE: it does."""

    def sleep(scope: str, **request: Any) -> Json:
        unique = {**_unique(scene, scope=scope), "key": f"{scene.tag} {scope}"}
        return scene.ok("SubmitJob", job_type="demo.sleep", payload=LONG, unique=unique, **request)

    active, waiting = (sleep(scope)["job"]["job_id"] for scope in ("ACTIVE", "WAITING"))
    scene.started(active)
    scene.started(waiting)
    held = sleep("ACTIVE")
    assert (held["job"]["job_id"], held.get("already_existed")) == (active, True)
    beside = sleep("WAITING", delay="3600s")
    assert beside["job"]["job_id"] != waiting
    assert "already_existed" not in beside
    held = sleep("WAITING")
    assert (held["job"]["job_id"], held.get("already_existed")) == (beside["job"]["job_id"], True)


@scenario()
def unique_jobs_of_one_call_see_each_other(scene: Scene) -> None:
    request: Json = {"job_type": scene.idle, "unique": _unique(scene)}
    first, second = scene.ok("SubmitJobs", requests=[request, request])["responses"]
    assert first["job"]["job_id"] == second["job"]["job_id"]
    assert second["already_existed"] is True


@scenario()
def keys_have_their_bounds(scene: Scene) -> None:
    long = "x" * 256
    bad: list[tuple[str, Json]] = [
        *(("unique.key", {"unique": {"key": text}}) for text in ("", long, "a\nb")),
        *(
            ("concurrency.key", {"concurrency": {"key": text, "max_running": 1}})
            for text in ("", long, "a\nb")
        ),
        *(
            ("concurrency.max_running", {"concurrency": {"key": "k", "max_running": number}})
            for number in (-1, 0, 10_001)
        ),
    ]
    requests = [{"job_type": scene.idle, **fragment} for _, fragment in bad]
    paths = {f"requests[{index}].{path}" for index, (path, _) in enumerate(bad)}
    scene.invalid(paths, "SubmitJobs", requests=requests)
    good: list[Json] = [
        {"unique": {"key": "ü" * 255}},
        {"concurrency": {"key": "ü" * 255, "max_running": 1}},
        {"concurrency": {"key": "k", "max_running": 10_000}},
    ]
    validated = [{"job_type": scene.idle, **each, "validate_only": True} for each in good]
    assert len(scene.ok("SubmitJobs", requests=validated)["responses"]) == len(good)


@scenario()
def keys_are_kept(scene: Scene) -> None:
    unique = _unique(scene, "REPLACE", "WAITING")
    concurrency = {"key": scene.tag, "max_running": 3}
    job = scene.submit(unique=unique, concurrency=concurrency)
    assert (job["unique"], job["concurrency"]) == (unique, concurrency)
    stored = scene.get(job["job_id"])
    assert (stored["unique"], stored["concurrency"]) == (unique, concurrency)


# Concurrency.


@scenario()
def a_concurrency_key_limits_what_runs(scene: Scene) -> None:
    """Whatever the type."""
    concurrency = {"key": scene.tag, "max_running": 1}
    sleep: Json = {"job_type": "demo.sleep", "payload": {"seconds": 0.2}}
    requests = [{**sleep, "concurrency": concurrency} for _ in range(3)]
    requests.append({"job_type": "demo.echo", "concurrency": concurrency})
    answers = scene.ok("SubmitJobs", requests=requests)["responses"]
    for answer in answers:
        scene.succeeded(answer["job"]["job_id"])
    jobs = [scene.get(answer["job"]["job_id"]) for answer in answers]
    assert_one_at_a_time(jobs)


def assert_one_at_a_time(jobs: list[Json]) -> None:
    jobs = sorted(jobs, key=lambda job: moment(job["start_time"]))
    for before, after in pairwise(jobs):
        assert moment(before["finish_time"]) <= moment(after["start_time"]), (before, after)


@scenario()
def each_job_goes_by_its_own_number(scene: Scene) -> None:
    def sleep(limit: int, seconds: float) -> str:
        concurrency = {"key": scene.tag, "max_running": limit}
        payload = {"seconds": seconds}
        job_id: str = scene.submit("demo.sleep", payload=payload, concurrency=concurrency)["job_id"]
        return job_id

    running = sleep(1, 600)
    scene.started(running)
    held = sleep(1, 0)
    scene.succeeded(sleep(2, 0))
    assert state(scene.get(held)) == "QUEUED"
    scene.cancel(running)
    scene.succeeded(held)


# Expiration.


@scenario()
def a_job_expires(scene: Scene) -> None:
    past = scene.submit("demo.echo", expire_time=PAST)["job_id"]
    soon = scene.submit(ttl="0.3s")["job_id"]
    scheduled = scene.submit("demo.echo", ttl="0.3s", delay="3600s")["job_id"]
    for job_id in (past, soon, scheduled):
        answer = scene.ended(job_id)
        assert (state(answer), answer["error"]["type"]) == ("FAILED", "EXPIRED")
        assert types(scene.history(job_id)) == ["SUBMITTED", "FAILED"]
        job = scene.get(job_id)
        assert not job.keys() & {"attempt", "start_time"}
        assert job["expire_time"]


@scenario()
def an_attempt_that_has_begun_does_not_expire(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload={"seconds": 1.5}, ttl="1s")["job_id"]
    answer = scene.ended(job_id)
    if state(answer) == "FAILED":  # the workers were too busy to start it in time
        assert answer["error"]["type"] == "EXPIRED"
        assert types(scene.history(job_id)) == ["SUBMITTED", "FAILED"]
    else:
        assert answer["result"] == {"seconds": 1.5, "steps": 1}


# Times.


@scenario()
def a_scheduled_job_starts_when_it_is_due(scene: Scene) -> None:
    delayed = scene.submit("demo.echo", delay="0.8s")["job_id"]
    at = timestamp(now() + timedelta(seconds=0.8))
    timed = scene.submit("demo.echo", schedule_time=at)["job_id"]
    for job_id in (delayed, timed):
        scene.succeeded(job_id)
        job = scene.get(job_id)
        assert moment(job["start_time"]) >= moment(job["schedule_time"])
    assert moment(scene.get(timed)["start_time"]) >= moment(at)
    assert steps(scene.history(delayed)) == [
        ("SUBMITTED", "SCHEDULED"),
        ("QUEUED", "QUEUED"),
        ("STARTED", "RUNNING"),
        ("SUCCEEDED", "SUCCEEDED"),
    ]


# Priority.


@scenario(needs="queue")
def the_greater_priority_goes_first(scene: Scene) -> None:
    with scene.queue() as queue:
        scene.ok("PauseQueue", queue=queue)
        scene.ok("UpdateQueue", queue=queue, max_running=1, update_mask="maxRunning")
        priorities = [0, 9, 4, 0, 9, 4]
        requests = [
            {"job_type": "demo.echo", "queue": queue, "priority": priority}
            for priority in priorities
        ]
        answers = scene.ok("SubmitJobs", requests=requests)["responses"]
        raised = answers[3]["job"]["job_id"]
        scene.ok("UpdateJob", job_id=raised, priority=7, update_mask="priority")
        scene.ok("ResumeQueue", queue=queue)
        ids = [answer["job"]["job_id"] for answer in answers]
        for job_id in ids:
            scene.succeeded(job_id)
        jobs = sorted(map(scene.get, ids), key=lambda job: moment(job["start_time"]))
    assert [job.get("priority", 0) for job in jobs] == [9, 9, 7, 4, 4, 0]
