"""JobService's messages to the model and back.

Requests must have passed jobsvc.rpc.validate. A Job in an answer carries its payload only in
`get_response`, and in a full `jobs_page`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import uuid_utils
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.attempts import Input, JobError, Log, Output, Progress, Report
from jobsvc.core.model import (
    Concurrency,
    Job,
    JobEvent,
    JobFilter,
    JobOutcome,
    JobUpdate,
    NewJob,
    OnConflict,
    RetryPolicy,
    Unique,
    UniqueScope,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.rpc.convert.values import duration, put_timestamp, seconds, timestamp, to_datetime
from jobsvc.rpc.paging import PAGE_BYTES_MAX
from jobsvc.services.jobs import Submitted
from jobsvc.services.watch import Heartbeat

HEARTBEAT_SECONDS = 15.0
DEFAULT_POLICY = RetryPolicy()
LAST_MOMENT = datetime.max.replace(tzinfo=UTC)

STATES = {state: job_pb2.JobState.Value(f"JOB_STATE_{state}") for state in JobState}
EVENT_TYPES = {kind: job_pb2.JobEventType.Value(f"JOB_EVENT_TYPE_{kind}") for kind in EventType}
STATE_NAMES = {number: state for state, number in STATES.items()}
UNIQUE_SCOPES = {job_pb2.UniqueScope.Value(f"UNIQUE_SCOPE_{scope}"): scope for scope in UniqueScope}
ON_CONFLICT = {job_pb2.UniqueConflict.Value(f"UNIQUE_CONFLICT_{way}"): way for way in OnConflict}
LOG_LEVELS = {
    level: job_pb2.LogLevel.Value(f"LOG_LEVEL_{level}")
    for level in ("DEBUG", "INFO", "WARNING", "ERROR")
}


_MOMENTS = (
    "create_time",
    "schedule_time",
    "start_time",
    "finish_time",
    "next_attempt_time",
    "expire_time",
    "purge_time",
)

# Requests.


def new_job(
    request: job_service_pb2.SubmitJobRequest, actor: str, trace_id: str, span_id: str = ""
) -> NewJob:
    when, expiration = request.WhichOneof("when"), request.WhichOneof("expiration")
    return NewJob(
        job_id=str(uuid_utils.uuid7()),
        job_type=request.job_type,
        input=_input(request),
        queue=request.queue or None,
        priority=request.priority,
        schedule_time=to_datetime(request.schedule_time) if when == "schedule_time" else None,
        delay=seconds(request.delay) if when == "delay" else None,
        expire_time=to_datetime(request.expire_time) if expiration == "expire_time" else None,
        ttl=seconds(request.ttl) if expiration == "ttl" else None,
        max_attempts=request.max_attempts or None,
        retry_policy=(
            _policy(request.retry_policy) if request.HasField("retry_policy") else DEFAULT_POLICY
        ),
        timeout=seconds(request.timeout) if request.HasField("timeout") else None,
        idempotency_key=request.idempotency_key or None,
        request_hash=_request_hash(request) if request.idempotency_key else b"",
        unique=_unique(request.unique) if request.HasField("unique") else None,
        concurrency=(
            Concurrency(request.concurrency.key, request.concurrency.max_running)
            if request.HasField("concurrency")
            else None
        ),
        retention=seconds(request.retention) if request.HasField("retention") else None,
        labels=dict(request.labels),
        actor=actor,
        trace_id=trace_id,
        span_id=span_id,
    )


def job_update(request: job_service_pb2.UpdateJobRequest) -> JobUpdate:
    named = request.update_mask.paths
    return JobUpdate(
        priority=request.priority if "priority" in named else None,
        schedule_time=to_datetime(request.schedule_time) if "schedule_time" in named else None,
        labels=dict(request.labels) if "labels" in named else None,
    )


def wait_seconds(request: job_service_pb2.GetResultRequest) -> float:
    return seconds(request.wait)


def heartbeat_seconds(
    request: job_service_pb2.WatchJobRequest
    | job_service_pb2.WatchJobsRequest
    | job_service_pb2.RunJobRequest,
) -> float:
    if request.HasField("heartbeat_interval"):
        return seconds(request.heartbeat_interval)
    return HEARTBEAT_SECONDS


def _input(request: job_service_pb2.SubmitJobRequest) -> Input:
    match request.WhichOneof("input"):
        case "payload":
            return Input(request.payload.SerializeToString(deterministic=True))
        case "payload_blob":
            return Input(request.payload_blob.data, request.payload_blob.content_type)
    return Input()


def _policy(policy: job_pb2.RetryPolicy) -> RetryPolicy:
    default = DEFAULT_POLICY
    initial = default.initial_backoff
    if policy.HasField("initial_backoff"):
        initial = seconds(policy.initial_backoff)
    longest = max(default.max_backoff, initial)
    if policy.HasField("max_backoff"):
        longest = seconds(policy.max_backoff)
    factor, jitter = default.backoff_multiplier, default.jitter
    if policy.HasField("backoff_multiplier"):
        factor = policy.backoff_multiplier
    if policy.HasField("jitter"):
        jitter = policy.jitter
    return RetryPolicy(initial, factor, longest, jitter)


def _unique(unique: job_pb2.Unique) -> Unique:
    return Unique(
        unique.key,
        UNIQUE_SCOPES.get(unique.scope, UniqueScope.ACTIVE),
        ON_CONFLICT.get(unique.on_conflict, OnConflict.RETURN_EXISTING),
    )


def _moment(message: Message, field: str) -> datetime | None:
    """Of stored times, which are whole microseconds, none lies between this and what was sent."""
    if not message.HasField(field):
        return None
    sent: Timestamp = getattr(message, field)
    moment = to_datetime(sent)
    cut = sent.nanos % 1_000 and moment < LAST_MOMENT
    return moment + timedelta(microseconds=1) if cut else moment


def job_filter(message: job_pb2.JobFilter) -> JobFilter:
    return JobFilter(
        states=frozenset(STATE_NAMES[state] for state in message.states),
        job_types=frozenset(message.job_types),
        queue=message.queue,
        labels=dict(message.labels),
        error_types=frozenset(message.error_types),
        idempotency_key=message.idempotency_key,
        create_time_after=_moment(message, "create_time_after"),
        create_time_before=_moment(message, "create_time_before"),
        finish_time_after=_moment(message, "finish_time_after"),
        finish_time_before=_moment(message, "finish_time_before"),
    )


def _request_hash(request: job_service_pb2.SubmitJobRequest) -> bytes:
    """Of the request as sent; whether it only validates makes no other request of it."""
    if request.validate_only:
        sent, request = request, job_service_pb2.SubmitJobRequest()
        request.CopyFrom(sent)
        request.ClearField("validate_only")
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


# Answers.


def submit_response(submitted: Submitted) -> job_service_pb2.SubmitJobResponse:
    message = job_service_pb2.SubmitJobResponse(already_existed=submitted.already_existed)
    if submitted.job:
        _put_job(message.job, submitted.job)
    else:
        message.job.job_id = submitted.job_id
    return message


def get_response(job: Job) -> job_service_pb2.GetJobResponse:
    message = job_service_pb2.GetJobResponse()
    _put_job(message.job, job)
    _put_payload(message.job, job)
    return message


def job(job: Job) -> job_pb2.Job:
    message = job_pb2.Job()
    _put_job(message, job)
    return message


def _put_job(message: job_pb2.Job, job: Job) -> None:
    """Fills an empty message where it stands: to copy one costs nearly as much as to make it."""
    terms = _terms(job.job_type, job.queue, job.max_attempts, job.timeout, job.retry_policy)
    message.MergeFromString(terms)
    message.job_id = job.job_id
    message.state = STATES[job.state]
    message.priority = job.priority
    message.attempt = job.attempt
    message.worker_id = job.worker_id
    message.cancel_requested = job.cancel_requested
    message.last_sequence = job.last_sequence
    message.trace_id = job.trace_id
    for name in _MOMENTS:
        if (moment := getattr(job, name)) is not None:
            put_timestamp(getattr(message, name), moment)
    if job.labels:
        message.labels.update(job.labels)
    if job.idempotency_key:
        message.idempotency_key = job.idempotency_key
    if job.unique:
        message.unique.CopyFrom(_unique_message(job.unique))
    if job.concurrency:
        message.concurrency.key = job.concurrency.key
        message.concurrency.max_running = job.concurrency.max_running
    if job.progress:
        message.progress.CopyFrom(_progress(job.progress))
    if job.error:
        message.error.CopyFrom(_error(job.error))


def _put_payload(message: job_pb2.Job, job: Job) -> None:
    if job.input is None:
        raise ValueError(f"job {job.job_id} was read without its payload")
    if job.input.content_type is None:
        message.payload.SetInParent()  # an empty one is there, too
        message.payload.MergeFromString(job.input.data)
    else:
        message.payload_blob.CopyFrom(_blob(job.input))


def result(outcome: JobOutcome) -> job_service_pb2.GetResultResponse:
    message = job_service_pb2.GetResultResponse(job_id=outcome.job_id, state=STATES[outcome.state])
    if outcome.error:
        message.error.CopyFrom(_error(outcome.error))
    elif outcome.result and outcome.result.content_type is None:
        message.result.SetInParent()
        message.result.MergeFromString(outcome.result.data)
    elif outcome.result:
        message.result_blob.CopyFrom(_blob(outcome.result))
    return message


def event(event: JobEvent) -> job_pb2.JobEvent:
    message = job_pb2.JobEvent(
        job_id=event.job_id,
        sequence=event.sequence,
        type=EVENT_TYPES[event.type],
        event_time=timestamp(event.event_time),
        state=STATES[event.state],
        attempt=event.attempt,
        worker_id=event.worker_id,
        error=_error(event.error) if event.error else None,
        next_attempt_time=timestamp(event.next_attempt_time),
        actor=event.actor,
    )
    if event.report:
        _add_report(message, event.report)
    return message


def _add_report(message: job_pb2.JobEvent, report: Report) -> None:
    match report:
        case Progress():
            message.progress.CopyFrom(_progress(report))
        case Log(level, text):
            message.log.CopyFrom(job_pb2.LogLine(level=LOG_LEVELS[level], message=text))
        case Output(data=bytes(data)):
            message.output.CopyFrom(job_pb2.OutputChunk(data=data))
        case Output(text):
            message.output.CopyFrom(job_pb2.OutputChunk(text=text or ""))


def events_page(events: list[JobEvent], size: int) -> job_service_pb2.ListJobEventsResponse:
    """At most `size` of the events, and no more bytes than a page may have; there are more if
    some were left out."""
    page = job_service_pb2.ListJobEventsResponse()
    page_bytes = 0
    for each in events[:size]:
        message = event(each)
        page_bytes += message.ByteSize()
        if page_bytes > PAGE_BYTES_MAX and page.events:
            break
        page.events.append(message)
    if len(page.events) < len(events):
        page.next_after_sequence = page.events[-1].sequence
    return page


def jobs_page(
    jobs: Iterable[Job], last: str, *, full: bool
) -> tuple[job_service_pb2.ListJobsResponse, str]:
    """As many of the jobs as a page may have bytes; `last`, or the last that it has if some were
    left out."""
    page = job_service_pb2.ListJobsResponse()
    page_bytes = 0
    for each in jobs:
        message = page.jobs.add()
        _put_job(message, each)
        if full:
            _put_payload(message, each)
        page_bytes += message.ByteSize()
        if page_bytes > PAGE_BYTES_MAX and len(page.jobs) > 1:
            del page.jobs[-1]
            return page, page.jobs[-1].job_id
    return page, last


def watch_response(item: JobEvent | Heartbeat) -> job_service_pb2.WatchJobResponse:
    if isinstance(item, JobEvent):
        return job_service_pb2.WatchJobResponse(event=event(item))
    return job_service_pb2.WatchJobResponse(heartbeat=_heartbeat(item))


def fleet_event(model: JobEvent, token: str) -> bytes:
    """A WatchJobsResponse, as it goes to all who watch."""
    message = job_service_pb2.WatchJobsResponse(event=event(model), resume_token=token)
    return message.SerializeToString()


def fleet_beat(time: datetime, token: str) -> job_service_pb2.WatchJobsResponse:
    return job_service_pb2.WatchJobsResponse(
        heartbeat=_heartbeat(Heartbeat(time, 0)), resume_token=token
    )


def run_response(item: JobEvent | Heartbeat | JobOutcome) -> job_service_pb2.RunJobResponse:
    match item:
        case JobEvent():
            return job_service_pb2.RunJobResponse(event=event(item))
        case JobOutcome():
            return job_service_pb2.RunJobResponse(result=result(item))
        case Heartbeat():
            return job_service_pb2.RunJobResponse(heartbeat=_heartbeat(item))


def _heartbeat(heartbeat: Heartbeat) -> job_pb2.Heartbeat:
    return job_pb2.Heartbeat(time=timestamp(heartbeat.time), last_sequence=heartbeat.last_sequence)


def _error(error: JobError) -> job_pb2.JobError:
    return job_pb2.JobError(
        type=error.type,
        message=error.message,
        traceback=error.traceback,
        retryable=error.retryable,
    )


def _progress(progress: Progress) -> job_pb2.Progress:
    return job_pb2.Progress(
        current=progress.current, total=progress.total, message=progress.message
    )


def _unique_message(unique: Unique) -> job_pb2.Unique:
    return job_pb2.Unique(
        key=unique.key,
        scope=job_pb2.UniqueScope.Value(f"UNIQUE_SCOPE_{unique.scope}"),
        on_conflict=job_pb2.UniqueConflict.Value(f"UNIQUE_CONFLICT_{unique.on_conflict}"),
    )


def _blob(value: Input) -> job_pb2.Blob:
    return job_pb2.Blob(content_type=value.content_type or "", data=value.data)


@functools.lru_cache(maxsize=256)
def _terms(
    job_type: str, queue: str, max_attempts: int, timeout: float, policy: RetryPolicy
) -> bytes:
    """The part of a Job, on the wire, that many jobs have in common."""
    return job_pb2.Job(
        job_type=job_type,
        queue=queue,
        max_attempts=max_attempts,
        timeout=duration(timeout),
        retry_policy=job_pb2.RetryPolicy(
            initial_backoff=duration(policy.initial_backoff),
            backoff_multiplier=policy.backoff_multiplier,
            max_backoff=duration(policy.max_backoff),
            jitter=policy.jitter,
        ),
    ).SerializeToString()
