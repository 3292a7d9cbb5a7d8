"""The rules of JobService's requests."""

from __future__ import annotations

from collections.abc import Mapping

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import RetryPolicy
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields, payload
from jobsvc.rpc.validate.fields import DAY, HOUR, SECOND, SPAN_MAX, Violations

Types = Mapping[str, JobTypeInfo]

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
REQUESTS_MAX = 1_000
REASON_CHARACTERS_MAX = 1_000
CONCURRENCY_MAX = 10_000
DEFAULT_POLICY = RetryPolicy()
UPDATABLE = frozenset({"priority", "schedule_time", "labels"})


def submit_job(
    request: job_service_pb2.SubmitJobRequest, types: Types, now: int, prefix: str = ""
) -> Violations:
    """`now`: nanoseconds since 1970. `prefix`: goes before every path, such as
    `requests[3].`."""
    found = fields.job_type(request.job_type, "job_type")
    if request.queue:
        found += fields.queue(request.queue, "queue")
    found += _priority(request.priority, "priority")
    if not 0 <= request.max_attempts <= 100:
        found.append(Violation("max_attempts", "must be 1 to 100, or 0 for the default"))
    if request.idempotency_key:
        key = request.idempotency_key
        found += fields.text(key, "idempotency_key", fields.KEY_CHARACTERS_MAX)
    if request.HasField("unique"):
        found += _unique(request.unique, "unique.")
    if request.HasField("concurrency"):
        found += _concurrency(request.concurrency, "concurrency.")
    if request.labels:
        found += fields.labels(request.labels, "labels")
    found += _times(request, now)
    found += _spans(request)
    found += payload.job_input(request, types.get(request.job_type))
    return [Violation(f"{prefix}{each.field}", each.description) for each in found]


def submit_jobs(request: job_service_pb2.SubmitJobsRequest, types: Types, now: int) -> Violations:
    if not 1 <= len(request.requests) <= REQUESTS_MAX:
        return [Violation("requests", "must hold 1 to 1,000 requests")]
    if request.ByteSize() > MESSAGE_BYTES_MAX:
        return [Violation("requests", "must be at most 4 MiB in one message")]
    found: Violations = []
    for index, each in enumerate(request.requests):
        found += submit_job(each, types, now, f"requests[{index}].")
        if len(found) >= fields.VIOLATIONS_MAX:
            break
    return found


def run_job(request: job_service_pb2.RunJobRequest, types: Types, now: int) -> Violations:
    found = submit_job(request.request, types, now, "request.")
    if request.request.validate_only:
        found.append(Violation("request.validate_only", "is not allowed in RunJob"))
    return found + _heartbeat_interval(request)


def get_job(request: job_service_pb2.GetJobRequest) -> Violations:
    return fields.job_id(request.job_id)


def get_result(request: job_service_pb2.GetResultRequest) -> Violations:
    return fields.job_id(request.job_id) + fields.span(
        request, "wait", "", 0, 50 * SECOND, "0 to 50 s"
    )


def watch_job(request: job_service_pb2.WatchJobRequest) -> Violations:
    return (
        fields.job_id(request.job_id)
        + fields.not_negative("after_sequence", request.after_sequence)
        + _heartbeat_interval(request)
    )


def watch_jobs(request: job_service_pb2.WatchJobsRequest) -> Violations:
    return fields.job_filter(request.filter) + _heartbeat_interval(request)


def list_job_events(request: job_service_pb2.ListJobEventsRequest) -> Violations:
    return (
        fields.job_id(request.job_id)
        + fields.not_negative("after_sequence", request.after_sequence)
        + fields.not_negative("page_size", request.page_size)
    )


def list_jobs(request: job_service_pb2.ListJobsRequest) -> Violations:
    return (
        fields.job_filter(request.filter)
        + fields.known(request.view, "view", job_pb2.JobView.values())
        + fields.page(request)
    )


def cancel_job(request: job_service_pb2.CancelJobRequest) -> Violations:
    return fields.job_id(request.job_id) + fields.text(
        request.reason, "reason", REASON_CHARACTERS_MAX
    )


def retry_job(request: job_service_pb2.RetryJobRequest) -> Violations:
    return fields.job_id(request.job_id)


def update_job(request: job_service_pb2.UpdateJobRequest, now: int) -> Violations:
    """What the mask does not name is not looked at."""
    named = request.update_mask.paths
    found = fields.job_id(request.job_id)
    found += fields.mask(request.update_mask, "update_mask", UPDATABLE)
    if "priority" in named:
        found += _priority(request.priority, "priority")
    if "schedule_time" in named and not request.HasField("schedule_time"):
        what = "must be set where update_mask names it; a moment in the past means now"
        found.append(Violation("schedule_time", what))
    elif "schedule_time" in named:
        found += fields.moment(request.schedule_time, "schedule_time", now)
    if "labels" in named:
        found += fields.labels(request.labels, "labels")
    return found


def delete_job(request: job_service_pb2.DeleteJobRequest) -> Violations:
    return fields.job_id(request.job_id)


def _priority(priority: int, path: str) -> Violations:
    return [] if 0 <= priority <= 9 else [Violation(path, "must be 0 to 9")]


def _unique(unique: job_pb2.Unique, prefix: str) -> Violations:
    return (
        fields.key(unique.key, f"{prefix}key")
        + fields.known(unique.scope, f"{prefix}scope", job_pb2.UniqueScope.values())
        + fields.known(unique.on_conflict, f"{prefix}on_conflict", job_pb2.UniqueConflict.values())
    )


def _concurrency(concurrency: job_pb2.Concurrency, prefix: str) -> Violations:
    found = fields.key(concurrency.key, f"{prefix}key")
    if not 1 <= concurrency.max_running <= CONCURRENCY_MAX:
        found.append(Violation(f"{prefix}max_running", f"must be 1 to {CONCURRENCY_MAX:,}"))
    return found


def _times(request: job_service_pb2.SubmitJobRequest, now: int) -> Violations:
    found: Violations = []
    match request.WhichOneof("when"):
        case "schedule_time":
            found += fields.moment(request.schedule_time, "schedule_time", now)
        case "delay":
            found += fields.span(request, "delay", "", 0, SPAN_MAX, "0 to 366 days")
    match request.WhichOneof("expiration"):
        case "expire_time":
            found += fields.moment(request.expire_time, "expire_time", now)
        case "ttl":
            found += fields.span(request, "ttl", "", 1, SPAN_MAX, "above 0, at most 366 days")
    return found


def _spans(request: job_service_pb2.SubmitJobRequest) -> Violations:
    found = fields.span(request, "timeout", "", SECOND, DAY, "1 s to 24 h")
    found += fields.span(request, "retention", "", HOUR, SPAN_MAX, "1 h to 366 days")
    if request.HasField("retry_policy"):
        found += _retry_policy(request.retry_policy, "retry_policy.")
    return found


def _retry_policy(policy: job_pb2.RetryPolicy, prefix: str) -> Violations:
    found = fields.span(policy, "initial_backoff", prefix, 0, DAY, "0 to 24 h")
    # A bad initial_backoff is told of by itself and bounds nothing.
    shortest = 0
    if not found:
        sent = policy.HasField("initial_backoff")
        shortest = (
            fields.nanoseconds_of(policy.initial_backoff) or 0
            if sent
            else round(DEFAULT_POLICY.initial_backoff * SECOND)
        )
    what = "initial_backoff (10 s by default) to 24 h"
    found += fields.span(policy, "max_backoff", prefix, shortest, DAY, what)
    # Written so that a NaN is refused.
    if policy.HasField("backoff_multiplier") and not 1 <= policy.backoff_multiplier <= 10:
        found.append(Violation(f"{prefix}backoff_multiplier", "must be 1 to 10"))
    if policy.HasField("jitter") and not 0 <= policy.jitter <= 1:
        found.append(Violation(f"{prefix}jitter", "must be 0 to 1"))
    return found


def _heartbeat_interval(
    request: job_service_pb2.WatchJobRequest
    | job_service_pb2.WatchJobsRequest
    | job_service_pb2.RunJobRequest,
) -> Violations:
    return fields.span(request, "heartbeat_interval", "", SECOND, 50 * SECOND, "1 to 50 s")
