"""The trace that a call belongs to, with and without OpenTelemetry recording."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobsvc import tracing
from jobsvc.core.attempts import Claimed, Input

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = ("traceparent", f"00-{TRACE}-{SPAN}-01")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("jobsvc"))
    yield exporter
    provider.shutdown()


@pytest.mark.parametrize(
    "value",
    [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-what-follows"],
)
def test_a_traceparent_is_taken_over(value: str) -> None:
    call = tracing.begin_call("SubmitJob", [("x", "y"), ("traceparent", value)])
    assert (call.trace_id, call.span_id, call.span) == (TRACE, SPAN, None)


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"01-{TRACE}-{SPAN}-01more",
        f" 00-{TRACE}-{SPAN}-01",
        b"\xff",
    ],
)
def test_anything_else_makes_a_new_trace(value: str | bytes) -> None:
    calls = [tracing.begin_call("GetJob", m) for m in ([("traceparent", value)], [], [])]
    assert len({call.trace_id for call in calls}) == 3
    assert TRACE not in {call.trace_id for call in calls}
    assert all(re.fullmatch("[0-9a-f]{32}", call.trace_id) for call in calls)
    assert {call.span_id for call in calls} == {""}


def test_a_call_and_its_job_s_attempt_are_linked(spans: InMemorySpanExporter) -> None:
    call = tracing.begin_call("JobService/SubmitJob", [PARENT])
    call.end("OK")
    claimed = Claimed(
        "id", "token", "demo", "default", 1, Input(), 60.0, call.trace_id, call.span_id
    )
    tracing.end_attempt(tracing.begin_attempt(claimed, "w1"), "failed", failed=True)
    submit, run = spans.get_finished_spans()
    assert (submit.name, run.name) == ("JobService/SubmitJob", "run demo")
    assert _ids(submit)[0] == _ids(run)[0] == TRACE == call.trace_id
    assert submit.parent is not None
    assert f"{submit.parent.span_id:016x}" == SPAN
    assert [f"{link.context.span_id:016x}" for link in run.links] == [_ids(submit)[1]]
    assert run.attributes is not None
    assert run.attributes["jobsvc.job_id"] == "id"
    assert (submit.status.is_ok, run.status.is_ok) == (True, False)


def test_a_refused_call_is_an_error_of_its_span(spans: InMemorySpanExporter) -> None:
    tracing.begin_call("JobService/GetJob", []).end("NOT_FOUND")
    (span,) = spans.get_finished_spans()
    assert span.status.description == "NOT_FOUND"


def test_without_opentelemetry_nothing_is_made() -> None:
    claimed = Claimed("id", "token", "demo", "default", 1, Input(), 60.0, TRACE, SPAN)
    assert tracing.begin_attempt(claimed, "w1") is None
    tracing.end_attempt(None, "succeeded", failed=False)


def _ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"
