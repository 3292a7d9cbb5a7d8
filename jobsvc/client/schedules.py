"""Recurring jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from google.protobuf.field_mask_pb2 import FieldMask

from generated.jobsvc.v1 import schedule_service_pb2_grpc
from generated.jobsvc.v1.job_pb2 import Job
from generated.jobsvc.v1.schedule_service_pb2 import (
    CreateScheduleRequest,
    DeleteScheduleRequest,
    GetScheduleRequest,
    ListSchedulesRequest,
    Schedule,
    TriggerScheduleRequest,
    UpdateScheduleRequest,
)
from jobsvc.client.calls import Calls


class Schedules:
    """The ScheduleService. Every method raises CallFailed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stub = schedule_service_pb2_grpc.ScheduleServiceStub(calls.channel)

    def create(self, schedule: Schedule) -> Schedule:
        request = CreateScheduleRequest(schedule=schedule)
        return self._calls.call(self._stub.CreateSchedule, request).schedule

    def get(self, schedule_id: str) -> Schedule:
        request = GetScheduleRequest(schedule_id=schedule_id)
        return self._calls.call(self._stub.GetSchedule, request).schedule

    def list(self) -> Iterator[Schedule]:
        """By their ids, read page by page."""
        call = partial(self._calls.call, self._stub.ListSchedules)
        for page in self._calls.pages(call, ListSchedulesRequest()):
            yield from page.schedules

    def update(self, schedule: Schedule, paths: Sequence[str]) -> Schedule:
        """Changes what `paths` names to what `schedule` has; an `etag` in it must match."""
        request = UpdateScheduleRequest(schedule=schedule, update_mask=FieldMask(paths=paths))
        return self._calls.call(self._stub.UpdateSchedule, request).schedule

    def delete(self, schedule_id: str) -> None:
        """Its jobs stay."""
        request = DeleteScheduleRequest(schedule_id=schedule_id)
        self._calls.call(self._stub.DeleteSchedule, request)

    def trigger(self, schedule_id: str) -> Job:
        """Submits one job now. Not made again when it fails: it may have been submitted."""
        request = TriggerScheduleRequest(schedule_id=schedule_id)
        return self._calls.call(self._stub.TriggerSchedule, request, repeat=False).job
