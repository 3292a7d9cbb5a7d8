"""AdminService: this release offers none of it yet."""

from __future__ import annotations

from generated.jobsvc.v1 import admin_service_pb2_grpc
from jobsvc.rpc.interceptors import absent
from jobsvc.rpc.paging import Pages
from jobsvc.services.assembly import Services


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    ListQueues = PauseQueue = ResumeQueue = UpdateQueue = absent
    ListWorkers = absent
    CancelJobs = RetryJobs = DeleteJobs = absent
    ListFailureGroups = absent

    def __init__(self, services: Services, pages: Pages) -> None:
        self._services = services
        self._pages = pages
