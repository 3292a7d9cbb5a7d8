"""Queues, workers, failures and changes of many jobs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TypedDict, Unpack

from generated.jobsvc.v1 import admin_service_pb2_grpc
from generated.jobsvc.v1.admin_service_pb2 import (
    CancelJobsRequest,
    CancelJobsResponse,
    DeleteJobsRequest,
    DeleteJobsResponse,
    FailureGroup,
    ListFailureGroupsRequest,
    ListQueuesRequest,
    ListWorkersRequest,
    PauseQueueRequest,
    Queue,
    RateLimit,
    ResumeQueueRequest,
    RetryJobsRequest,
    RetryJobsResponse,
    UpdateQueueRequest,
    Worker,
)
from jobsvc.client.calls import Calls
from jobsvc.client.convert import FilterOptions, Span, new_filter, to_duration
from jobsvc.client.keywords import known_keywords

# A change of many jobs goes through up to 100,000 of them.
BULK_SECONDS = 600.0


BulkResponse = CancelJobsResponse | RetryJobsResponse | DeleteJobsResponse


class QueueChanges(TypedDict, total=False):
    """`max_running` 0 and `rate_limit` None take a limit away; a rate is (starts, span)."""

    max_running: int
    rate_limit: tuple[int, Span] | None


class Admin:
    """The AdminService. Every method raises CallFailed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stub = admin_service_pb2_grpc.AdminServiceStub(calls.channel)

    def queues(self) -> Iterator[Queue]:
        call = partial(self._calls.call, self._stub.ListQueues)
        for page in self._calls.pages(call, ListQueuesRequest()):
            yield from page.queues

    def pause_queue(self, queue: str) -> Queue:
        return self._calls.call(self._stub.PauseQueue, PauseQueueRequest(queue=queue)).queue

    def resume_queue(self, queue: str) -> Queue:
        return self._calls.call(self._stub.ResumeQueue, ResumeQueueRequest(queue=queue)).queue

    @known_keywords
    def update_queue(self, queue: str, **changes: Unpack[QueueChanges]) -> Queue:
        """Changes the limits that are given."""
        request = UpdateQueueRequest(queue=queue, max_running=changes.get("max_running", 0))
        if rate := changes.get("rate_limit"):
            starts, period = rate
            request.rate_limit.CopyFrom(RateLimit(max_starts=starts, period=to_duration(period)))
        request.update_mask.paths.extend(sorted(changes))
        return self._calls.call(self._stub.UpdateQueue, request).queue

    def workers(self) -> Iterator[Worker]:
        call = partial(self._calls.call, self._stub.ListWorkers)
        for page in self._calls.pages(call, ListWorkersRequest()):
            yield from page.workers

    @known_keywords
    def failures(self, **wanted: Unpack[FilterOptions]) -> Iterator[FailureGroup]:
        """Failures by job type and error type, most jobs first."""
        call = partial(self._calls.call, self._stub.ListFailureGroups)
        request = ListFailureGroupsRequest(filter=new_filter(**wanted))
        for page in self._calls.pages(call, request):
            yield from page.failure_groups

    @known_keywords
    def cancel_jobs(
        self,
        *,
        dry_run: bool = False,
        max_count: int = 0,
        reason: str = "",
        **wanted: Unpack[FilterOptions],
    ) -> CancelJobsResponse:
        """Cancels all that match and can be cancelled; `max_count` 0 is the service's default."""
        request = CancelJobsRequest(
            filter=new_filter(**wanted), dry_run=dry_run, max_count=max_count, reason=reason
        )
        return self._calls.call(self._stub.CancelJobs, request, BULK_SECONDS)

    @known_keywords
    def retry_jobs(
        self, *, dry_run: bool = False, max_count: int = 0, **wanted: Unpack[FilterOptions]
    ) -> RetryJobsResponse:
        """Retries all that match and can be retried."""
        request = RetryJobsRequest(
            filter=new_filter(**wanted), dry_run=dry_run, max_count=max_count
        )
        # A second try would retry again what has failed anew since the first.
        return self._calls.call(self._stub.RetryJobs, request, BULK_SECONDS, repeat=False)

    @known_keywords
    def delete_jobs(
        self, *, dry_run: bool = False, max_count: int = 0, **wanted: Unpack[FilterOptions]
    ) -> DeleteJobsResponse:
        """Deletes all that match and have ended."""
        request = DeleteJobsRequest(
            filter=new_filter(**wanted), dry_run=dry_run, max_count=max_count
        )
        return self._calls.call(self._stub.DeleteJobs, request, BULK_SECONDS)
