"""Queues, workers, job types and explanations: the model to messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from generated.jobsvc.v1 import admin_service_pb2, job_pb2, job_service_pb2
from jobsvc.core.operations import Explanation, JobType, Queue, RateLimit, WaitReason, Worker
from jobsvc.core.schemas import tellable
from jobsvc.core.states import JobState
from jobsvc.rpc.convert.jobs import STATES
from jobsvc.rpc.convert.values import duration, seconds, timestamp

WAIT_REASONS = {reason: job_pb2.WaitReason.Value(f"WAIT_REASON_{reason}") for reason in WaitReason}
NOT_KNOWN = -1


def limits(
    request: admin_service_pb2.UpdateQueueRequest,
) -> tuple[frozenset[str], int | None, RateLimit | None]:
    """What is to change, the greatest number that may run, and the rate; None is no limit."""
    rate = None
    if request.HasField("rate_limit"):
        rate = RateLimit(request.rate_limit.max_starts, seconds(request.rate_limit.period))
    return frozenset(request.update_mask.paths), request.max_running or None, rate


def queue(queue: Queue) -> admin_service_pb2.Queue:
    message = admin_service_pb2.Queue(
        name=queue.name,
        paused=queue.paused,
        max_running=queue.max_running or 0,
        scheduled_count=queue.counts.get(JobState.SCHEDULED, 0),
        queued_count=queue.counts.get(JobState.QUEUED, 0),
        running_count=queue.counts.get(JobState.RUNNING, 0),
        retrying_count=queue.counts.get(JobState.RETRYING, 0),
        ready_message_count=NOT_KNOWN if queue.ready_messages is None else queue.ready_messages,
        unacknowledged_message_count=queue.unacknowledged_messages,
        live_worker_count=queue.live_workers,
    )
    if queue.rate_limit is not None:
        message.rate_limit.max_starts = queue.rate_limit.max_starts
        message.rate_limit.period.CopyFrom(duration(queue.rate_limit.period))
    if queue.oldest_queued_age is not None:
        message.oldest_queued_age.CopyFrom(duration(queue.oldest_queued_age))
    return message


def workers(found: Iterable[Worker]) -> Iterator[admin_service_pb2.Worker]:
    for worker in found:
        yield admin_service_pb2.Worker(
            worker_id=worker.worker_id,
            host=worker.host,
            pid=worker.pid,
            version=worker.version,
            queues=worker.queues,
            job_types=worker.job_types,
            concurrency=worker.concurrency,
            running_job_ids=worker.running,
            start_time=timestamp(worker.start_time),
            last_heartbeat_time=timestamp(worker.heartbeat_time),
            last_claim_time=timestamp(worker.claim_time),
        )


def job_types(found: Iterable[JobType]) -> Iterator[job_pb2.JobType]:
    for job_type in found:
        info = job_type.info
        yield job_pb2.JobType(
            name=info.name,
            description=info.description,
            payload_schema=_schema(info.payload_schema) if info.payload_schema else None,
            queue=info.queue or "",
            max_attempts=info.max_attempts or 0,
            timeout=duration(info.timeout) if info.timeout is not None else None,
            live_worker_count=job_type.live_workers,
        )


def _schema(text: str) -> Struct | None:
    """None for one that is no object: `true` says nothing."""
    schema = tellable(json.loads(text))
    return json_format.ParseDict(schema, Struct()) if isinstance(schema, dict) else None


def explanation(found: Explanation) -> job_service_pb2.ExplainJobResponse:
    return job_service_pb2.ExplainJobResponse(
        state=STATES[found.state],
        reason=WAIT_REASONS[found.reason],
        message=found.message,
        facts=found.facts,
    )
