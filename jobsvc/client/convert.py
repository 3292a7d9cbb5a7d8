"""Between Python's values and the contract's messages."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Protocol, TypedDict, Unpack

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_service_pb2 import SubmitJobRequest
from jobsvc.client.keywords import known_keywords
from jobsvc.settings import parse_span

INTEGER_MAX = 2**53
_LEVELS_MAX = 32
_SPAN_SECONDS_MAX = 315_576_000_000  # of a google.protobuf.Duration
_TERMINAL = frozenset(
    {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}
)

_BYTES = (bytes, bytearray, memoryview)


class Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


# A JSON object, or bytes. In the object, at any depth, whatever Pydantic has a JSON form for.
Payload = Mapping[str, object] | BaseModel | Dataclass | bytes | bytearray | memoryview
# Seconds, or text such as 500ms, 30s, 5m, 2h.
Span = float | timedelta | str


class JobOptions(TypedDict, total=False):
    """What a job can be submitted with; what is left out has the service's default.

    Spans are seconds, timedeltas or texts such as `5m`; times are datetimes with a time zone.
    `content_type` goes with a payload of bytes.
    """

    content_type: str
    queue: str
    priority: int
    schedule_time: datetime
    delay: Span
    expire_time: datetime
    ttl: Span
    max_attempts: int
    retry_policy: job_pb2.RetryPolicy
    timeout: Span
    idempotency_key: str
    unique: job_pb2.Unique
    concurrency: job_pb2.Concurrency
    retention: Span
    labels: Mapping[str, str]
    validate_only: bool


class JobChanges(TypedDict, total=False):
    """What can be changed of a waiting job. A `schedule_time` in the past means now; `labels` are
    all that it is to have."""

    priority: int
    schedule_time: datetime
    labels: Mapping[str, str]


class FilterOptions(TypedDict, total=False):
    """Which jobs: all that is given must match, of those with several values any. States go by
    name (`FAILED`), times are datetimes with a time zone."""

    states: Sequence[str]
    job_types: Sequence[str]
    queue: str
    labels: Mapping[str, str]
    error_types: Sequence[str]
    idempotency_key: str
    create_time_after: datetime
    create_time_before: datetime
    finish_time_after: datetime
    finish_time_before: datetime


@known_keywords
def new_job(
    job_type: str, payload: Payload | None = None, **options: Unpack[JobOptions]
) -> SubmitJobRequest:
    """A request to submit a job. Raises ValueError for a payload that JSON cannot hold exactly
    and for a time without a zone; the service checks all else.

    Models and dataclasses go as Pydantic's JSON mode has them, by alias: as they are validated at
    the other end.
    """
    request = SubmitJobRequest(
        job_type=job_type,
        queue=options.get("queue", ""),
        priority=options.get("priority", 0),
        max_attempts=options.get("max_attempts", 0),
        retry_policy=options.get("retry_policy"),
        idempotency_key=options.get("idempotency_key", ""),
        unique=options.get("unique"),
        concurrency=options.get("concurrency"),
        labels=dict(options.get("labels", {})),
        validate_only=options.get("validate_only", False),
    )
    if "content_type" in options and not isinstance(payload, _BYTES):
        raise ValueError("content_type goes with a payload of bytes")
    if isinstance(payload, _BYTES):
        request.payload_blob.data = bytes(payload)
        request.payload_blob.content_type = options.get("content_type", "application/octet-stream")
    elif payload is not None:
        request.payload.CopyFrom(to_struct(payload))
    spans = {
        "delay": options.get("delay"),
        "ttl": options.get("ttl"),
        "timeout": options.get("timeout"),
        "retention": options.get("retention"),
    }
    for name, span in spans.items():
        if span is not None:
            getattr(request, name).CopyFrom(to_duration(span))
    moments = {
        "schedule_time": options.get("schedule_time"),
        "expire_time": options.get("expire_time"),
    }
    for name, moment in moments.items():
        if moment is not None:
            getattr(request, name).CopyFrom(to_timestamp(moment))
    return request


@known_keywords
def new_filter(**wanted: Unpack[FilterOptions]) -> job_pb2.JobFilter:
    """Raises ValueError for a state that this release does not know, and for a time without a
    zone."""
    for name in ("states", "job_types", "error_types"):
        if isinstance(text := wanted.get(name), str):
            raise TypeError(f"{name} is a list, not the text {text!r}")
    message = job_pb2.JobFilter(
        states=[job_pb2.JobState.Value(f"JOB_STATE_{state}") for state in wanted.get("states", ())],
        job_types=wanted.get("job_types", ()),
        queue=wanted.get("queue", ""),
        labels=dict(wanted.get("labels", {})),
        error_types=wanted.get("error_types", ()),
        idempotency_key=wanted.get("idempotency_key", ""),
    )
    moments = {
        "create_time_after": wanted.get("create_time_after"),
        "create_time_before": wanted.get("create_time_before"),
        "finish_time_after": wanted.get("finish_time_after"),
        "finish_time_before": wanted.get("finish_time_before"),
    }
    for name, moment in moments.items():
        if moment is not None:
            getattr(message, name).CopyFrom(to_timestamp(moment))
    return message


def to_seconds(span: Span) -> float:
    """Raises ValueError for what is no span, and for one that no Duration can hold."""
    if isinstance(span, timedelta):
        seconds = span.total_seconds()
    elif isinstance(span, str):
        try:
            seconds = parse_span(span)
        except ValueError as error:
            raise ValueError(f"{span!r} is {error}") from None
    else:
        seconds = span
    if not abs(seconds) <= _SPAN_SECONDS_MAX:  # nor is NaN
        raise ValueError(f"{span!r} is no span of up to 10,000 years")
    return seconds


def to_duration(span: Span) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(to_seconds(span) * 1e9))
    return duration


def to_timestamp(moment: datetime) -> Timestamp:
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no time zone")
    timestamp = Timestamp()
    try:
        timestamp.FromDatetime(moment)
    except OverflowError:
        raise ValueError(f"{moment} leads out of the years 1 to 9999") from None
    return timestamp


def to_struct(data: object) -> Struct:
    """Raises ValueError for what a Struct cannot hold exactly."""
    value = Value()
    _fill(value, data, level=1)
    if value.WhichOneof("kind") != "struct_value":
        raise ValueError(f"a payload is a JSON object or bytes, and not {type(data).__name__}")
    return value.struct_value


def _fill(value: Value, data: object, level: int) -> None:
    if data is None:
        value.null_value = NULL_VALUE
    elif isinstance(data, bool):
        value.bool_value = data
    elif isinstance(data, int | float):
        value.number_value = _number(data)
    elif isinstance(data, str):
        value.string_value = data
    elif level > _LEVELS_MAX:
        raise ValueError(f"nested deeper than {_LEVELS_MAX} levels")
    elif isinstance(data, Mapping):
        value.struct_value.SetInParent()
        for key, item in data.items():
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is no key of a JSON object: not a string")
            _fill(value.struct_value.fields[key], item, level + 1)
    elif isinstance(data, Sequence) and not isinstance(data, _BYTES):
        value.list_value.SetInParent()
        for item in data:
            _fill(value.list_value.values.add(), item, level + 1)
    else:
        _fill(value, _dump(data), level)


def _dump(data: object) -> object:
    """What Pydantic's JSON mode makes of something that is not JSON, as of a handler's result."""
    name = type(data).__name__
    # Bytes would be text by chance at most; who iterates what has a state is to say so.
    if isinstance(data, (*_BYTES, Iterator, AsyncIterator)):
        raise ValueError(f"{name} is no JSON value")
    try:
        dumped = to_jsonable_python(data, inf_nan_mode="constants")
    except ValueError as error:
        raise ValueError(f"{name} is no JSON value: {error}") from error
    if not isinstance(dumped, (str, int, float, dict, list, type(None))):
        raise ValueError(f"{name} is no JSON value: its serializer gives none")
    return dumped


def _number(number: float) -> float:
    if isinstance(number, int) and abs(number) > INTEGER_MAX:
        raise ValueError("an integer beyond 2^53 would be rounded; send it as a string")
    if not math.isfinite(number):
        raise ValueError(f"{number} is no JSON number")
    return float(number)


def from_value(value: Value) -> object:
    """Plain Python data; whole numbers up to 2^53 are int.

    Raises ValueError for a Value that was never set, as the `result` of a job that has not ended,
    has failed, or has bytes for a result: None is what a handler has returned.
    """
    if value.WhichOneof("kind") is None:
        raise ValueError("there is no value: see the answer's `state`, `error` and `result_blob`")
    return _plain(value)


def _plain(value: Value) -> object:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _plain(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    if kind == "number_value":
        return _plain_number(value.number_value)
    if kind == "string_value":
        return value.string_value
    return value.bool_value if kind == "bool_value" else None


def to_json(message: Message, *, indent: int | None = None) -> str:
    """Proto JSON with the field names of the .proto; one line unless `indent` is given."""
    data = MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(_whole(data), ensure_ascii=False, indent=indent)


def _whole(data: Any) -> Any:
    """The data with 1 for 1.0, as it was before a double held it."""
    if isinstance(data, dict):
        return {key: _whole(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_whole(value) for value in data]
    if isinstance(data, float):
        return _plain_number(data)
    return data


def _plain_number(number: float) -> float:
    return int(number) if number.is_integer() and abs(number) <= INTEGER_MAX else number


def is_terminal(state: int) -> bool:
    return state in _TERMINAL


def state_name(state: int) -> str:
    """`SUCCEEDED` and so on; the number of one that this release does not know."""
    return _name(job_pb2.JobState.DESCRIPTOR.values_by_number, state, "JOB_STATE_")


def event_name(event_type: int) -> str:
    """`SUBMITTED` and so on; the number of one that this release does not know."""
    return _name(job_pb2.JobEventType.DESCRIPTOR.values_by_number, event_type, "JOB_EVENT_TYPE_")


def wait_reason_name(reason: int) -> str:
    """`NO_WORKER` and so on; the number of one that this release does not know."""
    return _name(job_pb2.WaitReason.DESCRIPTOR.values_by_number, reason, "WAIT_REASON_")


def log_level_name(level: int) -> str:
    """`INFO` and so on; the number of one that this release does not know."""
    return _name(job_pb2.LogLevel.DESCRIPTOR.values_by_number, level, "LOG_LEVEL_")


def _name(values: Mapping[int, object], number: int, prefix: str) -> str:
    value = values.get(number)
    return str(number) if value is None else str(getattr(value, "name", "")).removeprefix(prefix)
