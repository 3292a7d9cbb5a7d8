"""What an attempt is, how it can end, and what it can tell on its way.

Plain values, shared by the worker and its child processes; nothing here does I/O. Every text that
a handler can influence is cleaned and cut here, once, so that whatever a handler raises or logs
can be stored, sent and printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MESSAGE_BYTES_MAX: Final = 4 * 1024
TRACEBACK_BYTES_MAX: Final = 32 * 1024
LOG_BYTES_MAX: Final = 16 * 1024
OUTPUT_BYTES_MAX: Final = 64 * 1024
PROGRESS_MESSAGE_BYTES_MAX: Final = 1024
ERROR_TYPE_BYTES_MAX: Final = 200

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")

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
class ErrorInfo:
    """A job's error as clients see it; its texts are cleaned and cut on construction.

    Of a long traceback the end is kept: it is where the exception was raised.
    """

    type: str
    message: str
    traceback: str = ""
    retryable: bool = True

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "type", clean_text(self.type, ERROR_TYPE_BYTES_MAX))
        set_field(self, "message", clean_text(self.message, MESSAGE_BYTES_MAX))
        set_field(self, "traceback", clean_text(self.traceback, TRACEBACK_BYTES_MAX, keep_end=True))


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The handler returned.

    With `content_type` None, `result` is a `google.protobuf.Value` in wire form; otherwise it is
    the data of a blob of that type.
    """

    result: bytes
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed; `retry_after_seconds` overrides the retry policy's backoff if set."""

    error: ErrorInfo
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The handler asked to be run again later; this uses up no attempt of the budget."""

    after_seconds: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The attempt was stopped, or not begun, because its cancellation was asked for."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The process that ran the handler died while it ran, not by our hand."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The attempt was given up without a verdict: shut down, abandoned, or never started."""


Outcome = Succeeded | Failed | Snoozed | Cancelled | WorkerLost | Interrupted


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """How far the handler is; `total` is None where it is not known."""

    current: float
    total: float | None
    message: str


@dataclass(frozen=True, slots=True)
class LogReport:
    """One log entry; `level` is one of LOG_LEVELS."""

    level: str
    message: str


@dataclass(frozen=True, slots=True)
class OutputReport:
    """One chunk of output, of at most OUTPUT_BYTES_MAX bytes: exactly one of the two is set."""

    text: str | None = None
    data: bytes | None = None


Report = ProgressReport | LogReport | OutputReport


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt to run.

    `token` is unique to the attempt (its lease token); `idempotency_token` is the same in every
    attempt of the job. With `content_type` None the payload is a `google.protobuf.Struct` in wire
    form; otherwise it is the data of a blob of that type.
    """

    token: str
    job_id: str
    job_type: str
    attempt: int
    payload: bytes
    content_type: str | None
    idempotency_token: str
    timeout_seconds: float
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class JobTypeInfo:
    """A job type as the handlers announce it; None means that the service's default holds.

    `payload_schema_json` is a JSON Schema as JSON text, None where payloads are not checked.
    """

    name: str
    description: str
    payload_schema_json: str | None
    max_attempts: int | None
    timeout_seconds: float | None
    queue: str | None
