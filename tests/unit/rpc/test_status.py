"""The table of errors, against the contract's."""

from __future__ import annotations

from typing import Any

import pytest
from grpc import StatusCode

from jobsvc import errors
from jobsvc.broker import topology
from jobsvc.core.states import JobState
from jobsvc.errors import Violation
from jobsvc.rpc import status
from jobsvc.rpc.intake import RequestMissing
from jobsvc.rpc.status import Answer
from jobsvc.store.database import CommitUnknown
from tests.rpc.status import read_status

JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
# gRPC's default for the metadata of a response, less what it puts there by itself.
TRAILERS_BYTES_MAX = 8 * 1024 - 256

# error, code, reason, metadata, names of the further details
TOLD = [
    (
        errors.InvalidRequest([Violation("queue", "is bad")]),
        *(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", {}, ["BadRequest"]),
    ),
    (errors.Undecodable("X"), StatusCode.INVALID_ARGUMENT, "UNDECODABLE", {}, []),
    (errors.Unauthenticated("no"), StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", {}, []),
    (
        errors.ScopeMissing("JobService/RunJob", {"submit", "read"}),
        *(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING", {}, []),
    ),
    (errors.ServiceUnknown(), StatusCode.NOT_FOUND, "SERVICE_UNKNOWN", {}, []),
    (
        RequestMissing(),
        StatusCode.INVALID_ARGUMENT,
        "UNDECODABLE",
        {},
        [],
    ),
    (errors.JobUnknown(JOB_ID), StatusCode.NOT_FOUND, "JOB_UNKNOWN", {}, ["ResourceInfo"]),
    (
        errors.JobStateForbids(JOB_ID, JobState.FAILED, "no"),
        *(StatusCode.FAILED_PRECONDITION, "JOB_STATE"),
        *({"job_id": JOB_ID, "state": "JOB_STATE_FAILED"}, []),
    ),
    (
        errors.IdempotencyKeyReused(JOB_ID),
        *(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED", {"job_id": JOB_ID}, []),
    ),
    (
        errors.IdempotencyKeyReused(JOB_ID, 0),
        *(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"),
        *({"job_id": JOB_ID, "index": "0"}, []),
    ),
    (
        errors.UniqueConflict(JOB_ID),
        *(StatusCode.ALREADY_EXISTS, "UNIQUE_CONFLICT", {"job_id": JOB_ID}, []),
    ),
    (
        errors.UniqueConflict(JOB_ID, 2),
        *(StatusCode.ALREADY_EXISTS, "UNIQUE_CONFLICT", {"job_id": JOB_ID, "index": "2"}, []),
    ),
    (
        errors.ScheduleUnknown("daily"),
        *(StatusCode.NOT_FOUND, "SCHEDULE_UNKNOWN", {}, ["ResourceInfo"]),
    ),
    (
        errors.ScheduleExists("daily"),
        *(StatusCode.ALREADY_EXISTS, "SCHEDULE_EXISTS", {"schedule_id": "daily"}, []),
    ),
    (errors.EtagMismatch("daily"), StatusCode.ABORTED, "ETAG_MISMATCH", {}, []),
    (errors.ResumeTokenExpired("old"), StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED", {}, []),
    (
        errors.SequenceOutOfRange(9, 1, 3),
        *(StatusCode.OUT_OF_RANGE, "SEQUENCE_OUT_OF_RANGE"),
        *({"oldest_sequence": "1", "last_sequence": "3"}, []),
    ),
    (errors.WatcherTooSlow(), StatusCode.ABORTED, "WATCHER_TOO_SLOW", {}, []),
    (
        errors.LimitReached("full"),
        *(StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", {}, ["RetryInfo"]),
    ),
    (
        errors.DatabaseUnavailable(),
        *(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE", {}, ["RetryInfo"]),
    ),
    (CommitUnknown(), StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE", {}, ["RetryInfo"]),
    (errors.Draining(), StatusCode.UNAVAILABLE, "DRAINING", {}, ["RetryInfo"]),
    (errors.StreamExpired(), StatusCode.UNAVAILABLE, "STREAM_EXPIRED", {}, ["RetryInfo"]),
]

# What no caller is ever told: if it gets so far, it is our bug.
INTERNAL = {
    errors.Unavailable,  # only ever as one of its kinds
    errors.CannotStart,
    errors.SchemaMismatch,
    errors.DatabaseUnfit,
    errors.RegistryChanged,
    topology.BrokerUnavailable,
    topology.BrokerBlocked,
    topology.QueuesTaken,
}


def details(answer: Answer) -> dict[str, object]:
    _, found = read_status(bytes(dict(answer.trailers)[status.DETAILS_KEY]))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("error", "code", "reason", "metadata", "further"), TOLD, ids=lambda value: type(value).__name__
)
def test_what_is_told(
    error: errors.JobsvcError,
    code: StatusCode,
    reason: str,
    metadata: dict[str, str],
    further: list[str],
) -> None:
    answer = status.answer(error)
    assert (answer.code, answer.reason, answer.error_id) == (code, reason, "")
    assert answer.message == str(error)
    found = details(answer)
    expected = {"reason": reason, "domain": "jobsvc"} | ({"metadata": metadata} if metadata else {})
    assert found.pop("ErrorInfo") == expected
    assert list(found) == further
    pushback = dict(answer.trailers).get("grpc-retry-pushback-ms")
    assert pushback == ("1000" if "RetryInfo" in further else None)


def every_error(root: type[Any] = errors.JobsvcError) -> set[type[Any]]:
    """The whole tree below `root`, wherever in the service it is defined."""
    found: set[type[Any]] = set()
    for kind in root.__subclasses__():
        found |= {kind} | every_error(kind)
    return found


def test_every_error_is_in_the_table_or_known_to_be_told_to_nobody() -> None:
    ours = {kind for kind in every_error() if kind.__module__.startswith("jobsvc.")}
    assert ours == {type(error) for error, *_ in TOLD} | INTERNAL


@pytest.mark.parametrize("kind", [*sorted(INTERNAL, key=str), RuntimeError, SystemExit])
def test_what_is_told_to_nobody(kind: type[BaseException]) -> None:
    error = topology.QueuesTaken({}, "hunter2") if kind is topology.QueuesTaken else kind("hunter2")
    answer = status.answer(error)
    assert (answer.code, answer.reason) == (StatusCode.INTERNAL, "INTERNAL")
    assert answer.error_id in answer.message
    assert details(answer) == {
        "ErrorInfo": {
            "reason": "INTERNAL",
            "domain": "jobsvc",
            "metadata": {"error_id": answer.error_id},
        }
    }
    assert "hunter2" not in str(answer)
    assert status.answer(error).error_id != answer.error_id


def test_a_bad_request_names_every_field() -> None:
    violations = [Violation(f"requests[{n}].queue", "must match something") for n in range(50)]
    found = details(status.answer(errors.InvalidRequest(violations)))
    assert found["BadRequest"] == {
        "fieldViolations": [{"field": v.field, "description": v.description} for v in violations]
    }


@pytest.mark.parametrize("violation", [Violation("f", "d"), Violation("ü" * 400, "😀" * 400)])
def test_an_answer_fits_into_the_trailers(violation: Violation) -> None:
    answer = status.answer(errors.InvalidRequest([violation] * 1_000))
    assert answer.message.isascii()
    # On the wire binary values take a third more, and each entry has an overhead of 32 bytes.
    size = len(answer.message) + sum(
        len(key) + len(value) * 4 // 3 + 32 for key, value in answer.trailers
    )
    assert size < TRAILERS_BYTES_MAX
    found = details(answer)
    assert found["BadRequest"]["fieldViolations"]  # type: ignore[index]


def test_why_the_database_is_away_is_told_to_no_caller() -> None:
    """It names hosts, roles and tables."""
    answer = status.answer(errors.DatabaseUnavailable("hunter2"))
    assert answer.message == "the database is out of reach; try again"
    assert not any("hunter2" in str(value) for _, value in answer.trailers)
