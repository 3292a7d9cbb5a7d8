"""`job` and JobContext, as the author of a handler meets them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Optional

import pytest
from pydantic import BaseModel

from jobsvc.core.attempts import Log, Output, Progress, Report
from worker import Abort, JobCancelled, JobContext, Retry, Snooze, job, registry
from worker.api import TestingContext, span_seconds
from worker.child.execution import AttemptContext
from worker.registry import JobDefinition

from .recorder import make_task


class Thumbnail(BaseModel):
    url: str
    width: int = 100


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_definitions", {})


def definition(name: str) -> JobDefinition:
    found = registry.find(name)
    assert found is not None
    return found


def test_what_is_announced() -> None:
    @job("thumbnail", timeout="2m", max_attempts=5, queue="images")
    def thumbnail(payload: Thumbnail, ctx: JobContext) -> dict[str, int]:
        """Makes a
        thumbnail.

        Slowly.
        """
        return {}

    info = definition("thumbnail").describe()
    assert (info.name, info.description) == ("thumbnail", "Makes a thumbnail.")
    assert (info.timeout, info.max_attempts, info.queue) == (120.0, 5, "images")
    assert info.payload_schema is not None
    schema = json.loads(info.payload_schema)
    assert schema["required"] == ["url"]
    assert thumbnail(Thumbnail(url=""), JobContext.for_testing()) == {}


def plain(payload: dict[str, Any]) -> None: ...
def bare(payload): ...  # type: ignore[no-untyped-def]
def mapping(payload: Mapping[str, Any], ctx: JobContext) -> None: ...
def blob(payload: bytes) -> None: ...
def either(payload: dict[str, Any] | bytes) -> None: ...
async def asynchronous(payload: Thumbnail, ctx: JobContext) -> None: ...


@pytest.mark.parametrize(
    ("function", "kind", "takes_context"),
    [
        (plain, "object", False),
        (bare, "object", False),
        (mapping, "object", True),
        (blob, "blob", False),
        (either, "any", False),
        (asynchronous, "model", True),
    ],
)
def test_the_annotation_decides(
    function: Callable[..., Any], kind: str, takes_context: bool
) -> None:
    assert job("x", description="")(function) is function
    found = definition("x")
    assert (found.payload_kind, found.takes_context) == (kind, takes_context)
    assert (found.describe().payload_schema is None) == (kind != "model")


def nothing() -> None: ...
def three(payload: dict[str, Any], ctx: JobContext, more: int) -> None: ...
def keyword(payload: dict[str, Any], *, more: int) -> None: ...
def number(payload: int) -> None: ...
def optional(payload: Optional[Thumbnail]) -> None: ...  # noqa: UP045 - that is what is tested
def unknown(payload: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def generator(payload: dict[str, Any]) -> Iterator[int]:
    yield 1


async def async_generator(payload: dict[str, Any], ctx: JobContext) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    "function",
    [nothing, three, keyword, number, optional, unknown, len, generator, async_generator],
)
def test_functions_that_cannot_be_handlers(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError):
        job("x")(function)
    assert registry.find("x") is None


def test_a_generator_that_is_run_by_its_decorator() -> None:
    @job("x")
    @wraps(generator)
    def listed(payload: dict[str, Any]) -> list[int]:
        return list(generator(payload))

    assert definition("x").function is listed


@pytest.mark.parametrize(
    "options",
    [
        {"name": "Upper"},
        {"name": ""},
        {"name": "x" * 101},
        {"name": "x", "queue": "No"},
        {"name": "x", "max_attempts": 0},
        {"name": "x", "max_attempts": 101},
        {"name": "x", "timeout": "500ms"},
        {"name": "x", "timeout": timedelta(days=2)},
        {"name": "x", "timeout": "soon"},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        job(**options)


def test_one_name_for_two_functions_names_both() -> None:
    job("x")(plain)
    job("x")(plain)  # the same again, as when a module is run and imported
    with pytest.raises(ValueError, match=r"'x'.*\.plain .*\.blob "):
        job("x")(blob)


@pytest.mark.parametrize(
    ("span", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("2m", 120), ("1h", 3600), ("1.5d", 129600), (7, 7)],
)
def test_spans(span: str | float, seconds: float) -> None:
    assert span_seconds(span) == seconds
    assert Retry(after=span).after_seconds == seconds
    assert Snooze(span).after_seconds == seconds
    assert Snooze(timedelta(seconds=seconds)).after_seconds == seconds


@pytest.mark.parametrize("after", [-1, float("nan"), "-5s", "367d", "1 week", ""])
def test_bad_spans(after: str | float) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Snooze(after)
    with pytest.raises(ValueError, match=r".+"):
        Retry(after=after)


def test_exceptions_say_why() -> None:
    assert str(Abort("no such user")) == "no such user"
    assert Retry().after_seconds is None


def test_a_context_for_tests_keeps_reports() -> None:
    ctx = JobContext.for_testing(attempt=3)
    ctx.progress(1, 4, "one\0")
    ctx.log("hello", "warning")
    ctx.output("text")
    ctx.output(b"data")
    assert ctx.attempt == 3
    assert ctx.reports == [
        Progress(1.0, 4.0, "one\ufffd"),
        Log("WARNING", "hello"),
        Output(text="text"),
        Output(data=b"data"),
    ]


def test_bad_reports() -> None:
    ctx = JobContext.for_testing()
    with pytest.raises(ValueError, match="finite"):
        ctx.progress(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        ctx.progress(1, float("inf"))
    with pytest.raises(ValueError, match="level"):
        ctx.log("x", "LOUD")
    assert ctx.reports == []


def test_a_log_entry_is_cut() -> None:
    ctx = JobContext.for_testing()
    ctx.log("€" * 100_000)
    (report,) = ctx.reports
    assert isinstance(report, Log)
    assert 16_380 <= len(report.message.encode()) <= 16_384


@pytest.mark.parametrize("character", ["a", "ü", "€", "😀"])
def test_output_is_split_between_characters(character: str) -> None:
    ctx = JobContext.for_testing()
    text = "x" + character * 100_000
    ctx.output(text)
    texts = [report.text or "" for report in ctx.reports if isinstance(report, Output)]
    assert "".join(texts) == text
    assert all(len(piece.encode()) <= 65_536 for piece in texts)


def test_output_that_no_text_can_hold() -> None:
    ctx = JobContext.for_testing()
    ctx.output("a\0\r\x1b[0m\ud800")
    (report,) = ctx.reports
    assert isinstance(report, Output)
    assert report.text is not None
    assert report.text.startswith("a\ufffd\r\x1b[0m\ufffd")
    ctx.output(b"")
    assert len(ctx.reports) == 1


def test_bytes_are_split_too() -> None:
    ctx = JobContext.for_testing()
    ctx.output(bytes(150_000))
    sizes = [len(report.data or b"") for report in ctx.reports if isinstance(report, Output)]
    assert sizes == [65_536, 65_536, 18_928]


def test_endless_output_ends() -> None:
    ctx = JobContext.for_testing()
    for _ in range(30):
        ctx.output(bytes(1024 * 1024))
        ctx.log("x" * 16_384)
    size = sum(len(report.data or b"") for report in ctx.reports if isinstance(report, Output))
    assert 8 * 1024 * 1024 < size <= 17 * 1024 * 1024
    assert sum(isinstance(report, Log) for report in ctx.reports) == 30


def attempt_context() -> tuple[AttemptContext, list[Report]]:
    reports: list[Report] = []
    return AttemptContext(make_task("x"), reports.append), reports


def progress(reports: list[Report]) -> list[float]:
    return [report.current for report in reports if isinstance(report, Progress)]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_ten_steps_in_a_second_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ctx, reports = attempt_context()
    for step in range(50):
        ctx.progress(step)
        clock.now += 0.101
    assert progress(reports) == list(range(50))


def test_a_burst_is_cut_and_its_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    ctx, reports = attempt_context()
    for step in range(1000):
        ctx.progress(step)
    ctx.close()
    ctx.progress(1000)
    ctx.log("too late")
    assert progress(reports) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 999]
    assert len(reports) == 10


def test_no_second_has_more_than_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times: list[float] = []
    ctx = AttemptContext(make_task("x"), lambda _: times.append(clock.now))
    for step in range(5000):
        ctx.progress(step)
        clock.now += 0.001
    assert all(later - earlier >= 1.0 for earlier, later in zip(times, times[10:], strict=False))
    assert len(times) >= 45


def test_a_waiting_progress_is_sent_by_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ctx, reports = attempt_context()
    for step in range(20):
        ctx.progress(step)
    ctx.tick()
    assert len(reports) == 9
    clock.now += 0.1
    ctx.tick()
    ctx.tick()
    assert progress(reports)[9:] == [19]


def test_cancellation() -> None:
    ctx: TestingContext = JobContext.for_testing()
    ctx.raise_if_cancelled()
    ctx.sleep(0)
    threading.Timer(0.01, ctx.cancel).start()
    with pytest.raises(JobCancelled):
        ctx.sleep(30)
    assert ctx.cancelled
    assert not ctx.lease_lost
    with pytest.raises(JobCancelled):
        ctx.raise_if_cancelled()


def test_cancellation_passes_through_except_exception() -> None:
    assert not issubclass(JobCancelled, Exception)


def test_the_deadline() -> None:
    ctx = JobContext.for_testing(timeout="2m")
    left = ctx.deadline - datetime.now(UTC)
    assert timedelta(seconds=110) < left <= timedelta(seconds=120)
