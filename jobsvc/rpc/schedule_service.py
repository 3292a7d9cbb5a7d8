"""ScheduleService: validate, convert, call, convert. Errors go up to the CallBoundary."""

# ruff: noqa: N802 - the proto names the methods

from __future__ import annotations

import time
import uuid
from typing import Any

from generated.jobsvc.v1 import job_pb2, schedule_service_pb2_grpc
from generated.jobsvc.v1 import schedule_service_pb2 as pb
from jobsvc.core.model import NewJob, Schedule
from jobsvc.errors import InvalidRequest, Violation
from jobsvc.rpc import convert, validate
from jobsvc.rpc.interceptors import Context, caller
from jobsvc.rpc.paging import PAGE_BYTES_MAX, Pages, beside, page_size
from jobsvc.services.assembly import Services
from jobsvc.services.schedules import Types


class ScheduleService(schedule_service_pb2_grpc.ScheduleServiceServicer):
    def __init__(self, services: Services, pages: Pages) -> None:
        self._schedules = services.schedules
        self._pages = pages

    async def CreateSchedule(
        self, request: pb.CreateScheduleRequest, context: Context
    ) -> pb.CreateScheduleResponse:
        def prepare(types: Types) -> Schedule:
            validate.check(validate.create_schedule(request, types, time.time_ns()))
            return convert.new_schedule(request.schedule)

        schedule = await self._schedules.create(prepare, caller().actor)
        return pb.CreateScheduleResponse(schedule=convert.schedule(schedule))

    async def GetSchedule(
        self, request: pb.GetScheduleRequest, context: Context
    ) -> pb.GetScheduleResponse:
        validate.check(validate.schedule_id(request.schedule_id))
        schedule = await self._schedules.get(request.schedule_id)
        return pb.GetScheduleResponse(schedule=convert.schedule(schedule))

    async def ListSchedules(
        self, request: pb.ListSchedulesRequest, context: Context
    ) -> pb.ListSchedulesResponse:
        validate.check(validate.page(request))
        found, last = await self._schedules.list_page(
            self._pages.after(request), page_size(request.page_size), PAGE_BYTES_MAX
        )
        return pb.ListSchedulesResponse(
            schedules=await beside(len(found), lambda: [convert.schedule(each) for each in found]),
            next_page_token=self._pages.token(request, last) if last else "",
        )

    async def UpdateSchedule(
        self, request: pb.UpdateScheduleRequest, context: Context
    ) -> pb.UpdateScheduleResponse:
        def prepare(types: Types) -> dict[str, Any]:
            validate.check(validate.update_schedule(request, types, time.time_ns()))
            return convert.schedule_changes(request)

        asked = request.schedule
        schedule = await self._schedules.update(
            asked.schedule_id, asked.etag, prepare, caller().actor
        )
        return pb.UpdateScheduleResponse(schedule=convert.schedule(schedule))

    async def DeleteSchedule(
        self, request: pb.DeleteScheduleRequest, context: Context
    ) -> pb.DeleteScheduleResponse:
        validate.check(validate.schedule_id(request.schedule_id))
        await self._schedules.delete(request.schedule_id, caller().actor)
        return pb.DeleteScheduleResponse()

    async def TriggerSchedule(
        self, request: pb.TriggerScheduleRequest, context: Context
    ) -> pb.TriggerScheduleResponse:
        validate.check(validate.schedule_id(request.schedule_id))
        by = caller()
        submitted = await self._schedules.trigger(
            request.schedule_id,
            lambda schedule: scheduled_job(schedule, by.actor, by.trace_id, by.span_id),
            by.actor,
        )
        job = submitted.job
        return pb.TriggerScheduleResponse(
            job=convert.job(job) if job else job_pb2.Job(job_id=submitted.job_id)
        )


def ticked_job(schedule: Schedule) -> NewJob:
    """What a tick submits, in a trace of its own. Raises InvalidRequest, as `scheduled_job`."""
    return scheduled_job(schedule, f"schedule:{schedule.schedule_id}", uuid.uuid4().hex)


def scheduled_job(schedule: Schedule, actor: str, trace_id: str, span_id: str = "") -> NewJob:
    """A job of the schedule. Raises InvalidRequest where what is stored breaks a rule; what workers
    say of the payload is theirs to check, as it may have changed since."""
    request = convert.stored_request(schedule)
    if request is None:
        what = "cannot be read as it is stored; set it anew by UpdateSchedule"
        raise InvalidRequest([Violation("schedule.request", what)])
    validate.check(validate.scheduled_request(request, {}, time.time_ns()))
    return convert.new_job(request, actor, trace_id, span_id)
