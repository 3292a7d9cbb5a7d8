"""The server that is attacked, and an ordinary caller of it."""

from __future__ import annotations

import hashlib
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import grpc
import psutil

from generated.jobsvc.v1 import job_service_pb2 as pb
from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from scripts.attacks.handlers import CHUNK_BYTES
from scripts.benchmarks.programs import Program
from tests.harness.wait import until

MIB = 1024 * 1024
JOBSVC = Path(sys.executable).parent / "jobsvc"
CALL_SECONDS = 60.0
PAUSE_SECONDS = 0.01
LOOK_SECONDS = 0.02
TYPES_SECONDS = 30.0


class Victim:
    """`jobsvc dev` with two tokens: one for who attacks, one for who does not."""

    def __init__(self, directory: Path) -> None:
        self.token, self.other = secrets.token_urlsafe(), secrets.token_urlsafe()
        lines = [
            f"{name} {hashlib.sha256(token.encode()).hexdigest()} admin"
            for name, token in (("ordinary", self.token), ("attacker", self.other))
        ]
        settings = {
            "JOBSVC_TOKENS": "\n".join(lines),
            "JOBSVC_LISTEN": "127.0.0.1:0",
            "JOBSVC_METRICS_LISTEN": "",
            "JOBSVC_LOG_FORMAT": "json",
            "JOBSVC_LOG_LEVEL": "warning",
            "JOBSVC_HANDLERS": "worker.handlers,scripts.attacks.handlers",
        }
        self._program = Program(
            directory / "server.log",
            [
                str(Path(sys.executable).parent / "jobsvc"),
                "dev",
                "--data-dir",
                str(directory / "data"),
            ],
            settings,
            piped=True,
        )
        line = self._program.read_line()
        self.address = line.rpartition("--address ")[2].strip()
        self._process = psutil.Process(self._program.pid)
        self._channel = grpc.insecure_channel(self.address)
        self.stub: Any = JobServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._program.close()

    @property
    def memory(self) -> float:
        """MiB that the server's own process holds."""
        return float(self._process.memory_info().rss) / MIB

    def target(self) -> dict[str, str]:
        """What the attacker is told."""
        loud = self._submit("abuse.talk", {"chunks": 8 * MIB // CHUNK_BYTES})
        until(lambda: self._ended(loud), TYPES_SECONDS, "the job that talks ends")
        return {
            "address": self.address,
            "token": self.other,
            "big_job_id": self._submit("demo.echo", {"text": "x" * 900_000}, delayed=True),
            "loud_job_id": loud,
            "waiting_job_id": self._submit("demo.echo", {}, delayed=True),
        }

    def call(self, method: str, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {self.token}"),)
        return getattr(self.stub, method)(request, metadata=metadata, timeout=CALL_SECONDS)

    def _submit(self, job_type: str, payload: dict[str, Any], *, delayed: bool = False) -> str:
        request = pb.SubmitJobRequest(job_type=job_type)
        request.payload.update(payload)
        if delayed:
            request.delay.FromSeconds(86_400)

        def submit() -> str:
            with suppress(grpc.RpcError):
                return str(self.call("SubmitJob", request).job.job_id)
            return ""

        return until(submit, TYPES_SECONDS, f"a job of {job_type} is taken")

    def _ended(self, job_id: str) -> bool:
        return bool(
            self.call("GetJob", pb.GetJobRequest(job_id=job_id)).job.HasField("finish_time")
        )


class Beside:
    """An ordinary caller, and a look at the server's memory, until it is stopped."""

    def __init__(self, victim: Victim, job_id: str) -> None:
        self._victim = victim
        self._request = pb.GetJobRequest(job_id=job_id)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._call, self._look)]
        self._waits: list[float] = []
        self._gap = 0.0
        self.peak = 0.0
        self.failures = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def p99_milliseconds(self) -> float:
        return sorted(self._waits)[int(len(self._waits) * 0.99)] * 1_000 if self._waits else 0.0

    @property
    def longest_milliseconds(self) -> float:
        """Between two answers."""
        return self._gap * 1_000

    def _call(self) -> None:
        answered = time.monotonic()
        while not self._stop.wait(PAUSE_SECONDS):
            start = time.monotonic()
            try:
                self._victim.call("GetJob", self._request)
            except grpc.RpcError:
                self.failures += 1
                continue
            now = time.monotonic()
            self._waits.append(now - start)
            self._gap, answered = max(self._gap, now - answered), now
        self._gap = max(self._gap, time.monotonic() - answered)

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.peak = max(self.peak, self._victim.memory)
