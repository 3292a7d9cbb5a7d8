"""The rules of ScheduleService's requests."""

from __future__ import annotations

from generated.jobsvc.v1 import job_service_pb2, schedule_service_pb2
from jobsvc import cron
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields
from jobsvc.rpc.validate.fields import Violations
from jobsvc.rpc.validate.jobs import Types, submit_job

CRON_CHARACTERS_MAX = 255
REQUEST = "schedule.request."
# What a mask may name.
CHANGEABLE = ("cron", "time_zone", "request", "paused", "missed_ticks", "overlap")
# What would be the same for each job of a schedule, and is of use to none.
_NOT_OF_EACH = {
    "schedule_time": "each job of a schedule is due at its tick",
    "delay": "each job of a schedule is due at its tick",
    "expire_time": "set `ttl`, which counts from the tick",
    "idempotency_key": "each tick submits a job of its own",
    "validate_only": "a schedule is there to submit",
}


def create_schedule(
    request: schedule_service_pb2.CreateScheduleRequest, types: Types, now: int
) -> Violations:
    """`now`: nanoseconds since 1970."""
    found = fields.schedule_id(request.schedule.schedule_id, "schedule.schedule_id")
    for name in CHANGEABLE:
        found += _field(name, request.schedule, types, now)
    return found


def update_schedule(
    request: schedule_service_pb2.UpdateScheduleRequest, types: Types, now: int
) -> Violations:
    """Of the schedule, what the mask does not name is not looked at."""
    found = fields.schedule_id(request.schedule.schedule_id, "schedule.schedule_id")
    found += fields.mask(request.update_mask, "update_mask", frozenset(CHANGEABLE))
    for name in CHANGEABLE:
        if name in request.update_mask.paths:
            found += _field(name, request.schedule, types, now)
    return found


def scheduled_request(
    request: job_service_pb2.SubmitJobRequest, types: Types, now: int
) -> Violations:
    """Of a schedule, by paths such as `schedule.request.queue`."""
    refused = {
        f"{REQUEST}{name}": f"must not be set: {why}"
        for name, why in _NOT_OF_EACH.items()
        if name in {field.name for field, _ in request.ListFields()}
    }
    found = [Violation(path, what) for path, what in refused.items()]
    others = submit_job(request, types, now, REQUEST)
    return found + [violation for violation in others if violation.field not in refused]


def _field(
    name: str, schedule: schedule_service_pb2.Schedule, types: Types, now: int
) -> Violations:
    path = f"schedule.{name}"
    match name:
        case "cron":
            return _cron(schedule.cron, path)
        case "time_zone" if schedule.time_zone and schedule.time_zone not in cron.zones():
            what = "must be the name of an IANA time zone, such as Europe/Berlin"
            return [Violation(path, what)]
        case "request":
            return scheduled_request(schedule.request, types, now)
        case "missed_ticks":
            known = schedule_service_pb2.MissedTicks.values()
            return fields.known(schedule.missed_ticks, path, known)
        case "overlap":
            return fields.known(schedule.overlap, path, schedule_service_pb2.Overlap.values())
    return []


def _cron(expression: str, path: str) -> Violations:
    if found := fields.text(expression, path, CRON_CHARACTERS_MAX):
        return found
    flaw = cron.flaw(expression)
    return [Violation(path, flaw)] if flaw else []
