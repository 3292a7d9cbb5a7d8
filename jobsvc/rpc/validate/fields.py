"""Rules of single fields, shared by the requests that have them.

Spans and times are compared as whole nanoseconds, so that a bound is exact. A description never
repeats a value that was sent: it may be secret, and it goes into logs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_pb2
from jobsvc.errors import InvalidRequest, Violation

T = TypeVar("T")
Violations = list[Violation]

LABELS_MAX = 32
KEY_CHARACTERS_MAX = 255

SECOND = 1_000_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
SPAN_MAX = 366 * DAY

_job_id = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_job_type = re.compile(r"[a-z][a-z0-9_.-]{0,99}").fullmatch
_queue = re.compile(r"[a-z][a-z0-9_.-]{0,49}").fullmatch
_schedule_id = re.compile(r"[a-z][a-z0-9-]{0,62}").fullmatch
_label = re.compile(r"[a-z][a-z0-9_.-]{0,62}").fullmatch
_control = re.compile(r"[\x00-\x1f\x7f-\x9f]").search


_STATES = frozenset(job_pb2.JobState.values()) - {job_pb2.JOB_STATE_UNSPECIFIED}
_FILTER_TIMES = (
    "create_time_after",
    "create_time_before",
    "finish_time_after",
    "finish_time_before",
)
FILTER_VALUES_MAX = 100
MASK_PATHS_MAX = 100
# Of one request: an answer has room for some kilobytes, so that more are of use to nobody. Without
# a limit a request could be made to cost hundreds of times its own size.
VIOLATIONS_MAX = 100


class Page(Protocol):
    """A request for one page of a list."""

    @property
    def page_size(self) -> int: ...


def check(violations: Violations) -> None:
    """Raises InvalidRequest if there are any."""
    if violations:
        raise InvalidRequest(violations[:VIOLATIONS_MAX])


def job_id(job_id: str) -> Violations:
    if _job_id(job_id):
        return []
    return [Violation("job_id", "must be a UUID in canonical form, lower case")]


def job_type(name: str, path: str) -> Violations:
    return _pattern(name, path, _job_type, "[a-z][a-z0-9_.-]{0,99}")


def queue(name: str, path: str) -> Violations:
    return _pattern(name, path, _queue, "[a-z][a-z0-9_.-]{0,49}")


def schedule_id(name: str, path: str = "schedule_id") -> Violations:
    return _pattern(name, path, _schedule_id, "[a-z][a-z0-9-]{0,62}")


def _pattern(name: str, path: str, matches: Callable[[str], object], pattern: str) -> Violations:
    if not name:
        return [Violation(path, "is required")]
    return [] if matches(name) else [Violation(path, f"must match {pattern}")]


def not_negative(path: str, number: int) -> Violations:
    return [Violation(path, "must not be negative")] if number < 0 else []


def page(request: Page) -> Violations:
    return not_negative("page_size", request.page_size)


def key(key: str, path: str) -> Violations:
    return text(key, path, KEY_CHARACTERS_MAX) if key else [Violation(path, "is required")]


def known(value: int, path: str, known: Collection[int]) -> Violations:
    """Of an enum; one that a newer client knows is refused too."""
    return [] if value in known else [Violation(path, "is no value that this service knows")]


def at_most(values: Sized, path: str, count_max: int) -> Violations:
    """Of a repeated field. Where it breaks this rule, nothing is to be done with its elements."""
    if len(values) <= count_max:
        return []
    return [Violation(path, f"must have at most {count_max} entries")]


def mask(mask: FieldMask, path: str, known: frozenset[str]) -> Violations:
    if found := at_most(mask.paths, path, MASK_PATHS_MAX):
        return found
    names = ", ".join(sorted(known))
    if not mask.paths:
        return [Violation(path, f"must name what to change: {names}")]
    if not known.issuperset(mask.paths):
        return [Violation(path, f"may name nothing but {names}")]
    return []


def text(text: str, path: str, characters_max: int) -> Violations:
    if len(text) > characters_max:
        return [Violation(path, f"must have at most {characters_max:,} characters")]
    # Most text is printable in Python's narrower sense, which is checked at a tenth of the cost.
    if not text.isprintable() and _control(text):
        return [Violation(path, "must not have control characters")]
    return []


def labels(labels: Mapping[str, str], path: str) -> Violations:
    if found := at_most(labels, path, LABELS_MAX):
        return found
    for key, value in labels.items():
        place = f"{path}[{quoted(key)}]"
        if not _label(key):
            found.append(Violation(place, "its key must match [a-z][a-z0-9_.-]{0,62}"))
        found += text(value, place, KEY_CHARACTERS_MAX)
    return found


def span(message: Message, field: str, prefix: str, low: int, high: int, what: str) -> Violations:
    """Checks the Duration `field`, where it is set, against bounds in nanoseconds. `prefix`: goes
    before its path."""
    if not message.HasField(field):
        return []
    nanoseconds = nanoseconds_of(getattr(message, field))
    if nanoseconds is None:
        return [Violation(f"{prefix}{field}", "is not a valid Duration")]
    if not low <= nanoseconds <= high:
        return [Violation(f"{prefix}{field}", f"must be {what}")]
    return []


def nanoseconds_of(span: Duration) -> int | None:
    """None for what is no Duration: out of its range, or seconds and nanos of unequal sign."""
    seconds, nanos = span.seconds, span.nanos
    if abs(seconds) > 315_576_000_000 or abs(nanos) >= SECOND or seconds * nanos < 0:
        return None
    return seconds * SECOND + nanos


def _is_timestamp(moment: Timestamp) -> bool:
    return -62_135_596_800 <= moment.seconds <= 253_402_300_799 and 0 <= moment.nanos < SECOND


def moment(moment: Timestamp, path: str, now: int) -> Violations:
    if not _is_timestamp(moment):
        return [Violation(path, "is not a valid Timestamp")]
    if moment.seconds * SECOND + moment.nanos > now + SPAN_MAX:
        return [Violation(path, "must be at most 366 days ahead")]
    return []


def quoted(key: str) -> str:
    """Plain ASCII, and cut."""
    return json.dumps(key if len(key) <= 64 else f"{key[:63]}…")


def job_filter(message: job_pb2.JobFilter, path: str = "filter") -> Violations:
    found = _each(
        message.states, f"{path}.states", lambda state, place: known(state, place, _STATES)
    )
    found += _each(message.job_types, f"{path}.job_types", job_type)
    if message.queue:
        found += queue(message.queue, f"{path}.queue")
    found += labels(message.labels, f"{path}.labels")
    found += _each(message.error_types, f"{path}.error_types", key)
    found += text(message.idempotency_key, f"{path}.idempotency_key", KEY_CHARACTERS_MAX)
    for name in _FILTER_TIMES:
        if not _is_timestamp(getattr(message, name)):
            found.append(Violation(f"{path}.{name}", "is not a valid Timestamp"))
    return found


def _each(values: Sequence[T], path: str, rule: Callable[[T, str], Violations]) -> Violations:
    """Of a filter's repeated field."""
    if found := at_most(values, path, FILTER_VALUES_MAX):
        return found
    for index, value in enumerate(values):
        found += rule(value, f"{path}[{index}]")
    return found
