"""A server whose answers are scripted, and the command line run against it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from generated.jobsvc.v1 import admin_service_pb2, job_service_pb2, schedule_service_pb2
from jobsvc.cli import main


@dataclass
class Refusal:
    """What the service refuses a call with."""

    code: grpc.StatusCode
    reason: str
    message: str

    def abort(self, context: grpc.ServicerContext) -> None:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain="jobsvc"))
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=[detail])
        context.abort_with_status(rpc_status.to_status(status))


@dataclass
class Script:
    """Answers each RPC with what the test has put into `answers`, and keeps the requests."""

    address: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def _answer(self, name: str, request: Message, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata = {str(k): str(v) for k, v in context.invocation_metadata()}
        answer = self.answers[name]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Refusal):
            answer.abort(context)
        return answer

    def handlers(self) -> Iterator[grpc.GenericRpcHandler]:
        """Every RPC of the three services, answered in the same way."""
        for file in (job_service_pb2, schedule_service_pb2, admin_service_pb2):
            for service in file.DESCRIPTOR.services_by_name.values():
                handlers = {m.name: self._handler(file, m) for m in service.methods}
                yield grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _handler(self, file: Any, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(request: Any, context: Any) -> Any:
            found = self._answer(method.name, request, context)
            if method.name == "SubmitJob":
                found.job.idempotency_key = request.idempotency_key
            return iter(found) if method.server_streaming else found

        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            answer,
            request_deserializer=getattr(file, method.input_type.name).FromString,
            response_serializer=getattr(file, method.output_type.name).SerializeToString,
        )


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(tuple(script.handlers()))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    script.answers["health"] = servicer
    script.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield script
    server.stop(0).wait()


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `jobsvc` with the given words, in this process; stdout is no terminal."""
    interrupted = signal.getsignal(signal.SIGINT)

    def run(*words: str, **environ: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["jobsvc", *words])
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, out, err)

    yield run
    signal.signal(signal.SIGINT, interrupted)


@pytest.fixture
def jobsvc(script: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """As `run`, with the scripted server's address in the environment."""
    monkeypatch.setenv("JOBSVC_ADDRESS", script.address)
    return run
