"""What a worker's records have in common."""

from __future__ import annotations

from jobsvc.core.attempts import Claimed


def ids(claimed: Claimed, worker_id: str) -> dict[str, object]:
    """The fields by which a record names an attempt."""
    return {
        "job_id": claimed.job_id,
        "job_type": claimed.job_type,
        "queue": claimed.queue,
        "attempt": claimed.attempt,
        "worker_id": worker_id,
        "trace_id": claimed.trace_id,
    }
