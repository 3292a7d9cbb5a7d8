"""What the service can decide against a caller. No transport in here: rpc/status.py maps each
class to its gRPC status.

    JobsvcError
    ├── InvalidRequest            one or more fields break a rule; lists every one
    ├── Undecodable               the request's bytes are no message of its type
    ├── Unauthenticated           no token, or none that is known
    ├── ScopeMissing              a token that does not allow the call
    ├── ServiceUnknown            asked of the health of a service that there is not
    ├── JobUnknown
    ├── JobStateForbids           the job's state does not allow what was asked
    ├── IdempotencyKeyReused      same key, another request
    ├── UniqueConflict            another job holds the unique key, and is not to be touched
    ├── ScheduleUnknown
    ├── ScheduleExists
    ├── EtagMismatch              the schedule has changed since it was read
    ├── RegistryChanged           checked against job types that are out of date (never leaves
    │                             services/: the check is made again)
    ├── SequenceOutOfRange        a resume point beyond the job's history
    ├── ResumeTokenExpired        older than JOBSVC_RESUME, or of a database since restored
    ├── WatcherTooSlow
    ├── LimitReached              come back later
    ├── Unavailable               come back, perhaps to another server
    │   ├── DatabaseUnavailable
    │   ├── Draining
    │   └── StreamExpired
    └── CannotStart               start-up only: a taken port or directory, bad handlers, …
        ├── SchemaMismatch        the database's schema is not this release's
        └── DatabaseUnfit         a database, or a way to it, that the service cannot rely on
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from jobsvc.core.states import JobState

# The shortest default retention of an ended job.
PURGED_DAYS = 7


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that breaks a rule; `field` is its path, `description` says what to do."""

    field: str
    description: str


class JobsvcError(Exception):
    """The message is readable alone and safe to show to the caller."""


class InvalidRequest(JobsvcError):
    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class Undecodable(JobsvcError):
    def __init__(self, message_type: str) -> None:
        super().__init__(f"the request is no {message_type}: its bytes cannot be decoded")


class Unauthenticated(JobsvcError):
    """The message says nothing of the token: it is shown, and logged."""


class ScopeMissing(JobsvcError):
    def __init__(self, method: str, scopes: Iterable[str]) -> None:
        super().__init__(f"{method} needs a token with the scope {' and '.join(sorted(scopes))}")


class ServiceUnknown(JobsvcError):
    def __init__(self) -> None:
        super().__init__("no such service")


class JobUnknown(JobsvcError):
    def __init__(self, job_id: str) -> None:
        # A UUIDv7 begins with the milliseconds since 1970 at which it was made.
        age_days = (time.time() - int(job_id.replace("-", "")[:12], 16) / 1000) / 86_400
        purged = "; it is so old that it may have been purged" if age_days > PURGED_DAYS else ""
        super().__init__(f"no job {job_id}{purged}")
        self.job_id = job_id


class JobStateForbids(JobsvcError):
    def __init__(self, job_id: str, state: JobState, what: str) -> None:
        super().__init__(f"job {job_id} is {state}: {what}")
        self.job_id = job_id
        self.state = state


class IdempotencyKeyReused(JobsvcError):
    """`index` is the place of the refused request in a SubmitJobs call, else None."""

    def __init__(self, job_id: str, index: int | None = None) -> None:
        place = "" if index is None else f"requests[{index}]: "
        super().__init__(
            f"{place}the idempotency key was used before with another request (job {job_id}); "
            "send the same request again or choose another key"
        )
        self.job_id = job_id
        self.index = index


class UniqueConflict(JobsvcError):
    """`index`: as in IdempotencyKeyReused."""

    def __init__(self, job_id: str, index: int | None = None) -> None:
        place = "" if index is None else f"requests[{index}]: "
        super().__init__(f"{place}the unique key is held by job {job_id}, which has not ended")
        self.job_id = job_id
        self.index = index


class RegistryChanged(JobsvcError):
    pass


class ScheduleUnknown(JobsvcError):
    def __init__(self, schedule_id: str) -> None:
        super().__init__(f"no schedule {schedule_id}")
        self.schedule_id = schedule_id


class ScheduleExists(JobsvcError):
    def __init__(self, schedule_id: str) -> None:
        super().__init__(f"there is a schedule {schedule_id} already; update it instead")
        self.schedule_id = schedule_id


class EtagMismatch(JobsvcError):
    def __init__(self, schedule_id: str) -> None:
        super().__init__(
            f"schedule {schedule_id} has changed since its etag was read; read it again"
        )


class SequenceOutOfRange(JobsvcError):
    def __init__(self, after: int, oldest: int, last: int) -> None:
        super().__init__(
            f"after_sequence {after} is beyond the job's last event {last}; "
            "resume with a sequence that this job has sent"
        )
        self.oldest = oldest
        self.last = last


class ResumeTokenExpired(JobsvcError):
    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; watch anew without a resume_token, and list what was missed")


class WatcherTooSlow(JobsvcError):
    def __init__(self) -> None:
        super().__init__("the stream was not read for too long; watch again from the last sequence")


class LimitReached(JobsvcError):
    def __init__(self, what: str, retry_seconds: float = 1.0) -> None:
        super().__init__(what)
        self.retry_seconds = retry_seconds


class Unavailable(JobsvcError):
    retry_seconds = 1.0


class DatabaseUnavailable(Unavailable):
    def __init__(self, cause: str = "") -> None:
        """`cause`: the database's own words, or those of the way to it. They are for whoever runs
        the service, and so not part of the message."""
        super().__init__("the database is out of reach; try again")
        self.cause = cause

    @property
    def explained(self) -> str:
        return f"the database is out of reach: {self.cause}" if self.cause else str(self)


class Draining(Unavailable):
    def __init__(self) -> None:
        super().__init__("this server is shutting down; try again, another one will answer")


class StreamExpired(Unavailable):
    def __init__(self) -> None:
        super().__init__("the stream reached its age limit; watch again from the last sequence")


class CannotStart(JobsvcError):
    pass


class SchemaMismatch(CannotStart):
    pass


class DatabaseUnfit(CannotStart):
    pass
