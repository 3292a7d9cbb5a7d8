"""One attempt to run a job: what a worker claims, what a handler tells, and how it can end.

Shared by the store, the worker and its child processes: plain values of the standard library alone.
Every text that a handler can influence is cleaned and cut here (`clean_text`, `clean_error`), so
that whatever a handler raises or logs can be stored, sent and printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

ERROR_TYPE_BYTES_MAX: Final = 200
ERROR_MESSAGE_BYTES_MAX: Final = 4 * 1024
TRACEBACK_BYTES_MAX: Final = 32 * 1024
LOG_ENTRY_BYTES_MAX: Final = 16 * 1024
OUTPUT_CHUNK_BYTES_MAX: Final = 64 * 1024
PROGRESS_MESSAGE_BYTES_MAX: Final = 1024

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")

# Types of JobError that are no exception's name.
TIMEOUT: Final = "TIMEOUT"
WORKER_LOST: Final = "WORKER_LOST"
INVALID_PAYLOAD: Final = "INVALID_PAYLOAD"
RESULT_INVALID: Final = "RESULT_INVALID"
RESULT_TOO_LARGE: Final = "RESULT_TOO_LARGE"

BLOB_CONTENT_TYPE: Final = "application/octet-stream"

# Control characters but tab and newline, and the halves of surrogate pairs, which no UTF-8 has.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean_text(text: str, bytes_max: int, *, keep_end: bool = False) -> str:
    """`text` without what cannot be stored or printed, cut to `bytes_max` bytes of UTF-8.

    The beginning is kept, or the end with `keep_end`. Cuts fall between characters.
    """
    # A character has one byte at least, so this drops nothing that the exact cut would keep, and
    # spares a text of many megabytes the work below.
    text = text[-bytes_max:] if keep_end else text[:bytes_max]
    text = _UNPRINTABLE.sub(_REPLACEMENT, text.replace("\r\n", "\n"))
    encoded = text.encode()
    if len(encoded) <= bytes_max:
        return text
    encoded = encoded[-bytes_max:] if keep_end else encoded[:bytes_max]
    return encoded.decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class Input:
    """What a handler is given, or answers: with `content_type` None the wire form of a
    google.protobuf.Struct (payload) or Value (result), else a blob of that type."""

    data: bytes = b""
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """Why an attempt, or a job, did not succeed. `type` is an exception's class name or one of
    TIMEOUT, WORKER_LOST, CANCELLED, EXPIRED, INVALID_PAYLOAD, RESULT_INVALID, RESULT_TOO_LARGE."""

    type: str
    message: str = ""
    traceback: str = ""
    retryable: bool = False


def clean_error(
    type: str,  # noqa: A002 - the field's name
    message: str,
    traceback: str = "",
    retryable: bool = True,
) -> JobError:
    """The error of an attempt, its texts cleaned and cut; of a long traceback the end is kept,
    which is where the exception was raised."""
    return JobError(
        clean_text(type, ERROR_TYPE_BYTES_MAX),
        clean_text(message, ERROR_MESSAGE_BYTES_MAX),
        clean_text(traceback, TRACEBACK_BYTES_MAX, keep_end=True),
        retryable,
    )


@dataclass(frozen=True, slots=True)
class JobTypeInfo:
    """What workers announced of a job type; None leaves the service's own default."""

    name: str
    description: str = ""
    payload_schema: str | None = None  # JSON Schema as JSON text
    queue: str | None = None
    max_attempts: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that a worker holds under a lease. `token` is the fence: no write without it.
    `waited`: seconds since it became QUEUED."""

    job_id: str
    token: str
    job_type: str
    queue: str
    attempt: int
    input: Input
    timeout: float
    trace_id: str = ""
    span_id: str = ""
    waited: float = 0.0

    @property
    def key(self) -> AttemptKey:
        """Unique to the attempt; a lease token is shared by all jobs of one claim."""
        return self.token, self.job_id


AttemptKey = tuple[str, str]


# What an attempt tells on its way.


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the handler is; `total` is 0 where it is not known."""

    current: float
    total: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    level: str  # one of LOG_LEVELS
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """One chunk: either text or data."""

    text: str | None = None
    data: bytes | None = None

    @property
    def size(self) -> int:
        return len(self.data) if self.data is not None else len((self.text or "").encode())


Report = Progress | Log | Output


# How it ends.


@dataclass(frozen=True, slots=True)
class Succeeded:
    result: Input


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """`retry_after`: seconds that the handler asked for in place of the policy's backoff.
    `crashed`: the attempt took its process with it, and not by our hand."""

    error: JobError
    retry_after: float | None = None
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Given up without a verdict: shut down, abandoned, or never started. No attempt of the budget
    is used up."""


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The handler asked to be run again after so many seconds; this uses up no attempt."""

    after: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """Its cancel was requested and the handler runs no more."""


Ending = Succeeded | AttemptFailed | Interrupted | Snoozed | Stopped
