"""The frames between a worker and its child processes, and what they say.

A frame is two lengths, a JSON header and a body of raw bytes. Each child has two sockets: one for
frames, and one for tickets. A ticket is the number of a task; the child takes one before it starts
a task, and the parent can take it back until then, so that exactly one of them gets it and the
parent always knows whether a task was started, however the child ends.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

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

_LENGTHS = struct.Struct("!II")
_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024  # what the schemas of many job types may take
_BODY_BYTES_MAX: Final = 16 * 1024 * 1024

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

Frame = tuple[list[Any], bytes]


class ProtocolError(Exception):
    """The other side sent what is no frame: it can only be given up."""


def frame(header: list[Any], body: bytes = b"") -> bytes:
    """The bytes of a frame; `header` is a list that begins with its kind."""
    head = _encode(header).encode()
    return b"".join((_LENGTHS.pack(len(head), len(body)), head, body))


class FrameReader:
    """Turns bytes as they come into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises ProtocolError."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        start = 0
        while len(buffer) - start >= _LENGTHS.size:
            head_size, body_size = _LENGTHS.unpack_from(buffer, start)
            if head_size > _HEADER_BYTES_MAX or body_size > _BODY_BYTES_MAX:
                raise ProtocolError(f"a frame of {head_size} and {body_size} bytes")
            head_end = start + _LENGTHS.size + head_size
            if len(buffer) < head_end + body_size:
                break
            frames.append(
                (
                    _header(bytes(buffer[start + _LENGTHS.size : head_end])),
                    bytes(buffer[head_end : head_end + body_size]),
                )
            )
            start = head_end + body_size
        del buffer[:start]
        return frames


def _header(data: bytes) -> list[Any]:
    try:
        header = json.loads(data.decode())
    except ValueError as error:
        raise ProtocolError(f"a header that is not JSON: {error}") from error
    if not isinstance(header, list) or not header:
        raise ProtocolError("a header that is not a list")
    return header


def task_frame(number: int, task: Claimed) -> bytes:
    """Sends a task; it may start once the ticket `number` is taken."""
    return frame(
        [
            "task",
            number,
            task.job_id,
            task.job_type,
            task.queue,
            task.attempt,
            task.timeout,
            task.trace_id,
            task.input.content_type,
        ],
        task.input.data,
    )


def read_task(header: list[Any], body: bytes) -> Claimed:
    """The task of a "task" frame; the fence stays with the parent."""
    _, _, job_id, job_type, queue, attempt, timeout, trace_id, content_type = header
    return Claimed(
        job_id=job_id,
        token="",
        job_type=job_type,
        queue=queue,
        attempt=attempt,
        input=Input(body, content_type),
        timeout=timeout,
        trace_id=trace_id,
    )


def cancel_frame(number: int) -> bytes:
    """Asks the handler of a started task to stop."""
    return frame(["cancel", number])


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
    return frame(["ready", rows])


def read_ready(header: list[Any]) -> list[JobTypeInfo]:
    """The job types of a "ready" frame."""
    return [JobTypeInfo(*row) for row in header[1]]


def broken_frame(message: str) -> bytes:
    """A child's first and last word: its handlers cannot be loaded."""
    return frame(["broken", message])


def report_frame(number: int, report: Report) -> bytes:
    """Carries a report of a running task."""
    match report:
        case Progress(current, total, message):
            return frame(["progress", number, current, total, message])
        case Log(level, message):
            return frame(["log", number, level, message])
        case Output(text, None):
            return frame(["text", number], (text or "").encode())
        case Output(_, data):
            return frame(["data", number], data or b"")


def read_report(header: list[Any], body: bytes) -> Report:
    """The report of a "progress", "log", "text" or "data" frame. Raises ProtocolError."""
    match header:
        case ["progress", _, current, total, message]:
            return Progress(current, total, message)
        case ["log", _, level, message]:
            return Log(level, message)
        case ["text", _]:
            return Output(text=body.decode())
        case ["data", _]:
            return Output(data=body)
        case _:
            raise ProtocolError(f"a frame of unknown kind {header[0]!r}")


def done_frame(number: int, ending: Ending) -> bytes:
    """Ends a task. A child ends none as WorkerLost or Interrupted: those are its parent's."""
    match ending:
        case Succeeded(result):
            return frame(["done", number, "succeeded", result.content_type], result.data)
        case AttemptFailed(error, after):
            fields = [error.type, error.message, error.traceback, error.retryable]
            return frame(["done", number, "failed", fields, after])
        case Snoozed(after):
            return frame(["done", number, "snoozed", after])
        case Stopped():
            return frame(["done", number, "cancelled"])
        case _:
            raise ValueError(f"a child cannot end a task as {ending!r}")


def read_ending(header: list[Any], body: bytes) -> Ending:
    """The ending of a "done" frame. Raises ProtocolError."""
    match header:
        case ["done", _, "succeeded", content_type]:
            return Succeeded(Input(body, content_type))
        case ["done", _, "failed", fields, after]:
            return AttemptFailed(clean_error(*fields), after)
        case ["done", _, "snoozed", after]:
            return Snoozed(after)
        case ["done", _, "cancelled"]:
            return Stopped()
        case _:
            raise ProtocolError(f"an ending of unknown kind {header[2:3]!r}")
