"""ScheduleService's messages to the model and back. Requests must have passed
jobsvc.rpc.validate."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from generated.jobsvc.v1 import job_service_pb2
from generated.jobsvc.v1 import schedule_service_pb2 as pb
from jobsvc.core.model import MissedTicks, Overlap, Schedule
from jobsvc.rpc.convert.values import timestamp

UTC = "UTC"
MISSED_TICKS = {pb.MissedTicks.Value(f"MISSED_TICKS_{each}"): each for each in MissedTicks}
OVERLAPS = {pb.Overlap.Value(f"OVERLAP_{each}"): each for each in Overlap}


def new_schedule(message: pb.Schedule) -> Schedule:
    return Schedule(
        schedule_id=message.schedule_id,
        cron=message.cron,
        time_zone=message.time_zone or UTC,
        request=message.request.SerializeToString(deterministic=True),
        paused=message.paused,
        missed_ticks=MISSED_TICKS.get(message.missed_ticks, MissedTicks.SKIP),
        overlap=OVERLAPS.get(message.overlap, Overlap.ALLOW),
    )


def schedule_changes(request: pb.UpdateScheduleRequest) -> dict[str, Any]:
    """The fields of a Schedule that the mask names, with their new values."""
    new = new_schedule(request.schedule)
    return {name: getattr(new, name) for name in request.update_mask.paths}


def schedule(schedule: Schedule) -> pb.Schedule:
    """Without a request where what is stored is none."""
    message = pb.Schedule(
        schedule_id=schedule.schedule_id,
        cron=schedule.cron,
        time_zone=schedule.time_zone,
        paused=schedule.paused,
        missed_ticks=pb.MissedTicks.Value(f"MISSED_TICKS_{schedule.missed_ticks}"),
        overlap=pb.Overlap.Value(f"OVERLAP_{schedule.overlap}"),
        next_time=timestamp(schedule.next_time),
        last_time=timestamp(schedule.last_time),
        last_job_id=schedule.last_job_id or "",
        etag=schedule.etag,
    )
    if (request := stored_request(schedule)) is not None:
        message.request.CopyFrom(request)
    return message


def stored_request(schedule: Schedule) -> job_service_pb2.SubmitJobRequest | None:
    """None for bytes that are none."""
    try:
        return job_service_pb2.SubmitJobRequest.FromString(schedule.request)
    except DecodeError:
        return None
