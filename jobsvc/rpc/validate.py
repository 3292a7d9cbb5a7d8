"""The rules of the requests. Pure: a function a request, which answers every violation at once.

Spans and times are compared as whole nanoseconds, so that a bound is exact. A description never
repeats a value that was sent: it may be secret, and it goes into logs.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.model import JobTypeInfo, RetryPolicy
from jobsvc.errors import FeatureUnimplemented, InvalidRequest, Violation
from jobsvc.telemetry import get_logger

log = get_logger(__name__)

Types = Mapping[str, JobTypeInfo]
Violations = list[Violation]

MIB = 1024 * 1024
MESSAGE_BYTES_MAX = 4 * MIB
PAYLOAD_BYTES_MAX = MIB
PAYLOAD_VALUES_MAX = 100_000
PAYLOAD_DEPTH_MAX = 32
REQUESTS_MAX = 1_000
LABELS_MAX = 32
KEY_CHARACTERS_MAX = 255
REASON_CHARACTERS_MAX = 1_000
# More are of use to nobody: an answer has room for some kilobytes. Without these limits a request
# could be made to cost hundreds of times its own size.
PAYLOAD_VIOLATIONS_MAX = 100
VIOLATIONS_MAX = 1_000
PATH_CHARACTERS_MAX = 300

SECOND = 1_000_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
SPAN_MAX = 366 * DAY
INTEGER_MAX = 2.0**53
DEFAULT_POLICY = RetryPolicy()

_job_id = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_job_type = re.compile(r"[a-z][a-z0-9_.-]{0,99}").fullmatch
_queue = re.compile(r"[a-z][a-z0-9_.-]{0,49}").fullmatch
_label = re.compile(r"[a-z][a-z0-9_.-]{0,62}").fullmatch
_plain_member = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch
_control = re.compile(r"[\x00-\x1f\x7f-\x9f]").search


def check(violations: Violations) -> None:
    """Raises InvalidRequest if there are any."""
    if violations:
        raise InvalidRequest(violations)


def submit_job(
    request: job_service_pb2.SubmitJobRequest, types: Types, now: int, prefix: str = ""
) -> Violations:
    """`now`: nanoseconds since 1970. `prefix`: goes before every path, such as
    `requests[3].`. Raises FeatureUnimplemented."""
    for feature in ("unique", "concurrency"):
        if request.HasField(feature):
            raise FeatureUnimplemented(f"{prefix}{feature}")
    found: Violations = []
    if not request.job_type:
        found.append(Violation(f"{prefix}job_type", "is required"))
    elif not _job_type(request.job_type):
        found.append(Violation(f"{prefix}job_type", "must match [a-z][a-z0-9_.-]{0,99}"))
    if request.queue and not _queue(request.queue):
        found.append(Violation(f"{prefix}queue", "must match [a-z][a-z0-9_.-]{0,49}"))
    if not 0 <= request.priority <= 9:
        found.append(Violation(f"{prefix}priority", "must be 0 to 9"))
    if not 0 <= request.max_attempts <= 100:
        found.append(Violation(f"{prefix}max_attempts", "must be 1 to 100, or 0 for the default"))
    if request.idempotency_key:
        path = f"{prefix}idempotency_key"
        found += _text(request.idempotency_key, path, KEY_CHARACTERS_MAX)
    if request.labels:
        found += _labels(request.labels, f"{prefix}labels")
    found += _times(request, prefix, now)
    found += _spans(request, prefix)
    found += _input(request, types.get(request.job_type), prefix)
    return found


def submit_jobs(request: job_service_pb2.SubmitJobsRequest, types: Types, now: int) -> Violations:
    """Raises FeatureUnimplemented."""
    if not 1 <= len(request.requests) <= REQUESTS_MAX:
        return [Violation("requests", "must hold 1 to 1,000 requests")]
    if request.ByteSize() > MESSAGE_BYTES_MAX:
        return [Violation("requests", "must be at most 4 MiB in one message")]
    found: Violations = []
    for index, each in enumerate(request.requests):
        found += submit_job(each, types, now, f"requests[{index}].")
        if len(found) >= VIOLATIONS_MAX:
            break
    return found


def run_job(request: job_service_pb2.RunJobRequest, types: Types, now: int) -> Violations:
    """Raises FeatureUnimplemented."""
    found = submit_job(request.request, types, now, "request.")
    if request.request.validate_only:
        found.append(Violation("request.validate_only", "is not allowed in RunJob"))
    return found + _heartbeat_interval(request)


def get_job(request: job_service_pb2.GetJobRequest) -> Violations:
    return _id(request.job_id)


def get_result(request: job_service_pb2.GetResultRequest) -> Violations:
    return _id(request.job_id) + _span(request, "wait", "", 0, 50 * SECOND, "0 to 50 s")


def watch_job(request: job_service_pb2.WatchJobRequest) -> Violations:
    return (
        _id(request.job_id)
        + _not_negative("after_sequence", request.after_sequence)
        + _heartbeat_interval(request)
    )


def list_job_events(request: job_service_pb2.ListJobEventsRequest) -> Violations:
    return (
        _id(request.job_id)
        + _not_negative("after_sequence", request.after_sequence)
        + _not_negative("page_size", request.page_size)
    )


def cancel_job(request: job_service_pb2.CancelJobRequest) -> Violations:
    return _id(request.job_id) + _text(request.reason, "reason", REASON_CHARACTERS_MAX)


def _id(job_id: str) -> Violations:
    if _job_id(job_id):
        return []
    return [Violation("job_id", "must be a UUID in canonical form, lower case")]


def _not_negative(path: str, number: int) -> Violations:
    return [Violation(path, "must not be negative")] if number < 0 else []


def _text(text: str, path: str, characters_max: int) -> Violations:
    found: Violations = []
    if len(text) > characters_max:
        found.append(Violation(path, f"must have at most {characters_max:,} characters"))
    # Most text is printable in Python's narrower sense, which is checked at a tenth of the cost.
    if not text.isprintable() and _control(text):
        found.append(Violation(path, "must not have control characters"))
    return found


def _labels(labels: Mapping[str, str], path: str) -> Violations:
    if len(labels) > LABELS_MAX:
        return [Violation(path, "must have at most 32 entries")]
    found: Violations = []
    for key, value in labels.items():
        place = f"{path}[{_quoted(key)}]"
        if not _label(key):
            found.append(Violation(place, "its key must match [a-z][a-z0-9_.-]{0,62}"))
        found += _text(value, place, KEY_CHARACTERS_MAX)
    return found


# Times and spans.


def _times(request: job_service_pb2.SubmitJobRequest, prefix: str, now: int) -> Violations:
    found: Violations = []
    match request.WhichOneof("when"):
        case "schedule_time":
            found += _moment(request.schedule_time, f"{prefix}schedule_time", now)
        case "delay":
            found += _span(request, "delay", prefix, 0, SPAN_MAX, "0 to 366 days")
    match request.WhichOneof("expiration"):
        case "expire_time":
            found += _moment(request.expire_time, f"{prefix}expire_time", now)
        case "ttl":
            found += _span(request, "ttl", prefix, 1, SPAN_MAX, "above 0, at most 366 days")
    return found


def _spans(request: job_service_pb2.SubmitJobRequest, prefix: str) -> Violations:
    found = _span(request, "timeout", prefix, SECOND, DAY, "1 s to 24 h")
    found += _span(request, "retention", prefix, HOUR, SPAN_MAX, "1 h to 366 days")
    if request.HasField("retry_policy"):
        found += _retry_policy(request.retry_policy, f"{prefix}retry_policy.")
    return found


def _retry_policy(policy: job_pb2.RetryPolicy, prefix: str) -> Violations:
    found = _span(policy, "initial_backoff", prefix, 0, DAY, "0 to 24 h")
    # A bad initial_backoff is told of by itself and bounds nothing.
    shortest = 0
    if not found:
        sent = policy.HasField("initial_backoff")
        shortest = (
            _nanoseconds(policy.initial_backoff) or 0
            if sent
            else round(DEFAULT_POLICY.initial_backoff * SECOND)
        )
    what = "initial_backoff (10 s by default) to 24 h"
    found += _span(policy, "max_backoff", prefix, shortest, DAY, what)
    # Written so that a NaN is refused.
    if policy.HasField("backoff_multiplier") and not 1 <= policy.backoff_multiplier <= 10:
        found.append(Violation(f"{prefix}backoff_multiplier", "must be 1 to 10"))
    if policy.HasField("jitter") and not 0 <= policy.jitter <= 1:
        found.append(Violation(f"{prefix}jitter", "must be 0 to 1"))
    return found


def _heartbeat_interval(
    request: job_service_pb2.WatchJobRequest | job_service_pb2.RunJobRequest,
) -> Violations:
    return _span(request, "heartbeat_interval", "", SECOND, 50 * SECOND, "1 to 50 s")


def _span(message: Message, field: str, prefix: str, low: int, high: int, what: str) -> Violations:
    """Checks the Duration `field`, where it is set, against bounds in nanoseconds."""
    if not message.HasField(field):
        return []
    nanoseconds = _nanoseconds(getattr(message, field))
    if nanoseconds is None:
        return [Violation(f"{prefix}{field}", "is not a valid Duration")]
    if not low <= nanoseconds <= high:
        return [Violation(f"{prefix}{field}", f"must be {what}")]
    return []


def _nanoseconds(span: Duration) -> int | None:
    """None for what is no Duration: out of its range, or seconds and nanos of unequal sign."""
    seconds, nanos = span.seconds, span.nanos
    if abs(seconds) > 315_576_000_000 or abs(nanos) >= SECOND or seconds * nanos < 0:
        return None
    return seconds * SECOND + nanos


def _moment(moment: Timestamp, path: str, now: int) -> Violations:
    if not (-62_135_596_800 <= moment.seconds <= 253_402_300_799 and 0 <= moment.nanos < SECOND):
        return [Violation(path, "is not a valid Timestamp")]
    if moment.seconds * SECOND + moment.nanos > now + SPAN_MAX:
        return [Violation(path, "must be at most 366 days ahead")]
    return []


# Payloads.


def _input(
    request: job_service_pb2.SubmitJobRequest, info: JobTypeInfo | None, prefix: str
) -> Violations:
    schema = _validator(info.payload_schema) if info and info.payload_schema else None
    if request.WhichOneof("input") == "payload_blob":
        found = _blob(request.payload_blob, f"{prefix}payload_blob")
        if schema:
            found.append(Violation(f"{prefix}payload_blob", "this job type takes a JSON payload"))
        return found
    # An unset payload is the empty object, which a schema can refuse too.
    found = _payload(request.payload, f"{prefix}payload")
    if found or not schema:
        return found
    return _schema(request.payload, schema, f"{prefix}payload")


def _blob(blob: job_pb2.Blob, path: str) -> Violations:
    found = _text(blob.content_type, f"{path}.content_type", KEY_CHARACTERS_MAX)
    if len(blob.data) > PAYLOAD_BYTES_MAX:
        found.append(Violation(f"{path}.data", "must be at most 1 MiB"))
    return found


def _payload(payload: Struct, path: str) -> Violations:
    """Iterative: protobuf's own limit on depth does not hold everywhere, and Python's is ours."""
    if payload.ByteSize() > PAYLOAD_BYTES_MAX:
        return [Violation(path, "must be at most 1 MiB as an encoded Struct")]
    found: Violations = []
    count = 0
    containers: list[tuple[Struct | ListValue, str, int]] = [(payload, path, 1)]
    while containers and len(found) < PAYLOAD_VIOLATIONS_MAX:
        container, place, depth = containers.pop()
        if depth > PAYLOAD_DEPTH_MAX:
            found.append(Violation(place, f"must be at most {PAYLOAD_DEPTH_MAX} levels deep"))
            continue
        for key, value in _members(container):
            count += 1
            if count > PAYLOAD_VALUES_MAX:
                return [Violation(path, f"must hold at most {PAYLOAD_VALUES_MAX:,} values")]
            match value.WhichOneof("kind"):
                case "struct_value":
                    containers.append((value.struct_value, _member(place, key), depth + 1))
                case "list_value":
                    containers.append((value.list_value, _member(place, key), depth + 1))
                case kind:
                    if (flaw := _flaw(kind, value)) and len(found) < PAYLOAD_VIOLATIONS_MAX:
                        found.append(Violation(_member(place, key), flaw))
            if isinstance(key, str) and "\0" in key:
                found.append(Violation(place, "must not have NUL in a key"))
    return found


def _members(container: Struct | ListValue) -> Any:
    """Pairs of a key or an index, and a Value."""
    if isinstance(container, Struct):
        return container.fields.items()
    return enumerate(container.values)


def _flaw(kind: str | None, value: Value) -> str:
    """What is wrong with a Value that holds no others; empty if nothing is."""
    if kind == "string_value":
        return "must not have NUL" if "\0" in value.string_value else ""
    if kind == "number_value":
        return "" if math.isfinite(value.number_value) else "must be a finite number"
    return "" if kind else "must have a kind"


def _member(path: str, key: str | int) -> str:
    if len(path) > PATH_CHARACTERS_MAX:
        return path
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if _plain_member(key) else f"{path}[{_quoted(key)}]"


def _quoted(key: str) -> str:
    """Plain ASCII, and cut."""
    return json.dumps(key if len(key) <= 64 else f"{key[:63]}…")


# Schemas.


@functools.lru_cache(maxsize=1_024)
def _validator(schema: str) -> jsonschema_rs.Validator | None:
    """Compiled once for each text. What a worker announced and is no schema checks nothing here:
    the worker checks each payload again."""
    try:
        return jsonschema_rs.validator_for(json.loads(schema), mask="value", offline=True)
    except ValueError as error:
        log.warning("payload schema unusable", error=str(error)[:500])
        return None


def _schema(payload: Struct, schema: jsonschema_rs.Validator, path: str) -> Violations:
    value = {key: _python(each) for key, each in payload.fields.items()}
    if schema.is_valid(value):
        return []
    found: Violations = []
    for error in schema.iter_errors(value):
        found += _schema_violations(error, functools.reduce(_member, error.instance_path, path))
        if len(found) >= PAYLOAD_VIOLATIONS_MAX:
            break
    return found


def _schema_violations(error: jsonschema_rs.ValidationError, place: str) -> Violations:
    """Names the member that is missing or too much, rather than the object around it."""
    kind: Any = error.kind
    match kind.name:
        case "required":
            return [Violation(_member(place, kind.property), "is required")]
        case "additionalProperties":
            return [Violation(_member(place, each), "is not known") for each in kind.unexpected]
    return [Violation(place, error.message)]


def _python(value: Value) -> Any:
    """The JSON value; recursion is safe, the depth was checked. Whole numbers become int."""
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            whole = number.is_integer() and abs(number) <= INTEGER_MAX
            return int(number) if whole else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _python(each) for key, each in value.struct_value.fields.items()}
        case "list_value":
            return [_python(each) for each in value.list_value.values]
    return None
