"""The frames between a worker and its children."""

from __future__ import annotations

import math

import pytest

from jobsvc.core.attempts import (
    AttemptFailed,
    Ending,
    Input,
    Interrupted,
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
from worker.child import wire

from .recorder import make_task


def frames(data: bytes, *, step: int = 1_000_000) -> list[wire.Frame]:
    reader = wire.FrameReader()
    pieces = (data[start : start + step] for start in range(0, len(data), step))
    return [frame for piece in pieces for frame in reader.feed(piece)]


@pytest.mark.parametrize("content_type", [None, "", "text/x; a=\tb"])
@pytest.mark.parametrize("step", [1, 7, 1_000_000])
def test_a_task_arrives_as_it_was_sent_but_for_its_fence(
    content_type: str | None, step: int
) -> None:
    task = make_task("t.echo", b"\0\xffdata", content_type=content_type)
    first, second = frames(wire.task_frame(7, task) + wire.task_frame(8, task), step=step)
    assert (first.kind, first.number, second.number) == (wire.TASK, 7, 8)
    read = wire.read_task(first)
    assert read.token == ""
    assert (read.job_id, read.job_type, read.queue) == (task.job_id, task.job_type, task.queue)
    assert (read.attempt, read.timeout, read.input) == (task.attempt, task.timeout, task.input)


@pytest.mark.parametrize(
    "ending",
    [
        Succeeded(Input(b"data")),
        Succeeded(Input(b"", "")),
        Succeeded(Input(b"\xff", "image/png")),
        AttemptFailed(clean_error("E", "m", "t", retryable=False), 1.5),
        Snoozed(2.5),
        Stopped(),
    ],
)
def test_an_ending_arrives_as_it_was_sent(ending: Ending) -> None:
    (frame,) = frames(wire.ending_frame(3, ending, 0.5))
    assert (frame.number, frame.seconds) == (3, 0.5)
    assert wire.read_ending(frame) == ending


@pytest.mark.parametrize(
    "ending", [Interrupted(), AttemptFailed(clean_error("WORKER_LOST", ""), crashed=True)]
)
def test_a_child_has_no_say_in_what_its_parent_finds(ending: Ending) -> None:
    with pytest.raises(ValueError, match="cannot end"):
        wire.ending_frame(3, ending, 0.0)


@pytest.mark.parametrize(
    "report",
    [Progress(1.0, 0.0, "é"), Log("INFO", "\n"), Output(text="é"), Output(data=b"\xff")],
)
def test_a_report_arrives_as_it_was_sent(report: Report) -> None:
    (frame,) = frames(wire.report_frame(3, report))
    assert wire.read_report(frame) == report


def test_job_types_arrive_as_they_were_sent() -> None:
    types = [JobTypeInfo("a", "does", "{}", "q", 3, 1.5), JobTypeInfo("b")]
    (frame,) = frames(wire.ready_frame(types))
    assert wire.read_ready(frame) == types


@pytest.mark.parametrize(
    "data",
    [
        b"some text that a handler has written into the wrong place",
        wire._PREFIX.pack(wire.SUCCEEDED, 1, math.nan, 0, 0),
        wire._PREFIX.pack(wire.SUCCEEDED, 1, math.inf, 0, 0),
        wire._PREFIX.pack(wire.SUCCEEDED, 1, -1.0, 0, 0),
        wire._PREFIX.pack(wire.SUCCEEDED, 1, 0.0, 0, 2**31),
        wire._PREFIX.pack(b"?", 1, 0.0, 0, 0),
    ],
)
def test_what_is_no_frame_is_told(data: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        frames(data)
