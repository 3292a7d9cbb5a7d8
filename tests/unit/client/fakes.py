"""A clock that tests move, and a server that tests play, on grpcio-testing's fake channel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc_testing
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from generated.jobsvc.v1.job_pb2 import JobEvent

T = TypeVar("T")
SERVICE = job_service_pb2.DESCRIPTOR.services_by_name["JobService"]
JOB_ID = "0197f3a0-0000-7000-8000-000000000001"


@dataclass
class _Timer:
    due: float
    behavior: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._changed = threading.Condition()
        self._timers: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def sleep_for(self, duration: float) -> None:
        self.slept.append(duration)
        self.advance(duration)

    def call_in(self, behavior: Callable[[], None], delay: float) -> _Timer:
        with self._changed:
            timer = _Timer(self.now + delay, behavior)
            self._timers.append(timer)
            self._changed.notify_all()
            return timer

    @property
    def timers(self) -> list[_Timer]:
        return [timer for timer in self._timers if not timer.cancelled]

    def await_timer(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.timers, timeout=10)

    def advance(self, duration: float) -> None:
        self.now += duration
        while True:
            with self._changed:
                due = [timer for timer in self.timers if timer.due <= self.now]
                self._timers = [timer for timer in self.timers if timer not in due]
            if not due:
                return
            for timer in due:
                timer.behavior()


class Server:
    """The other end of `channel`."""

    def __init__(self) -> None:
        self.channel: Any = grpc_testing.channel(
            list(job_service_pb2.DESCRIPTOR.services_by_name.values()),
            grpc_testing.strict_fake_time(0),
        )

    def take(self, method: str) -> tuple[tuple[tuple[str, str], ...], Any, Any]:
        """Metadata, request and the RPC to answer."""
        metadata, request, rpc = self.channel.take_unary_unary(SERVICE.methods_by_name[method])
        return tuple(metadata), request, rpc

    def take_stream(self, method: str) -> tuple[Any, Any]:
        _, request, rpc = self.channel.take_unary_stream(SERVICE.methods_by_name[method])
        return request, rpc

    def answer(self, method: str, response: object) -> Any:
        """Answers the next call and returns its request."""
        _, request, rpc = self.take(method)
        rpc.terminate(response, (), grpc.StatusCode.OK, "")
        return request

    def refuse(self, method: str, code: grpc.StatusCode, **details: Any) -> Any:
        _, request, rpc = self.take(method)
        rpc.terminate(None, trailer(code, **details), code, "no")
        return request


def break_off(rpc: Any, code: grpc.StatusCode, **details: Any) -> None:
    rpc.terminate(trailer(code, **details), code, "no")


def trailer(
    code: grpc.StatusCode,
    *,
    reason: str = "",
    metadata: dict[str, str] | None = None,
    violations: dict[str, str] | None = None,
    retry: float | None = None,
    pushback: str | None = None,
) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of an error as the service sends it; none of it without a reason."""
    entries: list[tuple[str, str | bytes]] = []
    if pushback is not None:
        entries.append(("grpc-retry-pushback-ms", pushback))
    if not reason:
        return tuple(entries)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="jobsvc", metadata=metadata or {})
    ]
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations.items():
            bad.field_violations.add(field=field, description=description)
        details.append(bad)
    if retry is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(retry * 1e9))
        details.append(info)
    status = status_pb2.Status(code=code.value[0], message="no")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return (*entries, ("grpc-status-details-bin", status.SerializeToString()))


def start(call: Callable[[], T]) -> Future[T]:
    """Runs the client's side on a thread that holds up no exit."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 (handed to whoever asks for the result)
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


STATES = {
    job_pb2.JOB_EVENT_TYPE_SUBMITTED: job_pb2.JOB_STATE_QUEUED,
    job_pb2.JOB_EVENT_TYPE_STARTED: job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_EVENT_TYPE_LOG: job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_EVENT_TYPE_SUCCEEDED: job_pb2.JOB_STATE_SUCCEEDED,
}


def event(sequence: int, kind: Any = job_pb2.JOB_EVENT_TYPE_LOG) -> JobEvent:
    return JobEvent(job_id=JOB_ID, sequence=sequence, type=kind, state=STATES[kind])


def last(sequence: int) -> JobEvent:
    return event(sequence, job_pb2.JOB_EVENT_TYPE_SUCCEEDED)
