"""Traces: a job carries the W3C trace of the call that submitted it, into every log record.

With the extra `otel` installed and OpenTelemetry's own variable OTEL_EXPORTER_OTLP_ENDPOINT set,
each call is a span, and each attempt another one that links to the call that submitted the job.
Without them no span is made, and the ids alone are passed on.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

with suppress(ImportError):
    from opentelemetry import trace

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

# Makes the spans; none are made without it.
_tracer: Tracer | None = None

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_traceparent = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
).match


class Traced(Protocol):
    """An attempt, as far as its span tells of it."""

    @property
    def job_id(self) -> str: ...
    @property
    def job_type(self) -> str: ...
    @property
    def queue(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def trace_id(self) -> str: ...
    @property
    def span_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class CallTrace:
    """Under which ids a call runs: 32 and 16 hexadecimal digits. `span_id` is the call's own
    span, else the caller's, else empty."""

    trace_id: str
    span_id: str = ""
    span: Span | None = None

    def end(self, code: str) -> None:
        if self.span is not None:
            self.span.set_attribute("rpc.grpc.status", code)
            if code not in ("OK", "CANCELLED"):
                self.span.set_status(trace.StatusCode.ERROR, code)
            self.span.end()


# Of the call that the current task serves.
call_trace: ContextVar[CallTrace] = ContextVar("call_trace")


def configure(role: str) -> None:
    """Exports spans of this process as `jobsvc-ROLE` where that is wanted and installed."""
    global _tracer
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"jobsvc-{role}"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = provider.get_tracer("jobsvc")


def begin_call(name: str, metadata: Iterable[tuple[str, Any]]) -> CallTrace:
    """Continues the trace of a `traceparent` among the metadata, else begins one."""
    parent = _parent(metadata)
    if _tracer is None:
        return CallTrace(*parent[:2]) if parent else CallTrace(f"{random.getrandbits(128):032x}")
    span = _tracer.start_span(
        name,
        context=_context(*parent) if parent else None,
        kind=trace.SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.method": name},
    )
    ids = span.get_span_context()
    return CallTrace(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", span)


def begin_attempt(attempt: Traced, worker_id: str) -> Span | None:
    """A span of its own trace's making would hide the wait in the queue: it belongs to the job's
    trace, and links to the call that submitted it."""
    if _tracer is None:
        return None
    submitted = _context(attempt.trace_id, attempt.span_id, "01") if attempt.span_id else None
    links = [trace.Link(trace.get_current_span(submitted).get_span_context())] if submitted else []
    return _tracer.start_span(
        f"run {attempt.job_type}",
        context=submitted,
        kind=trace.SpanKind.CONSUMER,
        links=links,
        attributes={
            "jobsvc.job_id": attempt.job_id,
            "jobsvc.job_type": attempt.job_type,
            "jobsvc.queue": attempt.queue,
            "jobsvc.attempt": attempt.attempt,
            "jobsvc.worker_id": worker_id,
        },
    )


def end_attempt(span: Span | None, outcome: str, *, failed: bool) -> None:
    if span is not None:
        span.set_attribute("jobsvc.outcome", outcome)
        if failed:
            span.set_status(trace.StatusCode.ERROR, outcome)
        span.end()


def _parent(metadata: Iterable[tuple[str, Any]]) -> tuple[str, str, str] | None:
    for key, value in metadata:
        if key == "traceparent" and isinstance(value, str):
            found = _traceparent(value)
            # Later versions may add fields; version 00 has none.
            rest = value[found.end() :] if found else ""
            if found and (not rest or (rest[0] == "-" and not value.startswith("00"))):
                return found[1], found[2], found[3]
    return None


def _context(trace_id: str, span_id: str, flags: str) -> Any:
    remote = trace.SpanContext(
        int(trace_id, 16), int(span_id, 16), True, trace.TraceFlags(int(flags, 16))
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(remote))
