"""What is counted and measured; served at `/metrics` of every server and worker.

A job's steps are counted where they were committed, by whichever process did it, so sums over all
processes are the truth: submits are `event="SUBMITTED"`, starts `STARTED`, outcomes the terminal
events, retries `ATTEMPT_FAILED` with `state="RETRYING"`, dead letters `FAILED`. What only the
database knows (the oldest job, the outbox, the workers) each server tells for all: there the
maximum is the truth.

Where a server is several processes, they are told as one: `bootstrap/merging.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from jobsvc.core.model import Step

# Clients name job types and queues; beyond so many pairs they are counted as one.
KINDS_MAX = 500
OTHER = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)

STEPS = Counter(
    "jobsvc_job_events", "Committed job events.", ["event", "state", "job_type", "queue"]
)
WAIT = Histogram(
    "jobsvc_wait_seconds",
    "From when a job became QUEUED until a worker claimed it.",
    ["job_type", "queue"],
    buckets=_SECONDS,
)
RUN = Histogram(
    "jobsvc_run_seconds",
    "From the start of an attempt's handler until its outcome.",
    ["job_type", "queue"],
    buckets=_SECONDS,
)
LEASES_LOST = Counter("jobsvc_leases_lost", "Attempts stopped because their lease was lost.")
LEASES_EXPIRED = Counter(
    "jobsvc_leases_expired", "Attempts given up because nobody renewed their lease."
)
TICKS = Counter("jobsvc_schedule_ticks", "What became of schedules' ticks.", ["outcome"])
RUNNING = Gauge("jobsvc_running", "Attempts that this worker holds.")
OLDEST_QUEUED = Gauge(
    "jobsvc_oldest_queued_age_seconds", "Age of the longest-waiting QUEUED job.", ["queue"]
)
WORKERS = Gauge("jobsvc_workers", "Live workers that consume a queue.", ["queue"])
OUTBOX_AGE = Gauge("jobsvc_outbox_age_seconds", "Age of the oldest message owed to the broker.")
READY = Gauge("jobsvc_ready", "1 while /readyz says that this process does its work.")
BROKER_UP = Gauge("jobsvc_broker_up", "1 while this process can publish.")
BROKER_SHARED = Gauge("jobsvc_broker_shared", "1 while another service uses the broker's vhost.")
WATCHERS = Gauge("jobsvc_watchers", "Open watches of this server.")
WATCH_LAG = Histogram(
    "jobsvc_watch_lag_seconds",
    "From an event's commit until it was read for a watcher that follows live.",
    buckets=_SECONDS,
)
FLEET_WATCHERS = Gauge("jobsvc_fleet_watchers", "Open WatchJobs streams of this server.")
FLEET_LAG = Histogram(
    "jobsvc_fleet_lag_seconds",
    "From the beginning of an event's transaction until it was read for WatchJobs.",
    buckets=_SECONDS,
)
FLEET_HELD = Gauge(
    "jobsvc_fleet_held_seconds",
    "For how long one transaction that still writes has kept events from WatchJobs.",
)
POOL_IN_USE = Gauge("jobsvc_database_connections_in_use", "Of this process.")
DATABASE_WAITING = Gauge(
    "jobsvc_database_calls_waiting", "What waits for one of this server's database threads."
)
LOOP_LAG = Gauge("jobsvc_event_loop_lag_seconds", "How late the event loop was at the last tick.")
CALLS = Histogram(
    "jobsvc_call_seconds",
    "Calls by method and code; streams until they end.",
    ["method", "code"],
    buckets=_SECONDS,
)
LOG_DROPPED = Counter(
    "jobsvc_log_records_dropped", "Log records that nobody read in time, and that were dropped."
)
PROCESSES_LOST = Counter(
    "jobsvc_processes_lost", "Processes of this server that ended unasked; each was replaced."
)

# How gauges of several processes are told as one, where the sum is not the truth: what each tells
# for all, how bad it is anywhere, and what is the same everywhere; and what is so where it is so in
# each. The last of either are prometheus_client's own.
LARGEST = frozenset(
    {
        *("jobsvc_oldest_queued_age_seconds", "jobsvc_workers", "jobsvc_outbox_age_seconds"),
        *("jobsvc_fleet_held_seconds", "jobsvc_event_loop_lag_seconds"),
        "jobsvc_broker_shared",
        *("process_max_fds", "python_info"),
    }
)
SMALLEST = frozenset({"jobsvc_ready", "jobsvc_broker_up", "process_start_time_seconds"})

_kinds: set[tuple[str, str]] = set()
# Children by what is counted: to look one up by its labels costs more than to count. Of bounded
# kinds only, or whoever names job types could fill the memory.
_step_children: dict[Step, Counter] = {}
_kind_children: dict[tuple[Histogram, str, str], Histogram] = {}


def kind(job_type: str, queue: str) -> tuple[str, str]:
    """The labels for a job type and queue, bounded in number."""
    pair = job_type, queue
    if pair not in _kinds:
        if len(_kinds) >= KINDS_MAX:
            return OTHER, OTHER
        _kinds.add(pair)
    return pair


@functools.cache
def call_child(method: str, code: str) -> Histogram:
    """Of CALLS. Only for methods that we have."""
    return CALLS.labels(method, code)


def kind_child(metric: Histogram, job_type: str, queue: str) -> Histogram:
    """The child of WAIT or RUN for a job type and queue."""
    key = metric, job_type, queue
    child = _kind_children.get(key)
    if child is None:
        labels = kind(job_type, queue)
        child = metric.labels(*labels)
        if labels == (job_type, queue):
            _kind_children[key] = child
    return child


def count_steps(steps: Mapping[Step, int]) -> None:
    for step, count in steps.items():
        child = _step_children.get(step)
        if child is None:
            labels = kind(step.job_type, step.queue)
            child = STEPS.labels(step.event, step.state, *labels)
            if labels == (step.job_type, step.queue):
                _step_children[step] = child
        child.inc(count)
