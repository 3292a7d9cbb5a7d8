"""AdminService's messages to the model and back."""

from __future__ import annotations

from collections.abc import Sequence

from generated.jobsvc.v1 import admin_service_pb2 as pb
from jobsvc.core.model import FailureGroup
from jobsvc.rpc.convert.values import timestamp
from jobsvc.services.bulk import Extent
from jobsvc.services.lists import place

BULK_COUNT = 10_000


def extent(request: pb.CancelJobsRequest | pb.RetryJobsRequest | pb.DeleteJobsRequest) -> Extent:
    return Extent(request.max_count or BULK_COUNT, request.dry_run)


def failure_groups_page(
    groups: Sequence[FailureGroup], after: str, size: int
) -> tuple[pb.ListFailureGroupsResponse, str]:
    """Those behind the key `after`, and the key of the last if there are more."""
    if after:
        count, job_type, error_type = after.split(" ", 2)
        behind = -int(count), job_type, error_type
        groups = [group for group in groups if place(group) > behind]
    page = pb.ListFailureGroupsResponse(failure_groups=map(_failure_group, groups[:size]))
    if len(groups) <= size:
        return page, ""
    last = groups[size - 1]
    return page, f"{last.job_count} {last.job_type} {last.error_type}"


def _failure_group(group: FailureGroup) -> pb.FailureGroup:
    return pb.FailureGroup(
        job_type=group.job_type,
        error_type=group.error_type,
        job_count=group.job_count,
        first_time=timestamp(group.first_time),
        last_time=timestamp(group.last_time),
        sample_job_ids=group.sample_job_ids,
    )
