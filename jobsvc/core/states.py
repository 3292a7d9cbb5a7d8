"""State law: the states of a job, the events that tell of a change, every arrow between states.

Who moves a job on:

====================================  ==========================  ===============================
arrow                                 event                       moved by
====================================  ==========================  ===============================
(none) -> SCHEDULED | QUEUED          SUBMITTED                   the server, on SubmitJob
SCHEDULED | RETRYING -> QUEUED        QUEUED                      the promoter, when due
QUEUED -> RUNNING                     STARTED                     a worker's claim
RUNNING -> SUCCEEDED                  SUCCEEDED                   the worker, by its lease token
RUNNING -> RETRYING                   ATTEMPT_FAILED              the worker; the reaper when lost
RUNNING -> FAILED                     ATTEMPT_FAILED, FAILED      the worker; the reaper when lost
RUNNING -> CANCELLED                  CANCELLED                   the worker; the reaper when lost
RUNNING -> CANCELLED                  ATTEMPT_FAILED, CANCELLED   either, if the attempt failed
RUNNING -> QUEUED                     ATTEMPT_INTERRUPTED         the worker, on shutdown
RUNNING -> SCHEDULED                  SNOOZED                     the worker, when the handler asks
RUNNING (stays)                       CANCEL_REQUESTED            the server, on CancelJob
RUNNING (stays)                       PROGRESS, LOG, OUTPUT       the worker, as the handler tells
waiting -> CANCELLED                  CANCELLED                   the server, on CancelJob
waiting -> FAILED                     FAILED (EXPIRED)            the promoter, past expire_time
waiting (stays)                       UPDATED                     the server, on UpdateJob
waiting -> QUEUED | SCHEDULED         UPDATED                     the same, with a schedule_time
FAILED | CANCELLED -> QUEUED          RETRIED                     the server, on RetryJob
====================================  ==========================  ===============================

RETRIED begins another run: a fresh budget of attempts, and another end. Sequence and attempt go on.
Once its cancel was requested, a running job never waits again: what would take it back to waiting
ends it CANCELLED in the same transaction.
"""

from __future__ import annotations

import random
from enum import StrEnum


class JobState(StrEnum):
    SCHEDULED = "SCHEDULED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL_STATES


WAITING_STATES = (JobState.SCHEDULED, JobState.QUEUED, JobState.RETRYING)
TERMINAL_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
# Of these RetryJob makes a QUEUED job again.
RETRYABLE_STATES = (JobState.FAILED, JobState.CANCELLED)


class EventType(StrEnum):
    SUBMITTED = "SUBMITTED"
    QUEUED = "QUEUED"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    LOG = "LOG"
    OUTPUT = "OUTPUT"
    ATTEMPT_FAILED = "ATTEMPT_FAILED"
    ATTEMPT_INTERRUPTED = "ATTEMPT_INTERRUPTED"
    SNOOZED = "SNOOZED"
    CANCEL_REQUESTED = "CANCEL_REQUESTED"
    UPDATED = "UPDATED"
    RETRIED = "RETRIED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL_EVENTS


TERMINAL_EVENTS = (EventType.SUCCEEDED, EventType.FAILED, EventType.CANCELLED)

# From where, by which event, to where. None stands for "no job yet". A history is legal when each
# of its events is an arrow of this set that starts at the state which the event before it left.
ARROWS: frozenset[tuple[JobState | None, EventType, JobState]] = frozenset(
    {
        (None, EventType.SUBMITTED, JobState.SCHEDULED),
        (None, EventType.SUBMITTED, JobState.QUEUED),
        (JobState.SCHEDULED, EventType.QUEUED, JobState.QUEUED),
        (JobState.RETRYING, EventType.QUEUED, JobState.QUEUED),
        (JobState.QUEUED, EventType.STARTED, JobState.RUNNING),
        (JobState.RUNNING, EventType.PROGRESS, JobState.RUNNING),
        (JobState.RUNNING, EventType.LOG, JobState.RUNNING),
        (JobState.RUNNING, EventType.OUTPUT, JobState.RUNNING),
        (JobState.RUNNING, EventType.CANCEL_REQUESTED, JobState.RUNNING),
        (JobState.RUNNING, EventType.ATTEMPT_FAILED, JobState.RETRYING),
        # RUNNING after ATTEMPT_FAILED: the end follows in the same transaction.
        (JobState.RUNNING, EventType.ATTEMPT_FAILED, JobState.RUNNING),
        (JobState.RUNNING, EventType.ATTEMPT_INTERRUPTED, JobState.QUEUED),
        (JobState.RUNNING, EventType.SNOOZED, JobState.SCHEDULED),
        (JobState.RUNNING, EventType.SUCCEEDED, JobState.SUCCEEDED),
        (JobState.RUNNING, EventType.FAILED, JobState.FAILED),
        (JobState.RUNNING, EventType.CANCELLED, JobState.CANCELLED),
        *((s, EventType.CANCELLED, JobState.CANCELLED) for s in WAITING_STATES),
        *((s, EventType.FAILED, JobState.FAILED) for s in WAITING_STATES),
        *((s, EventType.UPDATED, s) for s in WAITING_STATES),
        *((s, EventType.UPDATED, JobState.QUEUED) for s in WAITING_STATES),
        *((s, EventType.UPDATED, JobState.SCHEDULED) for s in WAITING_STATES),
        *((s, EventType.RETRIED, JobState.QUEUED) for s in RETRYABLE_STATES),
    }
)

# A job that kills its worker this often in one budget of attempts is not tried again (G8).
CRASHES_MAX = 3


def backoff_seconds(
    failures: int, initial: float, multiplier: float, maximum: float, jitter: float
) -> float:
    """Seconds to wait after the `failures`-th failure (1 or more) of a budget.

    min(maximum, initial * multiplier^(failures-1)), times a random factor in
    [1 - jitter, 1 + jitter].
    """
    try:
        base = min(maximum, initial * multiplier ** (failures - 1))
    except OverflowError:
        base = maximum
    return base * random.uniform(1 - jitter, 1 + jitter)
