"""What operators are shown, and what they set: queues, workers, and why a job is not running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.states import JobState


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `max_starts` starts in any span of `period` seconds."""

    max_starts: int
    period: float


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue as it stands. `ready_messages` is the broker's to say, None where it does not."""

    name: str
    generation: int
    paused: bool
    max_running: int | None
    rate_limit: RateLimit | None
    counts: Mapping[JobState, int] = field(default_factory=dict)
    oldest_queued_age: float | None = None
    live_workers: int = 0
    unacknowledged_messages: int = 0
    ready_messages: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    worker_id: str
    host: str
    pid: int
    version: str
    queues: tuple[str, ...]
    job_types: tuple[str, ...]
    concurrency: int
    start_time: datetime
    heartbeat_time: datetime
    claim_time: datetime | None
    running: tuple[str, ...] = ()  # ids of jobs


@dataclass(frozen=True, slots=True)
class JobType:
    """`info` has the defaults of the service where the handler names none."""

    info: JobTypeInfo
    live_workers: int


class WaitReason(StrEnum):
    """Why a job is not running. The first that holds, in this order, is told."""

    ENDED = "ENDED"
    RUNNING = "RUNNING"
    NOT_DUE = "NOT_DUE"
    RETRY_BACKOFF = "RETRY_BACKOFF"
    QUEUE_PAUSED = "QUEUE_PAUSED"
    NO_WORKER = "NO_WORKER"
    QUEUE_LIMIT = "QUEUE_LIMIT"
    RATE_LIMIT = "RATE_LIMIT"
    CONCURRENCY_LIMIT = "CONCURRENCY_LIMIT"
    BEHIND_OTHERS = "BEHIND_OTHERS"
    BROKER_UNAVAILABLE = "BROKER_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Explanation:
    """`facts`: what the reason rests on, by names in snake_case."""

    state: JobState
    reason: WaitReason
    message: str
    facts: Mapping[str, str]
