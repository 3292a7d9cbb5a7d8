"""The rules of AdminService's requests."""

from __future__ import annotations

from generated.jobsvc.v1 import admin_service_pb2 as pb
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields
from jobsvc.rpc.validate.fields import Violations
from jobsvc.rpc.validate.jobs import REASON_CHARACTERS_MAX

BULK_COUNT_MAX = 100_000


def cancel_jobs(request: pb.CancelJobsRequest) -> Violations:
    return _bulk(request) + fields.text(request.reason, "reason", REASON_CHARACTERS_MAX)


def retry_jobs(request: pb.RetryJobsRequest) -> Violations:
    return _bulk(request)


def delete_jobs(request: pb.DeleteJobsRequest) -> Violations:
    return _bulk(request)


def list_failure_groups(request: pb.ListFailureGroupsRequest) -> Violations:
    return fields.job_filter(request.filter) + fields.page(request)


def _bulk(request: pb.CancelJobsRequest | pb.RetryJobsRequest | pb.DeleteJobsRequest) -> Violations:
    # Not by its size: fields that only a newer service knows say nothing to this one.
    if request.filter.ListFields():
        found = fields.job_filter(request.filter)
    else:
        found = [Violation("filter", "must not be empty; to mean every job, name every state")]
    if not 0 <= request.max_count <= BULK_COUNT_MAX:
        found.append(Violation("max_count", f"must be 0 to {BULK_COUNT_MAX:,}; 0 means 10,000"))
    return found
