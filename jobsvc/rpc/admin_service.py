"""AdminService: validate, convert, call, convert. Errors go up to the CallBoundary."""

# ruff: noqa: N802 - the proto names the methods

from __future__ import annotations

from generated.jobsvc.v1 import admin_service_pb2 as pb
from generated.jobsvc.v1 import admin_service_pb2_grpc
from jobsvc.rpc import convert, validate
from jobsvc.rpc.interceptors import Context, caller
from jobsvc.rpc.paging import Pages, beside, fill, page_size
from jobsvc.services.assembly import Services


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    def __init__(self, services: Services, pages: Pages) -> None:
        self._lists = services.lists
        self._bulk = services.bulk
        self._operations = services.operations
        self._pages = pages

    async def ListQueues(
        self, request: pb.ListQueuesRequest, context: Context
    ) -> pb.ListQueuesResponse:
        validate.check(validate.page(request))
        size = page_size(request.page_size)
        # One more than the page holds tells whether there are more.
        found = await self._operations.list_queues(self._pages.after(request), size + 1)
        page = pb.ListQueuesResponse()
        if await beside(len(found), fill, page.queues, map(convert.queue, found), size):
            page.next_page_token = self._pages.token(request, page.queues[-1].name)
        return page

    async def PauseQueue(
        self, request: pb.PauseQueueRequest, context: Context
    ) -> pb.PauseQueueResponse:
        validate.check(validate.queue(request))
        queue = await self._operations.set_paused(request.queue, True, caller().actor)
        return pb.PauseQueueResponse(queue=convert.queue(queue))

    async def ResumeQueue(
        self, request: pb.ResumeQueueRequest, context: Context
    ) -> pb.ResumeQueueResponse:
        validate.check(validate.queue(request))
        queue = await self._operations.set_paused(request.queue, False, caller().actor)
        return pb.ResumeQueueResponse(queue=convert.queue(queue))

    async def UpdateQueue(
        self, request: pb.UpdateQueueRequest, context: Context
    ) -> pb.UpdateQueueResponse:
        validate.check(validate.update_queue(request))
        queue = await self._operations.set_limits(
            request.queue, *convert.limits(request), caller().actor
        )
        return pb.UpdateQueueResponse(queue=convert.queue(queue))

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: Context
    ) -> pb.ListWorkersResponse:
        validate.check(validate.page(request))
        size = page_size(request.page_size)
        found = await self._operations.list_workers(self._pages.after(request), size + 1)
        page = pb.ListWorkersResponse()
        if await beside(len(found), fill, page.workers, convert.workers(found), size):
            page.next_page_token = self._pages.token(request, page.workers[-1].worker_id)
        return page

    async def CancelJobs(
        self, request: pb.CancelJobsRequest, context: Context
    ) -> pb.CancelJobsResponse:
        validate.check(validate.cancel_jobs(request))
        counts = await self._bulk.cancel(
            convert.job_filter(request.filter),
            convert.extent(request),
            request.reason,
            caller().actor,
        )
        return pb.CancelJobsResponse(
            matched_count=counts.matched, changed_count=counts.changed, more=counts.more
        )

    async def RetryJobs(
        self, request: pb.RetryJobsRequest, context: Context
    ) -> pb.RetryJobsResponse:
        validate.check(validate.retry_jobs(request))
        counts = await self._bulk.retry(
            convert.job_filter(request.filter), convert.extent(request), caller().actor
        )
        return pb.RetryJobsResponse(
            matched_count=counts.matched, changed_count=counts.changed, more=counts.more
        )

    async def DeleteJobs(
        self, request: pb.DeleteJobsRequest, context: Context
    ) -> pb.DeleteJobsResponse:
        validate.check(validate.delete_jobs(request))
        counts = await self._bulk.delete(
            convert.job_filter(request.filter), convert.extent(request), caller().actor
        )
        return pb.DeleteJobsResponse(
            matched_count=counts.matched, changed_count=counts.changed, more=counts.more
        )

    async def ListFailureGroups(
        self, request: pb.ListFailureGroupsRequest, context: Context
    ) -> pb.ListFailureGroupsResponse:
        validate.check(validate.list_failure_groups(request))
        after, size = self._pages.after(request), page_size(request.page_size)
        groups = await self._lists.failure_groups(convert.job_filter(request.filter))
        page, last = await beside(len(groups), convert.failure_groups_page, groups, after, size)
        if last:
            page.next_page_token = self._pages.token(request, last)
        return page
