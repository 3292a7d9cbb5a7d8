"""What handlers print and log, as records that name the job, where the service's are JSON.

It knows of the job what the process, or in thread isolation the thread, was told by `begin`. What
programs that a handler starts, and C code, write to the descriptors themselves stays as it is.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from jobsvc.core.attempts import Claimed
from jobsvc.core.records import HIDDEN, LEVELS, as_console, as_json, masked, now

# How a worker tells its children the form of its records: `json:info`.
VARIABLE: Final = "JOBSVC_CHILD_RECORDS"

_STDERR: Final = 2
_LINE_BYTES_MAX: Final = 16 * 1024
_OWN_ATTRIBUTES: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_OWN_FIELDS: Final = {"time", "level", "event", "logger"}


class _OfProcess:
    """The task that runs, whichever of its threads asks."""

    task: Claimed | None = None


class _OfThread(threading.local):
    """The task that runs on the thread that asks."""

    task: Claimed | None = None


_running: _OfProcess | _OfThread = _OfProcess()
_streams: list[_Lines] = []


def begin(task: Claimed) -> None:
    """What is printed and logged from now on belongs to it."""
    _running.task = task


def end() -> None:
    """The task has ended; a line that it has begun is one."""
    for stream in _streams:
        stream.end()
    _running.task = None


def start_in_process() -> None:
    """In a child process, before the handlers are loaded."""
    log_format, level = _form()
    root = logging.getLogger()
    root.setLevel(LEVELS[level])
    root.addHandler(_Handler(log_format))
    if log_format == "json":
        _replace_streams(level)


def start_in_threads(modules: Iterable[str], write: Callable[[str], None]) -> None:
    """In a worker whose threads run handlers. Its logging is set up already, and hears libraries
    from WARNING on; the packages of the handlers are heard from its own level on. `write`: where
    the worker's own records go, so that all are in order."""
    global _running, _write
    _running, _write = _OfThread(), write
    log_format, level = _form()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_ids)
    for package in {module.partition(".")[0] for module in modules} - {"worker", "jobsvc"}:
        logging.getLogger(package).setLevel(LEVELS[level])
    if log_format == "json":
        _replace_streams(level)


def _form() -> tuple[str, str]:
    log_format, _, level = os.environ.pop(VARIABLE, "").partition(":")
    return log_format or "console", level or "info"


def _replace_streams(level: str) -> None:
    for number, name in ((1, "stdout"), (_STDERR, "stderr")):
        told_as = "info" if number == 1 else "warning"
        lines = _Lines(number, name, told_as, is_told=LEVELS[told_as] >= LEVELS[level])
        text = io.TextIOWrapper(lines, "utf-8", "backslashreplace", "\n", write_through=True)
        setattr(sys, name, text)
        _streams.append(lines)


def _ids() -> dict[str, object]:
    task = _running.task
    if task is None:
        return {}
    return {
        "job_id": task.job_id,
        "job_type": task.job_type,
        "queue": task.queue,
        "attempt": task.attempt,
        "trace_id": task.trace_id,
    }


def _add_ids(record: logging.LogRecord) -> bool:
    vars(record).update(_ids())
    return True


def _write_itself(line: str) -> None:
    """In one system call, so that records of several processes do not mix."""
    try:
        os.write(_STDERR, (line + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        # Nobody is left to read the log, and there is nowhere to say so: the job goes on.
        return


_write: Callable[[str], None] = _write_itself


def _record(level: str, event: str, fields: Mapping[str, Any], logger: str) -> dict[str, Any]:
    first = {"time": now(), "level": level, "event": event}
    return {**first, **fields, **_ids(), "logger": logger}


class _Lines(io.BufferedIOBase):
    """A stream each line of which is a record. What is not a job's, in a process that has other
    things to say, goes where it always went."""

    def __init__(self, number: int, name: str, level: str, *, is_told: bool) -> None:
        self._number = number
        self.name = name
        self._level = level
        self._is_told = is_told
        self._parts: dict[int, bytes] = {}  # of lines that have begun, by thread

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def write(self, data: Any) -> int:
        if _running.task is None and isinstance(_running, _OfThread):
            return os.write(self._number, data)
        thread = threading.get_ident()
        *lines, part = (self._parts.pop(thread, b"") + bytes(data)).split(b"\n")
        while len(part) > _LINE_BYTES_MAX:
            lines.append(part[:_LINE_BYTES_MAX])
            part = part[_LINE_BYTES_MAX:]
        if part:
            self._parts[thread] = part
        for line in lines:
            self._tell(line)
        return len(data)

    def end(self) -> None:
        own = [threading.get_ident()] if isinstance(_running, _OfThread) else list(self._parts)
        for thread in own:
            self._tell(self._parts.pop(thread, b""))

    def _tell(self, line: bytes) -> None:
        # As a terminal shows it: what is before a carriage return has been written over.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "backslashreplace")
        if text and self._is_told:
            _write(as_json(_record(self._level, text, {}, self.name)))


class _Handler(logging.Handler):
    """Makes records of the standard library's logging the service's own."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._render = as_json if log_format == "json" else as_console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {
                name: "***" if name in HIDDEN else value
                for name, value in vars(record).items()
                if name not in _OWN_ATTRIBUTES and name not in _OWN_FIELDS
            }
            if record.exc_info and record.exc_info[0] is not None:
                text = logging.Formatter().formatException(record.exc_info)
                fields["exception"] = masked(text)
            level, event = record.levelname.lower(), masked(record.getMessage())
            _write(self._render(_record(level, event, fields, record.name)))
        except Exception:  # noqa: BLE001 - as logging has it: a bad record costs no work
            self.handleError(record)
