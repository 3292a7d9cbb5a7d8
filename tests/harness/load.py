"""Submits jobs from many threads and keeps a log of every id that was acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import grpc
from google.protobuf.struct_pb2 import Value

from generated.jobsvc.v1.job_service_pb2 import SubmitJobsRequest
from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from jobsvc.client import (
    RetryPolicy,
    SubmitJobRequest,
    SubmitJobResponse,
    from_value,
    new_job,
)
from tests.harness.wait import until

CALL_SECONDS = 10.0
PAUSE_SECONDS = 0.05
# CANCELLED: by grpc itself, of what reaches a server in the moment in which it stops.
_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)

QUICK_RETRY = RetryPolicy(backoff_multiplier=1.0)
QUICK_RETRY.initial_backoff.FromMilliseconds(50)
QUICK_RETRY.max_backoff.FromMilliseconds(50)


def echo(key: str, **options: Any) -> SubmitJobRequest:
    return new_job("demo.echo", {"key": key}, idempotency_key=key, **options)


def fail_once(key: str) -> SubmitJobRequest:
    return new_job("demo.fail", {"times": 1}, idempotency_key=key, retry_policy=QUICK_RETRY)


def sleep(key: str, seconds: float, steps: int) -> SubmitJobRequest:
    payload = {"seconds": seconds, "steps": steps}
    return new_job("demo.sleep", payload, idempotency_key=key, retry_policy=QUICK_RETRY)


def mixed(count: int, *, sleeps: int = 0, seconds: float = 1.0) -> list[SubmitJobRequest]:
    """`sleeps` jobs that tell of their progress first, and of the rest a tenth that fails once."""
    requests = [sleep(f"sleep-{i}", seconds, steps=10) for i in range(sleeps)]
    requests += [
        fail_once(f"fail-{i}") if i % 10 == 0 else echo(f"echo-{i}") for i in range(count - sleeps)
    ]
    return requests


def assert_pure(results: Mapping[str, Value]) -> None:
    """Every result is the one that its job's payload makes, whatever happened on the way."""
    for key, value in results.items():
        result = from_value(value)
        if key.startswith("echo-"):
            assert result == {"key": key}, key
        elif key.startswith("fail-"):
            assert isinstance(result, dict), key
            assert result["attempt"] >= 2, key


class Load:
    """Each request is repeated under its own key until it is acknowledged."""

    def __init__(
        self,
        connect: Callable[[], grpc.Channel],
        requests: Sequence[SubmitJobRequest],
        *,
        threads: int = 8,
        bulk: int = 1,
    ) -> None:
        """`bulk`: so many requests in one call."""
        self.total = len(requests)
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self._bulk = bulk
        self._chunks = (list(requests[i : i + bulk]) for i in range(0, len(requests), bulk))
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(connect(),), name=f"load-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wait_acknowledged(self, count: int, seconds: float = 60.0) -> list[str]:
        """The first `count` ids."""

        def enough() -> bool:
            assert not self.refused, self.refused
            return len(self.acknowledged) >= count

        until(enough, seconds, f"{count} submits are acknowledged")
        return self.acknowledged[:count]

    def join(self, seconds: float = 60.0) -> list[str]:
        """All ids, once every request is acknowledged."""
        return self.wait_acknowledged(self.total, seconds)

    def stop(self) -> None:
        """Ends the threads, wherever they are."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, channel: grpc.Channel) -> None:
        stub = JobServiceStub(channel)
        while not self._stopping.is_set():
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._submit(stub, chunk)

    def _submit(self, stub: JobServiceStub, chunk: list[SubmitJobRequest]) -> None:
        while not self._stopping.is_set():
            try:
                answers = self._call(stub, chunk)
            except grpc.RpcError as error:
                call = cast(grpc.Call, error)
                if call.code() not in _AGAIN:
                    self.refused.append(f"{call.code()}: {call.details()}")
                    return
                self._stopping.wait(PAUSE_SECONDS)
                continue
            with self._lock:
                self.acknowledged += [answer.job.job_id for answer in answers]
            return

    def _call(
        self, stub: JobServiceStub, chunk: list[SubmitJobRequest]
    ) -> Sequence[SubmitJobResponse]:
        if self._bulk == 1:
            return [stub.SubmitJob(chunk[0], timeout=CALL_SECONDS)]
        return stub.SubmitJobs(SubmitJobsRequest(requests=chunk), timeout=CALL_SECONDS).responses
