"""ScheduleService."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import Scene, is_job_id, moment, now, state

YEARLY = "0 0 29 2 *"  # not while a test runs, but for one day in four years
DAILY = "30 4 * * *"


def _create(scene: Scene, suffix: str = "", /, **fields: Any) -> Json:
    """A schedule that is deleted when the scenario is over."""
    schedule_id = f"{scene.tag}{suffix}"
    scene.schedule_ids.add(schedule_id)
    fields = {"cron": YEARLY, "request": {"job_type": scene.idle}, **fields}
    made: Json = scene.ok("CreateSchedule", schedule={"schedule_id": schedule_id, **fields})[
        "schedule"
    ]
    return made


def _get(scene: Scene, schedule_id: str) -> Json:
    found: Json = scene.ok("GetSchedule", schedule_id=schedule_id)["schedule"]
    return found


@scenario()
def a_schedule_has_its_defaults(scene: Scene) -> None:
    made = _create(scene, cron=DAILY)
    assert made["schedule_id"] == scene.tag
    assert made["cron"] == DAILY
    assert made["request"]["job_type"] == scene.idle
    assert made.get("time_zone", "UTC") == "UTC"
    assert made.get("missed_ticks", "MISSED_TICKS_SKIP") == "MISSED_TICKS_SKIP"
    assert made.get("overlap", "OVERLAP_ALLOW") == "OVERLAP_ALLOW"
    assert not made.keys() & {"paused", "last_time", "last_job_id"}
    assert made["etag"]
    due = moment(made["next_time"])
    assert (due.hour, due.minute, due.second, due.microsecond) == (4, 30, 0, 0)
    assert timedelta() < due - now() <= timedelta(days=1, minutes=1)
    assert _get(scene, scene.tag) == made


@scenario()
def a_schedule_keeps_every_field(scene: Scene) -> None:
    request = {
        "job_type": scene.idle,
        "payload": {"a": [1, None]},
        "queue": scene.tag,
        "priority": 3,
        "max_attempts": 4,
        "labels": {"by": "schedule"},
        "ttl": "60s",
    }
    fields = {
        "cron": "15 12 1 1 *",
        "time_zone": "Asia/Kolkata",
        "paused": True,
        "missed_ticks": "MISSED_TICKS_RUN_ONCE",
        "overlap": "OVERLAP_SKIP",
    }
    made = _create(scene, request=request, **fields)
    assert {name: made[name] for name in fields} == fields
    kept = made["request"]
    assert {name: kept[name] for name in request if name != "ttl"} == {
        name: value for name, value in request.items() if name != "ttl"
    }
    assert float(kept["ttl"].removesuffix("s")) == 60
    assert _get(scene, scene.tag) == made


@scenario()
def a_time_zone_is_that_of_the_cron(scene: Scene) -> None:
    """Kolkata is 5:30 ahead, all year."""
    made = _create(scene, cron=DAILY, time_zone="Asia/Kolkata")
    due = moment(made["next_time"])
    assert (due.hour, due.minute) == (23, 0)


@scenario()
def what_the_server_sets_is_not_taken_from_the_caller(scene: Scene) -> None:
    own = {
        "next_time": "2001-01-01T00:00:00Z",
        "last_time": "2001-01-01T00:00:00Z",
        "last_job_id": "x",
        "etag": "mine",
    }
    made = _create(scene, **own)
    assert moment(made["next_time"]) > now()
    assert not made.keys() & {"last_time", "last_job_id"}
    assert made["etag"] != "mine"


@scenario()
def schedules_are_listed(scene: Scene) -> None:
    ids = [_create(scene, f"-{number}")["schedule_id"] for number in range(3)]
    for size in (0, 1000):
        listed = scene.pages("ListSchedules", "schedules", page_size=size)
        assert [s["schedule_id"] for s in listed if s["schedule_id"].startswith(scene.tag)] == ids
    first = scene.ok("ListSchedules", page_size=1)
    assert len(first.get("schedules", ())) <= 1
    assert first["next_page_token"]
    scene.invalid("page_size", "ListSchedules", page_size=-1)
    scene.invalid("page_token", "ListSchedules", page_token="x")


@scenario()
def a_schedule_id_is_taken_once(scene: Scene) -> None:
    made = _create(scene)
    again = {"schedule_id": scene.tag, "cron": DAILY, "request": {"job_type": scene.idle}}
    reply = scene.refused("ALREADY_EXISTS", "SCHEDULE_EXISTS", "CreateSchedule", schedule=again)
    assert reply.metadata == {"schedule_id": scene.tag}
    assert _get(scene, scene.tag) == made


@scenario()
def unknown_schedules_are_not_found(scene: Scene) -> None:
    update = {"schedule": {"schedule_id": scene.tag, "paused": True}, "update_mask": "paused"}
    for rpc in ("GetSchedule", "DeleteSchedule", "TriggerSchedule", "UpdateSchedule"):
        request = update if rpc == "UpdateSchedule" else {"schedule_id": scene.tag}
        reply = scene.refused("NOT_FOUND", "SCHEDULE_UNKNOWN", rpc, **request)
        assert reply.detail("ResourceInfo")["resource_name"] == scene.tag
    _create(scene)
    assert scene.ok("DeleteSchedule", schedule_id=scene.tag) == {}
    scene.refused("NOT_FOUND", "SCHEDULE_UNKNOWN", "GetSchedule", schedule_id=scene.tag)


@scenario()
def an_update_changes_what_its_mask_names(scene: Scene) -> None:
    made = _create(scene)
    new = {
        "schedule_id": scene.tag,
        "paused": True,
        "cron": DAILY,
        "overlap": "OVERLAP_SKIP",
        "request": {"job_type": scene.idle, "priority": 5},
    }
    paused = scene.ok("UpdateSchedule", schedule=new, update_mask="paused")["schedule"]
    assert paused["paused"] is True
    assert paused["cron"] == YEARLY
    assert paused["etag"] != made["etag"]
    changed = scene.ok("UpdateSchedule", schedule=new, update_mask="cron,overlap,request")[
        "schedule"
    ]
    assert (changed["cron"], changed["overlap"]) == (DAILY, "OVERLAP_SKIP")
    assert changed["request"]["priority"] == 5
    assert moment(changed["next_time"]) - now() <= timedelta(days=1, minutes=1)
    cleared = scene.ok("UpdateSchedule", schedule={"schedule_id": scene.tag}, update_mask="paused")[
        "schedule"
    ]
    assert "paused" not in cleared
    assert _get(scene, scene.tag) == cleared


@scenario()
def an_etag_guards_an_update(scene: Scene) -> None:
    made = _create(scene)
    own = {"schedule_id": scene.tag, "paused": True}
    fresh = {**own, "etag": made["etag"]}
    updated = scene.ok("UpdateSchedule", schedule=fresh, update_mask="paused")["schedule"]
    scene.refused(
        "ABORTED", "ETAG_MISMATCH", "UpdateSchedule", schedule=fresh, update_mask="paused"
    )
    assert _get(scene, scene.tag) == updated
    scene.ok("UpdateSchedule", schedule=own, update_mask="paused")


@scenario()
def a_trigger_submits_now(scene: Scene) -> None:
    """Whatever `paused` and `overlap` say."""
    request = {"job_type": scene.idle, "payload": {"a": 1}, "labels": {"run": scene.tag}}
    _create(scene, request=request, paused=True, overlap="OVERLAP_SKIP")
    jobs = [scene.ok("TriggerSchedule", schedule_id=scene.tag)["job"] for _ in range(2)]
    assert len({job["job_id"] for job in jobs}) == 2
    for job in jobs:
        assert is_job_id(job["job_id"])
        assert (state(job), job["labels"]) == ("QUEUED", {"run": scene.tag})
        assert "payload" not in job
        assert scene.get(job["job_id"])["payload"] == {"a": 1}
        assert scene.history(job["job_id"])[0]["actor"]


@scenario()
def a_deleted_schedule_leaves_its_jobs(scene: Scene) -> None:
    _create(scene)
    job_id = scene.ok("TriggerSchedule", schedule_id=scene.tag)["job"]["job_id"]
    scene.ok("DeleteSchedule", schedule_id=scene.tag)
    assert state(scene.get(job_id)) == "QUEUED"


@scenario()
def a_schedule_names_its_bad_fields(scene: Scene) -> None:
    good: Json = {"schedule_id": scene.tag, "cron": DAILY, "request": {"job_type": scene.idle}}

    def refused(field: str, **change: Any) -> None:
        scene.invalid(f"schedule.{field}", "CreateSchedule", schedule={**good, **change})

    for schedule_id in ("", "A", "1a", "a_b", "a.b", "a" * 64):
        refused("schedule_id", schedule_id=schedule_id)
    for cron in ("", "x", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "@daily"):
        refused("cron", cron=cron)
    for zone in ("Mars/Olympus", "+02:00", "europe berlin"):
        refused("time_zone", time_zone=zone)
    idle = {"job_type": scene.idle}
    bad: list[tuple[str, Any]] = [
        ("schedule_time", "2001-01-01T00:00:00Z"),
        ("delay", "1s"),
        ("expire_time", "2099-01-01T00:00:00Z"),
        ("idempotency_key", "k"),
        ("validate_only", True),
        ("queue", "Q"),
        ("priority", 10),
        ("ttl", "0s"),
    ]
    for name, value in bad:
        refused(f"request.{name}", request={**idle, name: value})
    refused("request.job_type", request={})
    refused("request.payload.steps", request={"job_type": "demo.sleep", "payload": {"steps": 0}})


@scenario()
def an_update_names_its_bad_fields(scene: Scene) -> None:
    made = _create(scene)
    own = {"schedule_id": scene.tag}
    scene.invalid("update_mask", "UpdateSchedule", schedule={**own, "paused": True})
    for path in ("colour", "paused,colour"):
        scene.invalid("update_mask", "UpdateSchedule", schedule=own, update_mask=path)
    bad: list[tuple[str, Json, str]] = [
        ("schedule.cron", {"cron": "x"}, "cron"),
        ("schedule.time_zone", {"time_zone": "Mars/Olympus"}, "timeZone"),
        ("schedule.request.queue", {"request": {"job_type": "a", "queue": "Q"}}, "request"),
    ]
    for field, change, mask in bad:
        scene.invalid(field, "UpdateSchedule", schedule={**own, **change}, update_mask=mask)
    assert _get(scene, scene.tag) == made
