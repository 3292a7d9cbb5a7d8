"""What a shell user sees. Results go to stdout; text from jobs cannot steer the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import typer

from jobsvc.client import (
    GetResultResponse,
    JobEvent,
    event_name,
    from_value,
    is_terminal,
    log_level_name,
    state_name,
    to_json,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.progress import Progress

EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "CANCELLED": 3}
AGAIN_SECONDS = 2.0
# What a shell reports for a program that SIGPIPE, or SIGINT, ended.
_BROKEN_PIPE = 141
_INTERRUPTED = 130
_NOT_WRITTEN = 74  # EX_IOERR of sysexits.h
_CLEAR_LINE_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


def format_or_default(chosen: Format | None) -> Format:
    return chosen or (Format.TABLE if sys.stdout.isatty() else Format.JSON)


def exit_code(state: int) -> int:
    """Of a command that follows a job to its end; 0 where it has not ended."""
    return EXIT_CODES.get(state_name(state), 0)


def line(text: str) -> None:
    """One line on stdout, at once: whoever reads the pipe may be waiting for it."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more on its way out, and is not to complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(_BROKEN_PIPE) from None
        note(f"cannot write to stdout: {error.strerror}")
        raise typer.Exit(_NOT_WRITTEN) from None


def end_on_interrupt() -> None:
    """From now on an interrupt ends the process where it stands, quietly.

    A KeyboardInterrupt may arise anywhere, also in gRPC and `threading` between the taking of a
    lock and the noting of it. What cleans up then waits for that lock, or fails.
    """
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: object) -> None:
    if sys.stdout.isatty():  # there may be a bar
        os.write(sys.stdout.fileno(), _CLEAR_LINE_SHOW_CURSOR)
    os._exit(_INTERRUPTED)


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(clean(text) + "\n")


def clean(text: str) -> str:
    """The text on one line, with every character that is not printable escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def again_and_again(show: Callable[[], None], watch: bool) -> None:
    """Shows once, or with `watch` every two seconds until it is interrupted; on a terminal each
    time in place of the last."""
    while True:
        if watch and sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J")
        show()
        if not watch:
            return
        time.sleep(AGAIN_SECONDS)


def resource(message: Message, output: Format) -> None:
    """One resource; JSON is on one line unless a person reads it."""
    if output is Format.JSON:
        line(to_json(message, indent=2 if sys.stdout.isatty() else None))
        return
    fields: dict[str, object] = json.loads(to_json(message))
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        line(f"{name:<{width}}  {clean(_bare(text))}")


def _bare(text: str) -> str:
    """Without what an enum's values begin with."""
    for prefix in ("JOB_STATE_", "WAIT_REASON_", "MISSED_TICKS_", "OVERLAP_"):
        text = text.removeprefix(prefix)
    return text


def outcome(result: GetResultResponse) -> None:
    """A result's value on stdout as JSON; for a job without one, a line on stderr."""
    kind = result.WhichOneof("outcome")
    indent = 2 if sys.stdout.isatty() else None
    if kind == "result":
        line(json.dumps(from_value(result.result), ensure_ascii=False, indent=indent))
    elif kind == "result_blob":
        line(to_json(result.result_blob, indent=indent))
    elif kind == "error":
        note(f"{state_name(result.state)} {result.error.type}: {result.error.message}")
    else:
        note(f"job {result.job_id} is {state_name(result.state)}")


def event_line(event: JobEvent, with_job: bool = False) -> str:
    when = event.event_time.ToJsonString()
    detail = _detail(event)
    which = f"{event.job_id}  " if with_job else ""
    what = f"{event_name(event.type):<19}  {state_name(event.state)}"
    text = f"{when}  {which}{event.sequence:>4}  {what}"
    return clean(f"{text:<{65 + len(which)}}  {detail}" if detail else text)


def events(found: Iterable[JobEvent], output: Format, *, with_job: bool = False) -> None:
    for event in found:
        line(to_json(event) if output is Format.JSON else event_line(event, with_job))


def _detail(event: JobEvent) -> str:
    parts = []
    if event.HasField("progress"):
        parts.append(_progress(event))
    if event.HasField("log"):
        parts.append(f"{log_level_name(event.log.level)} {event.log.message}")
    if event.HasField("output"):
        chunk = event.output
        is_text = chunk.WhichOneof("chunk") == "text"
        parts.append(chunk.text if is_text else f"{len(chunk.data)} bytes")
    if event.HasField("error"):
        parts.append(f"{event.error.type}: {event.error.message}")
    if event.HasField("next_attempt_time"):
        parts.append(f"next attempt at {event.next_attempt_time.ToJsonString()}")
    if event.actor:
        parts.append(f"by {event.actor}")
    elif not parts and event.worker_id:
        parts.append(f"attempt {event.attempt} on {event.worker_id}")
    return ", ".join(parts)


def _progress(event: JobEvent) -> str:
    progress = event.progress
    total = f"/{progress.total:g}" if progress.total else ""
    return f"{progress.current:g}{total} {progress.message}".rstrip()


class View(Protocol):
    def show(self, event: JobEvent) -> None: ...


class _Json:
    def show(self, event: JobEvent) -> None:
        line(to_json(event))


class _Plain:
    def show(self, event: JobEvent) -> None:
        line(event_line(event))


class _Live:
    """A bar that moves at the foot of the terminal, what the job says above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("…", total=None)

    def show(self, event: JobEvent) -> None:
        if event.HasField("progress"):
            progress = event.progress
            self._bar.update(
                self._task,
                completed=progress.current,
                total=progress.total or None,
                description=clean(progress.message) or state_name(event.state),
            )
            return
        self._bar.console.print(event_line(event), markup=False, highlight=False)
        self._bar.update(self._task, description=state_name(event.state))
        if is_terminal(event.state):
            self._bar.update(self._task, visible=False)


@contextmanager
def following(output: Format) -> Iterator[View]:
    """A view for events as they come: JSON lines, a live bar on a terminal, else plain lines."""
    if output is Format.JSON:
        yield _Json()
    elif not sys.stdout.isatty():
        yield _Plain()
    else:
        # Slow to import, and only needed here.
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:g}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, transient=True) as bar:
            yield _Live(bar)
