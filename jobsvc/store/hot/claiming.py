"""QUEUED -> RUNNING, as verbs.claim has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from jobsvc.core.attempts import Claimed, Input
from jobsvc.core.model import Change, Effects
from jobsvc.core.states import EventType, JobState
from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.hot.effects import effects_of
from jobsvc.store.verbs.claiming import ClaimResult

CLAIM: Final = Statement.from_file("claim", "json", "text[]", "text", "uuid", "interval")


def claim(
    database: Database,
    priorities: Mapping[str, int],
    types: frozenset[str],
    worker_id: str,
    token: str,
    lease_seconds: float,
) -> ClaimResult:
    """Of the jobs of `priorities` (job id -> that of its message) the plain ones; the others, and
    those that this very token claimed before, are for the verb."""
    if database.sqlite:
        return ClaimResult((), Effects())
    messages = [{"id": job_id, "priority": priorities[job_id]} for job_id in sorted(priorities)]
    lease = timedelta(seconds=lease_seconds)
    rows = database.once(CLAIM, json.dumps(messages), sorted(types), worker_id, token, lease)
    claimed = [_claimed(token, *row[:-1]) for row in rows]
    changes = [Change(row[0], row[-1]) for row in rows]
    kinds = ((each.job_type, each.queue) for each in claimed)
    return ClaimResult(
        tuple(claimed), effects_of(EventType.STARTED, JobState.RUNNING, kinds, changes)
    )


def _claimed(
    token: str,
    job_id: str,
    job_type: str,
    queue: str,
    attempt: int,
    payload: memoryview,
    content_type: str | None,
    *others: Any,
) -> Claimed:
    """From the columns of the statement, in their order."""
    data = Input(bytes(payload), content_type)
    return Claimed(job_id, token, job_type, queue, attempt, data, *others)
