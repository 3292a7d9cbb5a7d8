"""What a handler is written with: `job`, JobContext, and the exceptions that say more than failure.

Imports nothing of the service, so handlers can be loaded, and tested, without it:

    context = JobContext.for_testing()
    assert thumbnail(ThumbnailPayload(url="..."), context) == {...}
    assert context.reports == [...]
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import threading
import time
import typing
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import FunctionType, UnionType
from typing import Any, Final, TypeVar

from jobsvc.core.attempts import (
    BLOB_CONTENT_TYPE,
    LOG_ENTRY_BYTES_MAX,
    LOG_LEVELS,
    OUTPUT_CHUNK_BYTES_MAX,
    PROGRESS_MESSAGE_BYTES_MAX,
    Log,
    Output,
    Progress,
    Report,
    clean_text,
)
from worker.registry import JobDefinition, PayloadKind, register

Span = str | float | timedelta
Handler = TypeVar("Handler", bound=Callable[..., Any])

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SPAN_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DELAY_SECONDS_MAX: Final = 366 * 86400.0
_TIMEOUT_SECONDS_MIN: Final = 1.0
_TIMEOUT_SECONDS_MAX: Final = 86400.0
_ATTEMPTS_MAX: Final = 100
_DESCRIPTION_BYTES_MAX: Final = 1000
_JOB_TYPE = re.compile(r"[a-z][a-z0-9_.-]{0,99}")
_QUEUE = re.compile(r"[a-z][a-z0-9_.-]{0,49}")

PROGRESS_PER_SECOND_MAX: Final = 10
# What one attempt may tell before the rest is dropped here. It is twice what the service keeps of
# a job: the service has said by then that it drops, and this only spares the way there.
_REPORT_BYTES_MAX: Final = 16 * 1024 * 1024


def span_seconds(span: Span) -> float:
    """Seconds of a span given as seconds, timedelta, or text such as `500ms`, `30s`, `2m`, `1h`.

    Raises ValueError for anything else.
    """
    if isinstance(span, timedelta):
        return span.total_seconds()
    if isinstance(span, str):
        match = _SPAN.fullmatch(span.strip())
        if match is None:
            raise ValueError(f"{span!r} is not a span such as 500ms, 30s, 2m or 1h")
        return float(match[1]) * _SPAN_UNIT_SECONDS[match[2]]
    if not math.isfinite(span):
        raise ValueError(f"{span!r} is not a number of seconds")
    return float(span)


def _delay_seconds(after: Span) -> float:
    seconds = span_seconds(after)
    if not 0 <= seconds <= _DELAY_SECONDS_MAX:
        raise ValueError(f"after must be 0 to 366 days, not {after!r}")
    return seconds


class Retry(Exception):
    """Fail this attempt and try again, `after` a span, or by the job's retry policy without one.

    Counts as a failed attempt. `reason` becomes the error's message.
    """

    def __init__(
        self, reason: str = "the handler asked to be retried", *, after: Span | None = None
    ):
        super().__init__(reason)
        self.after_seconds = None if after is None else _delay_seconds(after)


class Snooze(Exception):
    """Run the job again `after` a span, as if this attempt had not been: no failure is counted."""

    def __init__(self, after: Span):
        super().__init__(f"snoozed for {after}")
        self.after_seconds = _delay_seconds(after)


class Abort(Exception):
    """Fail the job for good, whatever attempts are left; `reason` becomes the error's message."""

    def __init__(self, reason: str):
        super().__init__(reason)


class JobCancelled(BaseException):
    """Raised by `raise_if_cancelled` and `sleep`; passes through a handler's `except Exception`."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A result of bytes with a content type of its own; plain `bytes` are an octet-stream."""

    data: bytes
    content_type: str = BLOB_CONTENT_TYPE


class JobContext:
    """What a handler knows of the attempt it runs, and how it tells of its progress.

    Safe to use from any thread of the handler. Once the handler has returned, reports are dropped.
    """

    def __init__(
        self,
        *,
        job_id: str,
        attempt: int,
        idempotency_token: str,
        timeout_seconds: float,
        report: Callable[[Report], None],
        content_type: str | None = None,
        trace_id: str = "",
    ) -> None:
        self.job_id: Final = job_id
        self.attempt: Final = attempt
        """Counts the attempts started, from 1; it passes the maximum after interruptions."""
        self.idempotency_token: Final = idempotency_token
        """The same in every attempt of the job: hand it to whatever can tell a repetition by it."""
        self.deadline: Final = datetime.now(UTC) + timedelta(seconds=timeout_seconds)
        """When the attempt is ended with TIMEOUT, by this machine's clock, in UTC."""
        self.content_type: Final = content_type or BLOB_CONTENT_TYPE
        """Of the payload, where it is a blob."""
        self.trace_id: Final = trace_id
        self._report = report
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lease_lost = False
        self._closed = False
        self._progress_times: deque[float] = deque(maxlen=PROGRESS_PER_SECOND_MAX)
        self._progress_waiting: Progress | None = None
        self._bytes_left = {"log": _REPORT_BYTES_MAX, "output": _REPORT_BYTES_MAX}

    @staticmethod
    def for_testing(
        *,
        job_id: str = "00000000-0000-7000-8000-000000000000",
        attempt: int = 1,
        idempotency_token: str = "testing",  # noqa: S107 - not a secret
        timeout: Span = "30m",
        content_type: str | None = None,
    ) -> TestingContext:
        """A context for a handler's own tests: no service, every report kept in `reports`."""
        return TestingContext(
            job_id=job_id,
            attempt=attempt,
            idempotency_token=idempotency_token,
            timeout_seconds=span_seconds(timeout),
            content_type=content_type,
        )

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: a second later its process is killed.

        An `async def` handler has CancelledError raised in it at the same time. In thread
        isolation, where nothing can be killed, it is set on timeout too.
        """
        return self._stop.is_set()

    @property
    def lease_lost(self) -> bool:
        """Whether the attempt is no longer ours: whatever it returns is thrown away.

        Seen in thread isolation only; a child process is killed at once.
        """
        return self._lease_lost

    def raise_if_cancelled(self) -> None:
        """Raise JobCancelled if the handler should stop."""
        if self._stop.is_set():
            raise JobCancelled

    def sleep(self, seconds: float) -> None:
        """Wait, but raise JobCancelled as soon as the handler should stop."""
        if self._stop.wait(seconds):
            raise JobCancelled

    def progress(self, current: float, total: float | None = None, message: str = "") -> None:
        """Tell how far the work is. Of more than ten a second the latest ones are kept.

        Raises ValueError if a number is not finite.
        """
        current = float(current)
        total = None if total is None else float(total)
        if not math.isfinite(current) or not math.isfinite(total or 0.0):
            raise ValueError(f"progress must be finite numbers, not {current} of {total}")
        report = Progress(current, total or 0.0, clean_text(message, PROGRESS_MESSAGE_BYTES_MAX))
        with self._lock:
            self._progress_waiting = report
            self._send_progress_if_due(time.monotonic())

    def log(self, message: str, level: str = "INFO") -> None:
        """Add an entry to the job's log, cut at 16 KiB. Raises ValueError for an unknown level."""
        level = level.upper()
        if level not in LOG_LEVELS:
            raise ValueError(f"level must be one of {', '.join(LOG_LEVELS)}, not {level!r}")
        report = Log(level, clean_text(message, LOG_ENTRY_BYTES_MAX))
        with self._lock:
            if self._take_budget("log", len(report.message)):
                self._report(report)

    def output(self, chunk: str | bytes) -> None:
        """Add to the job's output. It is sent in chunks of at most 64 KiB, in order."""
        for report in _output_reports(chunk):
            with self._lock:
                if self._take_budget("output", len(report.data or report.text or "")):
                    self._report(report)

    def _take_budget(self, kind: str, size: int) -> bool:
        if self._closed or self._bytes_left[kind] <= 0:
            return False
        self._bytes_left[kind] -= size
        return True

    def _send_progress_if_due(self, now: float) -> None:
        """Send the waiting progress unless ten were sent in the last second; holds the lock.

        The tenth goes only 0.1 s after the ninth, so that a handler that tells a lot at once and
        returns still has room for its last word.
        """
        report, times = self._progress_waiting, self._progress_times
        if report is None or self._closed:
            return
        while times and now - times[0] >= 1.0:
            times.popleft()
        spare = PROGRESS_PER_SECOND_MAX - len(times)
        if spare > 1 or (spare == 1 and now - times[-1] >= 1.0 / PROGRESS_PER_SECOND_MAX):
            times.append(now)
            self._progress_waiting = None
            self._report(report)


class TestingContext(JobContext):
    """A JobContext without a service behind it: `reports` has what the handler told, in order."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(
        self,
        *,
        job_id: str,
        attempt: int,
        idempotency_token: str,
        timeout_seconds: float,
        content_type: str | None,
    ) -> None:
        self.reports: list[Report] = []
        super().__init__(
            job_id=job_id,
            attempt=attempt,
            idempotency_token=idempotency_token,
            timeout_seconds=timeout_seconds,
            report=self.reports.append,
            content_type=content_type,
        )

    def cancel(self) -> None:
        """Ask the handler to stop, as the cancellation of its job does."""
        self._stop.set()


def _output_reports(chunk: str | bytes) -> list[Output]:
    if isinstance(chunk, str):
        # Output keeps its carriage returns and escapes; only what no text can hold is replaced.
        data = chunk.replace("\0", "\ufffd").encode(errors="surrogatepass")
        data = data.decode(errors="replace").encode()
        return [Output(text=piece) for piece in _split_text(data)]
    data = bytes(chunk)
    starts = range(0, len(data), OUTPUT_CHUNK_BYTES_MAX)
    return [Output(data=data[start : start + OUTPUT_CHUNK_BYTES_MAX]) for start in starts]


def _split_text(data: bytes) -> list[str]:
    pieces = []
    start = 0
    while start < len(data):
        end = min(start + OUTPUT_CHUNK_BYTES_MAX, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces


def job(
    name: str,
    *,
    timeout: Span | None = None,
    max_attempts: int | None = None,
    queue: str | None = None,
    description: str | None = None,
) -> Callable[[Handler], Handler]:
    """Register a function as the handler of the job type `name`; the function stays as it is.

    It takes `(payload)` or `(payload, ctx)` and may be `async def`. The payload's annotation
    decides what it gets: a Pydantic model (its JSON Schema is announced), `dict`, `bytes` (blobs
    only), or `dict | bytes`. The options are defaults that a submit can override; without
    `description` the docstring's first paragraph describes the type.

    Raises ValueError for a bad option or a name that another function has, TypeError for a
    function that cannot be called so.
    """
    timeout_seconds = None if timeout is None else span_seconds(timeout)
    _check_options(name, timeout_seconds, max_attempts, queue)

    def decorate(function: Handler) -> Handler:
        kind, model, takes_context = _inspect(function)
        register(
            JobDefinition(
                name=name,
                function=function,
                takes_context=takes_context,
                payload_kind=kind,
                model=model,
                description=_describe(function) if description is None else description,
                timeout_seconds=timeout_seconds,
                max_attempts=max_attempts,
                queue=queue,
            )
        )
        return function

    return decorate


def _check_options(
    name: str, timeout_seconds: float | None, max_attempts: int | None, queue: str | None
) -> None:
    if not _JOB_TYPE.fullmatch(name):
        raise ValueError(f"job type {name!r} does not match {_JOB_TYPE.pattern}")
    if queue is not None and not _QUEUE.fullmatch(queue):
        raise ValueError(f"queue {queue!r} of job type {name!r} does not match {_QUEUE.pattern}")
    if max_attempts is not None and not 1 <= max_attempts <= _ATTEMPTS_MAX:
        raise ValueError(f"max_attempts of job type {name!r} must be 1 to {_ATTEMPTS_MAX}")
    if timeout_seconds is not None and not (
        _TIMEOUT_SECONDS_MIN <= timeout_seconds <= _TIMEOUT_SECONDS_MAX
    ):
        raise ValueError(f"timeout of job type {name!r} must be 1 s to 24 h")


def _inspect(function: Callable[..., Any]) -> tuple[PayloadKind, Any, bool]:
    """What the function takes: kind of payload, its model if any, and whether a context."""
    if not isinstance(inspect.unwrap(function), FunctionType):
        raise TypeError(f"{function!r} is not a function")
    where = f"{function.__module__}.{function.__qualname__}"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{where} is a generator, which has no result: return a list instead")
    parameters = list(inspect.signature(function).parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others_needed = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(by_position) not in (1, 2) or others_needed:
        raise TypeError(f"{where} must take (payload) or (payload, ctx)")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        message = f"{where}: {error}; annotations must be names of its module"
        raise TypeError(message) from error
    kind, model = _payload_kind(hints.get(by_position[0].name, dict), where)
    return kind, model, len(by_position) == 2


def _payload_kind(annotation: Any, where: str) -> tuple[PayloadKind, Any]:
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = {_payload_kind(choice, where)[0] for choice in typing.get_args(annotation)}
        if kinds == {"object", "blob"}:
            return "any", None
    elif annotation is bytes:
        return "blob", None
    elif annotation is Any or (typing.get_origin(annotation) or annotation) in (dict, Mapping):
        return "object", None
    pydantic = sys.modules.get("pydantic")  # not imported: no annotation can be a model of it
    if (
        pydantic is not None
        and isinstance(annotation, type)
        and issubclass(annotation, pydantic.BaseModel)
    ):
        return "model", annotation
    raise TypeError(
        f"{where}: the payload must be a Pydantic model, dict, bytes or dict | bytes,"
        f" not {annotation!r}"
    )


def _describe(function: Callable[..., Any]) -> str:
    paragraph = (inspect.getdoc(function) or "").split("\n\n", 1)[0]
    return clean_text(" ".join(paragraph.split()), _DESCRIPTION_BYTES_MAX)
