"""The rules of requests about queues, and why a job waits."""

from __future__ import annotations

from generated.jobsvc.v1 import admin_service_pb2 as pb
from generated.jobsvc.v1 import job_service_pb2
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields
from jobsvc.rpc.validate.fields import Violations

CHANGEABLE = frozenset({"max_running", "rate_limit"})
_PERIOD_MAX = 315_576_000_000 * fields.SECOND  # what a Duration can hold


def explain_job(request: job_service_pb2.ExplainJobRequest) -> Violations:
    return fields.job_id(request.job_id)


def queue(request: pb.PauseQueueRequest | pb.ResumeQueueRequest) -> Violations:
    return fields.queue(request.queue, "queue")


def update_queue(request: pb.UpdateQueueRequest) -> Violations:
    """What the mask does not name is not looked at."""
    found = fields.queue(request.queue, "queue")
    found += fields.mask(request.update_mask, "update_mask", CHANGEABLE)
    if "max_running" in request.update_mask.paths:
        found += fields.not_negative("max_running", request.max_running)
    if "rate_limit" in request.update_mask.paths and request.HasField("rate_limit"):
        found += _rate_limit(request.rate_limit)
    return found


def _rate_limit(rate: pb.RateLimit) -> Violations:
    found: Violations = []
    if rate.max_starts < 1:
        found.append(Violation("rate_limit.max_starts", "must be 1 or more"))
    if not rate.HasField("period"):
        found.append(Violation("rate_limit.period", "is required"))
    return found + fields.span(rate, "period", "rate_limit.", 1, _PERIOD_MAX, "above 0")
