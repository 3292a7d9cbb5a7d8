"""ScheduleService: this release knows no schedules."""

from __future__ import annotations

from generated.jobsvc.v1 import schedule_service_pb2_grpc
from jobsvc.rpc.interceptors import absent
from jobsvc.rpc.paging import Pages
from jobsvc.services.assembly import Services


class ScheduleService(schedule_service_pb2_grpc.ScheduleServiceServicer):
    CreateSchedule = GetSchedule = ListSchedules = absent
    UpdateSchedule = DeleteSchedule = TriggerSchedule = absent

    def __init__(self, services: Services, pages: Pages) -> None:
        self._services = services
        self._pages = pages
