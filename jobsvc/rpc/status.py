"""The one table from what the service decides to what a caller sees: a google.rpc.Status.

Every status has exactly one ErrorInfo. The trailers of a call have room for 8 KiB in many clients,
so that messages and lists of violations are cut to fit.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from jobsvc import errors

DOMAIN = "jobsvc"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MESSAGE_CHARACTERS_MAX = 600
VIOLATIONS_BYTES_MAX = 4_000
DESCRIPTION_CHARACTERS_MAX = 300

# A class that is not here is answered as the one that it derives from.
TABLE: dict[type, tuple[StatusCode, str]] = {
    errors.InvalidRequest: (StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    errors.Undecodable: (StatusCode.INVALID_ARGUMENT, "UNDECODABLE"),
    errors.Unauthenticated: (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.ScopeMissing: (StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"),
    errors.ServiceUnknown: (StatusCode.NOT_FOUND, "SERVICE_UNKNOWN"),
    errors.JobUnknown: (StatusCode.NOT_FOUND, "JOB_UNKNOWN"),
    errors.JobStateForbids: (StatusCode.FAILED_PRECONDITION, "JOB_STATE"),
    errors.IdempotencyKeyReused: (StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"),
    errors.UniqueConflict: (StatusCode.ALREADY_EXISTS, "UNIQUE_CONFLICT"),
    errors.ScheduleUnknown: (StatusCode.NOT_FOUND, "SCHEDULE_UNKNOWN"),
    errors.ScheduleExists: (StatusCode.ALREADY_EXISTS, "SCHEDULE_EXISTS"),
    errors.EtagMismatch: (StatusCode.ABORTED, "ETAG_MISMATCH"),
    errors.ResumeTokenExpired: (StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED"),
    errors.SequenceOutOfRange: (StatusCode.OUT_OF_RANGE, "SEQUENCE_OUT_OF_RANGE"),
    errors.WatcherTooSlow: (StatusCode.ABORTED, "WATCHER_TOO_SLOW"),
    errors.LimitReached: (StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED"),
    errors.DatabaseUnavailable: (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
    errors.Draining: (StatusCode.UNAVAILABLE, "DRAINING"),
    errors.StreamExpired: (StatusCode.UNAVAILABLE, "STREAM_EXPIRED"),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ends. `error_id` is set only where the fault is ours: it is what the caller is
    told, to be found in the log."""

    code: StatusCode
    reason: str
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]
    error_id: str = ""


def answer(error: BaseException) -> Answer:
    """Nothing of an error that is not in the table is told to the caller."""
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    if row is None:
        error_id = secrets.token_hex(8)
        message = f"internal error; the server's log tells of it under the id {error_id}"
        metadata = {"error_id": error_id}
        return _answer(StatusCode.INTERNAL, "INTERNAL", message, metadata, (), error_id)
    code, reason = row
    return _answer(code, reason, _message(error), _metadata(error), _details(error))


def _answer(
    code: StatusCode,
    reason: str,
    message: str,
    metadata: dict[str, str],
    details: Iterator[Message] | tuple[Message, ...],
    error_id: str = "",
) -> Answer:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    status = status_pb2.Status(code=code.value[0], message=message)
    trailers: list[tuple[str, str | bytes]] = []
    for detail in (info, *details):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
        if isinstance(detail, error_details_pb2.RetryInfo):
            trailers.append((PUSHBACK_KEY, str(detail.retry_delay.ToMilliseconds())))
    trailers.append((DETAILS_KEY, status.SerializeToString()))
    return Answer(code, reason, message, tuple(trailers), error_id)


def _message(error: BaseException) -> str:
    """ASCII, as on the wire each other byte takes three."""
    text = str(error).encode("ascii", "backslashreplace").decode()
    if len(text) <= MESSAGE_CHARACTERS_MAX:
        return text
    return f"{text[: MESSAGE_CHARACTERS_MAX - 3]}..."


def _metadata(error: BaseException) -> dict[str, str]:
    match error:
        case errors.JobStateForbids():
            return {"job_id": error.job_id, "state": f"JOB_STATE_{error.state}"}
        case errors.IdempotencyKeyReused(index=None) | errors.UniqueConflict(index=None):
            return {"job_id": error.job_id}
        case errors.ScheduleExists():
            return {"schedule_id": error.schedule_id}
        case errors.IdempotencyKeyReused() | errors.UniqueConflict():
            return {"job_id": error.job_id, "index": str(error.index)}
        case errors.SequenceOutOfRange():
            return {"oldest_sequence": str(error.oldest), "last_sequence": str(error.last)}
    return {}


def _details(error: BaseException) -> Iterator[Message]:
    match error:
        case errors.InvalidRequest():
            yield _bad_request(error.violations)
        case errors.JobUnknown():
            yield error_details_pb2.ResourceInfo(
                resource_type="jobsvc.v1.Job",
                resource_name=error.job_id,
                description=_message(error),
            )
        case errors.ScheduleUnknown():
            yield error_details_pb2.ResourceInfo(
                resource_type="jobsvc.v1.Schedule",
                resource_name=error.schedule_id,
                description=_message(error),
            )
        case errors.LimitReached() | errors.Unavailable():
            delay = Duration()
            delay.FromMilliseconds(round(error.retry_seconds * 1_000))
            yield error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(violations: list[errors.Violation]) -> error_details_pb2.BadRequest:
    """As many as there is room for, and at least one."""
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        bad.field_violations.add(
            field=violation.field[:DESCRIPTION_CHARACTERS_MAX],
            description=violation.description[:DESCRIPTION_CHARACTERS_MAX],
        )
        if bad.ByteSize() > VIOLATIONS_BYTES_MAX:
            del bad.field_violations[-1]
            break
    return bad
