"""New jobs, as verbs.submit has it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Change, Dispatch, Effects, Job, NewJob
from jobsvc.core.states import EventType, JobState
from jobsvc.store.batch import PUBLISH_GRACE
from jobsvc.store.database import Database, Refused
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.hot.effects import effects_of
from jobsvc.store.verbs.submitting import KEY_LIFETIME, Submitted, timeless_columns

UNIQUE_VIOLATION: Final = "23505"
SUBMIT: Final = Statement.from_file("submit", "json", "bigint", "interval", "interval")
# A key that is in use is an error here, and so undoes all.
SUBMIT_ALL: Final = replace(
    SUBMIT, name="submit_all", text=SUBMIT.text.replace("ON CONFLICT (key) DO NOTHING", "")
)


@dataclass(frozen=True, slots=True)
class Known:
    """What the caller takes for given: job types as of a revision, and queues that are known."""

    revision: int
    types: Mapping[str, JobTypeInfo]
    queues: Container[str]


def submit(
    database: Database, requests: Sequence[NewJob], known: Known
) -> tuple[dict[str, Submitted], Effects]:
    """Stores the plain ones of `requests`, in a thread. Answers them by job id; the others, none
    where the job types have changed or some queue has a limit, are for the verb: those whose
    idempotency key is in use, too."""
    plain = PlainJobs(database, requests, known)
    return plain.stored(database.once(SUBMIT, *plain.parameters) if plain else [])


def submit_all(
    database: Database, requests: Sequence[NewJob], known: Known
) -> tuple[list[Submitted], Effects] | None:
    """All of `requests` in their order, where each is plain and no idempotency key is in use; None,
    and nothing stored, otherwise."""
    plain = PlainJobs(database, requests, known)
    if len(plain) < len(requests) or not plain:
        return None
    try:
        rows = database.once(SUBMIT_ALL, *plain.parameters)
    except Refused as error:
        if error.sqlstate != UNIQUE_VIOLATION:
            raise
        return None
    if not rows:
        return None
    submitted, effects = plain.stored(rows)
    return [submitted[request.job_id] for request in requests], effects


class PlainJobs:
    """Those of the requests that may be plain: none on SQLite."""

    def __init__(self, database: Database, requests: Sequence[NewJob], known: Known) -> None:
        self._known = known
        self._requests: dict[str, NewJob] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        for request in () if database.sqlite else requests:
            if _is_plain(request):
                row = timeless_columns(request, known.types.get(request.job_type))
                if row["queue"] in known.queues:
                    self._requests[request.job_id] = request
                    self._rows[request.job_id] = row

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def parameters(self) -> tuple[object, ...]:
        """Of SUBMIT."""
        given = [_given(self._requests[job_id], row) for job_id, row in self._rows.items()]
        return json.dumps(given), self._known.revision, KEY_LIFETIME, PUBLISH_GRACE

    def stored(self, answer: Iterable[Sequence[Any]]) -> tuple[dict[str, Submitted], Effects]:
        """From the rows that SUBMIT gave."""
        submitted = {}
        changes = []
        dispatches = []
        for job_id, outbox_id, now in answer:
            row = self._rows[job_id]
            job = _job(self._requests[job_id], row, now.astimezone(UTC))
            submitted[job_id] = Submitted(job_id, job)
            changes.append(Change(job_id, 1))
            dispatches.append(
                Dispatch(
                    outbox_id, "job", job_id, row["job_type"], row["queue"], row["priority"], 0
                )
            )
        kinds = ((each.job_type, each.queue) for each in dispatches)
        effects = effects_of(EventType.SUBMITTED, JobState.QUEUED, kinds, changes, dispatches)
        return submitted, effects


def _is_plain(request: NewJob) -> bool:
    return (
        request.unique is None
        and request.schedule_time is None
        and request.delay is None
        and request.expire_time is None
        and request.ttl is None
    )


def _given(request: NewJob, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "payload": b64encode(request.input.data).decode(),
        "request_hash": b64encode(request.request_hash).decode(),
        "actor": request.actor,
    }


def _job(request: NewJob, row: Mapping[str, Any], now: datetime) -> Job:
    """As it is stored, without its payload."""
    return Job(
        job_id=request.job_id,
        job_type=request.job_type,
        queue=row["queue"],
        state=JobState.QUEUED,
        priority=request.priority,
        attempt=0,
        max_attempts=row["max_attempts"],
        retry_policy=request.retry_policy,
        timeout=row["timeout"],
        create_time=now,
        last_sequence=1,
        labels=request.labels,
        idempotency_key=request.idempotency_key,
        concurrency=request.concurrency,
        schedule_time=now,
        trace_id=request.trace_id,
    )
