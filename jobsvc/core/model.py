"""Value types that the store, the services, the worker and the rpc layer hand to one another.

Times are timezone-aware UTC datetimes, spans are seconds as float. Job ids are UUIDv7 in canonical
lower-case text. Payloads and results are bytes: with `content_type` None the wire form of a
google.protobuf.Struct (payload) or Value (result), else a blob of that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from jobsvc.core.attempts import Input, JobError, Progress, Report
from jobsvc.core.states import EventType, JobState

DAY = 86_400.0
RETENTION_SECONDS = {
    JobState.SUCCEEDED: 7 * DAY,
    JobState.CANCELLED: 7 * DAY,
    JobState.FAILED: 30 * DAY,
}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    initial_backoff: float = 10.0
    backoff_multiplier: float = 2.0
    max_backoff: float = 3600.0
    jitter: float = 0.2


class UniqueScope(StrEnum):
    """How long a job holds its unique key: while it waits, or until it has ended."""

    WAITING = "WAITING"
    ACTIVE = "ACTIVE"


class OnConflict(StrEnum):
    """What a submit does about a job that holds its unique key."""

    RETURN_EXISTING = "RETURN_EXISTING"
    REJECT = "REJECT"
    REPLACE = "REPLACE"


@dataclass(frozen=True, slots=True)
class Unique:
    key: str
    scope: UniqueScope = UniqueScope.ACTIVE
    on_conflict: OnConflict = OnConflict.RETURN_EXISTING


@dataclass(frozen=True, slots=True)
class Concurrency:
    """It starts only while fewer than `max_running` jobs of that key run, whatever their type."""

    key: str
    max_running: int


@dataclass(frozen=True, slots=True)
class NewJob:
    """A checked request to submit. What the caller left out is None and is filled in on submit."""

    job_id: str
    job_type: str
    input: Input = field(default_factory=Input)
    queue: str | None = None
    priority: int = 0
    schedule_time: datetime | None = None
    delay: float | None = None
    expire_time: datetime | None = None
    ttl: float | None = None
    max_attempts: int | None = None
    retry_policy: RetryPolicy = RetryPolicy()
    timeout: float | None = None
    idempotency_key: str | None = None
    request_hash: bytes = b""
    unique: Unique | None = None
    concurrency: Concurrency | None = None
    retention: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    actor: str = "anonymous"
    trace_id: str = ""
    span_id: str = ""


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """What is to change of a waiting job; None leaves it as it is."""

    priority: int | None = None
    schedule_time: datetime | None = None
    labels: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands. `input` is None where the payload was not asked for."""

    job_id: str
    job_type: str
    queue: str
    state: JobState
    priority: int
    attempt: int
    max_attempts: int
    retry_policy: RetryPolicy
    timeout: float
    create_time: datetime
    last_sequence: int
    input: Input | None = None
    labels: dict[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    unique: Unique | None = None
    concurrency: Concurrency | None = None
    schedule_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None
    next_attempt_time: datetime | None = None
    expire_time: datetime | None = None
    purge_time: datetime | None = None
    progress: Progress | None = None
    error: JobError | None = None
    worker_id: str = ""
    cancel_requested: bool = False
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class JobEvent:
    job_id: str
    sequence: int
    type: EventType
    event_time: datetime
    state: JobState
    attempt: int
    worker_id: str = ""
    error: JobError | None = None
    report: Report | None = None
    next_attempt_time: datetime | None = None
    actor: str = ""


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job stands for whoever waits for its result: at most one of result and error."""

    job_id: str
    state: JobState
    result: Input | None = None
    error: JobError | None = None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """All that are set must match; of those with several values any. `labels`: all pairs.
    `_after` is inclusive, `_before` exclusive."""

    states: frozenset[JobState] = frozenset()
    job_types: frozenset[str] = frozenset()
    queue: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    error_types: frozenset[str] = frozenset()
    idempotency_key: str = ""
    create_time_after: datetime | None = None
    create_time_before: datetime | None = None
    finish_time_after: datetime | None = None
    finish_time_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Jobs of one type whose latest failure was of one type; when their failures were, and a few of
    them, newest first."""

    job_type: str
    error_type: str
    job_count: int
    first_time: datetime
    last_time: datetime
    sample_job_ids: tuple[str, ...] = ()


class MissedTicks(StrEnum):
    """What a schedule does about ticks that passed with no server there: nothing, or one job."""

    SKIP = "SKIP"
    RUN_ONCE = "RUN_ONCE"


class Overlap(StrEnum):
    """Whether a schedule's tick submits while its last job is active."""

    ALLOW = "ALLOW"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Schedule:
    """`request`: a SubmitJobRequest in wire form. The store sets what follows `overlap`;
    `revision` is another with each change of what is above that."""

    schedule_id: str
    cron: str
    time_zone: str
    request: bytes
    paused: bool
    missed_ticks: MissedTicks
    overlap: Overlap
    next_time: datetime | None = None
    last_time: datetime | None = None
    last_job_id: str | None = None
    revision: int = 0

    @property
    def etag(self) -> str:
        return f"{self.revision:x}"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    worker_id: str
    host: str
    pid: int
    version: str
    queues: tuple[str, ...]
    job_types: tuple[str, ...]
    concurrency: int
    prefetch: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A row of the outbox: one message that is to be on the broker."""

    outbox_id: int
    kind: str  # "job" or "dead"
    job_id: str
    job_type: str
    queue: str
    priority: int
    attempt: int
    error_type: str = ""

    def told(self) -> dict[str, object]:
        """The fields by which a record names the job."""
        return {
            "job_id": self.job_id,
            "job_type": self.job_type,
            "queue": self.queue,
            "attempt": self.attempt,
            "error_type": self.error_type,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A job whose history grew, as told to watchers after the commit."""

    job_id: str
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Step:
    """An event as it is counted: what happened, to which kind of job, and what it led to."""

    event: EventType
    state: JobState
    job_type: str
    queue: str


@dataclass(frozen=True, slots=True)
class Effects:
    """What a committed transaction leaves to be told: to watchers, to the broker, to metrics."""

    changes: tuple[Change, ...] = ()
    dispatches: tuple[Dispatch, ...] = ()
    steps: Mapping[Step, int] = field(default_factory=dict, compare=False)

    @property
    def failed(self) -> tuple[Dispatch, ...]:
        """Of the jobs that it ended FAILED: each has a dead letter."""
        return tuple(dispatch for dispatch in self.dispatches if dispatch.kind == "dead")
