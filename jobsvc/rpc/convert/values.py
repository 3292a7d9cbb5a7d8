"""Times and spans: protobuf's to Python's and back."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import overload

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NANOSECONDS = 1_000_000_000


def seconds(span: Duration) -> float:
    return span.seconds + span.nanos / NANOSECONDS


def to_datetime(moment: Timestamp) -> datetime:
    """Cut to the microsecond."""
    return EPOCH + timedelta(seconds=moment.seconds, microseconds=moment.nanos // 1_000)


@functools.lru_cache(maxsize=256)
def duration(seconds: float) -> Duration:
    whole, nanos = divmod(round(seconds * NANOSECONDS), NANOSECONDS)
    return Duration(seconds=whole, nanos=nanos)


def put_timestamp(message: Timestamp, moment: datetime) -> None:
    since = moment - EPOCH
    message.seconds = since.days * 86_400 + since.seconds
    message.nanos = since.microseconds * 1_000


@overload
def timestamp(moment: datetime) -> Timestamp: ...
@overload
def timestamp(moment: None) -> None: ...
def timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    message = Timestamp()
    put_timestamp(message, moment)
    return message
