"""Node: one process with @grpc/grpc-js and @grpc/proto-loader, told what to call line by line."""

from __future__ import annotations

import itertools
import json
import queue
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.conformance.callers.base import (
    CALL_SECONDS_MAX,
    GOOGLE,
    PROTOS,
    Caller,
    Json,
    Reply,
    Stream,
)
from tests.conformance.callers.python import descriptor_set

NODE = Path(__file__).parents[1] / "node"


def install() -> None:
    """Installs what the script needs, as its lock file says. Raises RuntimeError."""
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    try:
        done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("the Node client needs node and npm on the PATH") from None
    if done.returncode:
        raise RuntimeError(f"npm ci failed in {NODE}:\n{done.stderr}")


class NodeCaller(Caller):
    name = "node"

    def __init__(self, address: str) -> None:
        """What `install` installs must be there."""
        self._files = tempfile.TemporaryDirectory(prefix="jobsvc-conformance-")
        others = Path(self._files.name) / "others.protoset"
        others.write_bytes(descriptor_set(health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR))
        self._process = subprocess.Popen(
            ["node", str(NODE / "caller.js"), address, str(others), str(PROTOS), str(GOOGLE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ids = itertools.count(1)
        self._writing = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[Json | None]] = {}
        self._reader = threading.Thread(target=self._read, name="node", daemon=True)
        self._reader.start()

    def call(self, method: str, request: Json, token: str | None = None) -> Reply:
        return _only(self._begin("call", method=method, request=request, token=token))

    def stream(self, method: str, request: Json, token: str | None = None) -> Stream:
        return self._begin("stream", method=method, request=request, token=token)

    def services(self) -> list[str]:
        return list(_only(self._begin("services")).body["services"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._files.cleanup()

    def _begin(self, op: str, **order: Any) -> _NodeStream:
        number = next(self._ids)
        answers = self._answers[number] = queue.SimpleQueue()
        self.tell(id=number, op=op, seconds=CALL_SECONDS_MAX, **order)
        return _NodeStream(self, number, answers)

    def tell(self, **order: Any) -> None:
        """Writes one line."""
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(f"{json.dumps(order)}\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer["id"]].put(answer)
        for waiting in list(self._answers.values()):
            waiting.put(None)


class _NodeStream(Stream):
    def __init__(
        self, caller: NodeCaller, number: int, answers: queue.SimpleQueue[Json | None]
    ) -> None:
        self._caller = caller
        self._number = number
        self._answers = answers
        self._reply: Reply | None = None

    def __next__(self) -> Json:
        if self._reply is not None:
            raise StopIteration
        answer = self._answers.get(timeout=CALL_SECONDS_MAX + 5)
        assert answer is not None, "the Node process has ended"
        if "status" in answer:
            self._reply = Reply.of_status(answer["status"])
            raise StopIteration
        message = answer["message"]
        assert isinstance(message, dict)
        return message

    def close(self) -> None:
        if self._reply is None:
            self._caller.tell(id=self._number, op="stop")

    @property
    def reply(self) -> Reply:
        assert self._reply is not None, "the stream has not ended"
        return self._reply


def _only(stream: _NodeStream) -> Reply:
    """How a call with one answer ended."""
    messages = list(stream)
    if not messages:
        return stream.reply
    assert len(messages) == 1, messages
    return Reply(stream.reply.code, body=messages[0])
