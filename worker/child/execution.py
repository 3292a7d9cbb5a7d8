"""Running one handler to one Ending, the same in a child process and in a thread."""

from __future__ import annotations

import contextvars
import inspect
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

from jobsvc.core.attempts import (
    ERROR_MESSAGE_BYTES_MAX,
    INVALID_PAYLOAD,
    RESULT_INVALID,
    RESULT_TOO_LARGE,
    AttemptFailed,
    Claimed,
    Ending,
    Report,
    Snoozed,
    Stopped,
    Succeeded,
    clean_error,
)
from worker.api import Abort, JobCancelled, JobContext, Retry, Snooze
from worker.child import logs
from worker.child.values import (
    PayloadInvalid,
    ResultInvalid,
    ResultTooLarge,
    decode_payload,
    encode_result,
)
from worker.registry import JobDefinition, find

UNKNOWN_JOB_TYPE: Final = "UNKNOWN_JOB_TYPE"

_TRACEBACK_FRAMES_MAX: Final = 50
_PAYLOAD_PROBLEMS_SHOWN: Final = 10


class AttemptContext(JobContext):
    """The context of a real attempt, with the half of it that is the runtime's, not the handler's.

    `report` is called on whatever thread the handler tells something on, one call at a time.
    """

    def __init__(self, task: Claimed, report: Callable[[Report], None]) -> None:
        super().__init__(
            job_id=task.job_id,
            attempt=task.attempt,
            idempotency_token=task.job_id,
            timeout_seconds=task.timeout,
            report=report,
            content_type=task.input.content_type,
            trace_id=task.trace_id,
        )
        self._stop_lock = threading.Lock()
        self._on_stop: Callable[[], object] | None = None

    def on_stop(self, stop: Callable[[], object] | None) -> None:
        """From now on `stop` is called, on any thread, when the handler is asked to stop."""
        with self._stop_lock:
            self._on_stop = stop
            if stop is not None and self.cancelled:
                stop()

    def tick(self) -> None:
        """Send a progress that waited for its turn; to be called every 0.1 s or so."""
        with self._lock:
            self._send_progress_if_due(time.monotonic())

    def ask_to_stop(self, *, lease_lost: bool = False) -> None:
        """Let the handler know that it should stop."""
        self._lease_lost = self._lease_lost or lease_lost
        with self._stop_lock:
            self._stop.set()
            if self._on_stop is not None:
                self._on_stop()

    def close(self) -> None:
        """Send the last progress if it is still waiting, and nothing more after it."""
        with self._lock:
            report, self._progress_waiting = self._progress_waiting, None
            if report is not None and not self._closed:
                self._report(report)
            self._closed = True


def run(task: Claimed, context: AttemptContext) -> Ending:
    """Run the task's handler to its end on this thread; never raises, whatever the handler does.

    The context is closed: its last progress is out, and no report follows. A handler that ends,
    however, after it was asked to stop is Stopped. Where a fork of the handler comes back here, it
    ends: the attempt is that of the process that was given it.
    """
    pid = os.getpid()
    logs.begin(task)
    try:
        ending = contextvars.copy_context().run(_run, task, context)
    except BaseException as error:  # noqa: BLE001 - SystemExit and the like are failures
        if os.getpid() != pid:
            _end_fork(error)
        ending = _failure(error)
    if os.getpid() != pid:
        _end_fork(None)
    logs.end()
    context.close()
    return Stopped() if context.cancelled else ending


def close() -> None:
    """Let go of what this thread keeps from attempt to attempt."""
    loops = sys.modules.get("worker.child.loops")  # loaded where an `async def` handler has run
    if loops is not None:
        loops.close()


def _run(task: Claimed, context: AttemptContext) -> Ending:
    definition = find(task.job_type)
    if definition is None:
        message = f"no handler is registered for {task.job_type!r}"
        return AttemptFailed(clean_error(UNKNOWN_JOB_TYPE, message))
    try:
        payload = _payload(definition, task)
    except PayloadInvalid as error:
        return AttemptFailed(clean_error(INVALID_PAYLOAD, str(error), retryable=False))
    if definition.takes_context:
        result = definition.function(payload, context)
    else:
        result = definition.function(payload)
    if inspect.iscoroutine(result):
        # Not at the top: few handlers need asyncio, and each child would pay for it.
        from worker.child import loops

        result = loops.run(result, context.on_stop)
    try:
        return Succeeded(encode_result(result))
    except ResultTooLarge as error:
        return AttemptFailed(clean_error(RESULT_TOO_LARGE, str(error), retryable=False))
    except ResultInvalid as error:
        return AttemptFailed(clean_error(RESULT_INVALID, str(error), retryable=False))


def _payload(definition: JobDefinition, task: Claimed) -> Any:
    kind = definition.payload_kind
    if task.input.content_type is not None:
        if kind in ("blob", "any"):
            return task.input.data
        raise PayloadInvalid(f"{definition.name} takes an object, not a blob")
    if kind == "blob":
        raise PayloadInvalid(f"{definition.name} takes a blob, not an object")
    data = decode_payload(task.input.data)
    if definition.model is None:
        return data
    from pydantic import ValidationError  # loaded already: the model is one of its

    try:
        # As JSON, which the payload is: strict models take times and bytes from text only so.
        return definition.model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # Without the input: an error's text travels further than a payload may.
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        texts = [
            ".".join(map(str, ("payload", *problem["loc"]))) + ": " + problem["msg"]
            for problem in problems[:_PAYLOAD_PROBLEMS_SHOWN]
        ]
        raise PayloadInvalid("; ".join(texts)) from error


def _end_fork(raised: BaseException | None) -> NoReturn:
    """End this process as Python ends a program, but for what was registered to run at the exit
    of the process that it was forked from."""
    code: object = 0
    if isinstance(raised, SystemExit):
        code = raised.code or 0
    elif raised is not None:
        traceback.print_exception(raised)
        code = 1
    if not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    logs.end()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody is left to tell
            stream.flush()
    os._exit(code & 0xFF)


def _failure(error: BaseException) -> Ending:
    if isinstance(error, MemoryError):
        traceback.clear_frames(error.__traceback__)  # what took it all, so that there is room again
    if isinstance(error, Snooze):
        return Snoozed(error.after_seconds)
    if isinstance(error, JobCancelled):
        # Reported only where nobody asked to stop: otherwise the attempt is Stopped anyway.
        return AttemptFailed(
            clean_error("JobCancelled", "the handler stopped, though not asked to")
        )
    info = clean_error(
        type=type(error).__name__,
        message=_message(error),
        traceback=_traceback(error),
        retryable=not isinstance(error, Abort),
    )
    return AttemptFailed(info, error.after_seconds if isinstance(error, Retry) else None)


def _message(error: BaseException) -> str:
    try:
        text = str(error)
        limit_bytes, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if isinstance(error, MemoryError) and limit_bytes != resource.RLIM_INFINITY:
            limit = f"the process may have {limit_bytes >> 20} MiB"
            text = f"{text or 'out of memory'}; {limit} (JOBSVC_CHILD_MEMORY_LIMIT)"
        return text
    except BaseException as unprintable:  # noqa: BLE001 - the exception's own code
        return f"(its text could not be made: {type(unprintable).__name__})"


def _traceback(error: BaseException) -> str:
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next  # the first frames are ours
    try:
        lines = traceback.format_exception(type(error), error, frames, limit=-_TRACEBACK_FRAMES_MAX)
    except BaseException as unprintable:  # noqa: BLE001 - the same code again
        return f"(the traceback could not be made: {type(unprintable).__name__})"
    # Each piece is cut, lest a message of megabytes push the frames out.
    return "".join(
        line if len(line) <= ERROR_MESSAGE_BYTES_MAX else line[:ERROR_MESSAGE_BYTES_MAX] + "…\n"
        for line in lines
    )
