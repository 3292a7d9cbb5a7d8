"""Write handlers with `job` and JobContext; run them with `jobsvc worker` or `jobsvc dev`."""

from worker.api import Abort, Blob, JobCancelled, JobContext, Retry, Snooze, job

__all__ = ["Abort", "Blob", "JobCancelled", "JobContext", "Retry", "Snooze", "job"]
