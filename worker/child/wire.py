"""The frames between a worker and its child processes, and what they say.

A frame is its kind, the number of its task, two lengths, a head and a body of raw bytes. Each child
has two sockets: one for frames, and one for tickets. A ticket is the number of a task; the child
takes one before it starts a task, and the parent can take it back until then, so that exactly one
of them gets it and the parent always knows whether a task was started, however the child ends.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final, NamedTuple

from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Input,
    JobTypeInfo,
    Log,
    Output,
    Progress,
    Report,
    Snoozed,
    Stopped,
    Succeeded,
    clean_error,
)

TICKET: Final = struct.Struct("!Q")

# To a child.
TASK: Final = b"t"
CANCEL: Final = b"c"
# From a child; all but READY and BROKEN are about a task.
READY: Final = b"R"
BROKEN: Final = b"B"
RETIRED: Final = b"r"
PROGRESS: Final = b"p"
LOG: Final = b"l"
TEXT: Final = b"o"
DATA: Final = b"d"
SUCCEEDED: Final = b"s"
FAILED: Final = b"f"
SNOOZED: Final = b"z"
STOPPED: Final = b"x"
ENDINGS: Final = frozenset((SUCCEEDED, FAILED, SNOOZED, STOPPED))

_KINDS = frozenset((TASK, CANCEL, READY, BROKEN, RETIRED, PROGRESS, LOG, TEXT, DATA, *ENDINGS))
_PREFIX = struct.Struct("!cQfII")
_HEAD_BYTES_MAX: Final = 16 * 1024 * 1024  # what the schemas of many job types may take
_BODY_BYTES_MAX: Final = 16 * 1024 * 1024

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ProtocolError(Exception):
    """The other side sent what is no frame: it can only be given up."""


class Frame(NamedTuple):
    kind: bytes
    number: int
    seconds: float  # of an ending: how long the handler ran
    head: bytes
    body: bytes


def _frame(
    kind: bytes, number: int = 0, head: bytes = b"", body: bytes = b"", seconds: float = 0.0
) -> bytes:
    return b"".join((_PREFIX.pack(kind, number, seconds, len(head), len(body)), head, body))


def _json(value: Any) -> bytes:
    return _encode(value).encode()


class FrameReader:
    """Turns bytes as they come into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises ProtocolError."""
        data = self._rest + data if self._rest else data
        frames: list[Frame] = []
        start, size = 0, len(data)
        while size - start >= _PREFIX.size:
            kind, number, seconds, head_size, body_size = _PREFIX.unpack_from(data, start)
            if kind not in _KINDS or head_size > _HEAD_BYTES_MAX or body_size > _BODY_BYTES_MAX:
                raise ProtocolError(f"a frame {kind!r} of {head_size} and {body_size} bytes")
            if not 0.0 <= seconds < math.inf:
                raise ProtocolError(f"a run of {seconds} s")
            head_start = start + _PREFIX.size
            body_start = head_start + head_size
            end = body_start + body_size
            if end > size:
                break
            head, body = data[head_start:body_start], data[body_start:end]
            frames.append(Frame(kind, number, seconds, head, body))
            start = end
        self._rest = data[start:]
        return frames


def task_frame(number: int, task: Claimed) -> bytes:
    """Sends a task; it may start once the ticket `number` is taken."""
    # None of these has a tab but, perhaps, the last; plain text costs a third of JSON.
    content_type = task.input.content_type
    head = (
        f"{task.attempt}\t{task.timeout!r}\t{task.job_id}\t{task.job_type}\t{task.queue}"
        f"\t{task.trace_id}\t{'' if content_type is None else '=' + content_type}"
    )
    return _frame(TASK, number, head.encode(), task.input.data)


def read_task(frame: Frame) -> Claimed:
    """The task of a TASK frame; the fence stays with the parent."""
    fields = frame.head.decode().split("\t", 6)
    attempt, timeout, job_id, job_type, queue, trace_id, content_type = fields
    return Claimed(
        job_id=job_id,
        token="",
        job_type=job_type,
        queue=queue,
        attempt=int(attempt),
        input=Input(frame.body, content_type[1:] if content_type else None),
        timeout=float(timeout),
        trace_id=trace_id,
    )


def cancel_frame(number: int) -> bytes:
    """Asks the handler of a started task to stop."""
    return _frame(CANCEL, number)


def ready_frame(job_types: list[JobTypeInfo]) -> bytes:
    """A child's first word: its handlers are loaded."""
    rows = [
        [
            info.name,
            info.description,
            info.payload_schema,
            info.queue,
            info.max_attempts,
            info.timeout,
        ]
        for info in job_types
    ]
    return _frame(READY, head=_json(rows))


def read_ready(frame: Frame) -> list[JobTypeInfo]:
    """The job types of a READY frame."""
    return [JobTypeInfo(*row) for row in json.loads(frame.head)]


def broken_frame(message: str) -> bytes:
    """A child's first and last word: its handlers cannot be loaded."""
    return _frame(BROKEN, head=message.encode(errors="replace"))


def retired_frame(number: int, why: str) -> bytes:
    """Comes with the ending of a task, the child's last: it takes no more, and ends by itself."""
    return _frame(RETIRED, number, why.encode(errors="replace"))


def report_frame(number: int, report: Report) -> bytes:
    """Carries a report of a running task."""
    match report:
        case Progress(current, total, message):
            return _frame(PROGRESS, number, _json([current, total, message]))
        case Log(level, message):
            return _frame(LOG, number, _json([level, message]))
        case Output(text, None):
            return _frame(TEXT, number, body=(text or "").encode())
        case Output(_, data):
            return _frame(DATA, number, body=data or b"")


def read_report(frame: Frame) -> Report:
    """The report of a PROGRESS, LOG, TEXT or DATA frame. Raises ProtocolError."""
    if frame.kind == PROGRESS:
        current, total, message = json.loads(frame.head)
        return Progress(float(current), float(total), str(message))
    if frame.kind == LOG:
        level, message = json.loads(frame.head)
        return Log(str(level), str(message))
    if frame.kind == TEXT:
        return Output(text=frame.body.decode())
    if frame.kind == DATA:
        return Output(data=frame.body)
    raise ProtocolError(f"a frame of kind {frame.kind!r} is no report")


def ending_frame(number: int, ending: Ending, seconds: float) -> bytes:
    """Ends a task. A child ends none as Interrupted or crashed: those are its parent's."""
    match ending:
        case Succeeded(Input(data, content_type)):
            head = b"" if content_type is None else b"=" + content_type.encode()
            return _frame(SUCCEEDED, number, head, data, seconds)
        case AttemptFailed(error, after, False):
            fields = [error.type, error.message, error.traceback, error.retryable]
            return _frame(FAILED, number, _json([fields, after]), seconds=seconds)
        case Snoozed(after):
            return _frame(SNOOZED, number, _json(after), seconds=seconds)
        case Stopped():
            return _frame(STOPPED, number, seconds=seconds)
        case _:
            raise ValueError(f"a child cannot end a task as {ending!r}")


def read_ending(frame: Frame) -> Ending:
    """The ending of a frame of one of the kinds in ENDINGS. Raises ProtocolError."""
    if frame.kind == SUCCEEDED:
        content_type = frame.head[1:].decode() if frame.head else None
        return Succeeded(Input(frame.body, content_type))
    if frame.kind == FAILED:
        fields, after = json.loads(frame.head)
        return AttemptFailed(clean_error(*fields), after)
    if frame.kind == SNOOZED:
        return Snoozed(float(json.loads(frame.head)))
    if frame.kind == STOPPED:
        return Stopped()
    raise ProtocolError(f"a frame of kind {frame.kind!r} is no ending")
