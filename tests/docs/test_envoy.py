"""Envoy with the configuration of docs/envoy: JSON and gRPC-Web on one port."""

from __future__ import annotations

import base64
import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from generated.jobsvc.v1.job_service_pb2 import (
    GetJobRequest,
    SubmitJobRequest,
    SubmitJobResponse,
    WatchJobRequest,
    WatchJobResponse,
)
from tests.docs.shell import BIN
from tests.harness.process import ROOT
from tests.services import Node

PAGE = ROOT / "docs/browser.md"
JSON = "application/json"
JOB_SERVICE = "/jobsvc.v1.JobService/"
UNKNOWN_ID = "01a21082-3a60-7398-bb31-52f58ee02494"
ORIGIN = "https://app.example.com"
NOBODYS_QUEUE = "browser-test"
SECONDS_MAX = 30


class Envoy(Node):
    """The configuration as it is, but for addresses and the place of the protoset."""

    def __init__(self, server: str, protoset: Path) -> None:
        super().__init__("envoy")
        text = (ROOT / "docs/envoy/envoy.yaml").read_text()
        for written, here in (
            ("{ address: 0.0.0.0, port_value: 8080 }", _socket("127.0.0.1", self.port)),
            ("{ address: 127.0.0.1, port_value: 50051 }", _socket(*server.split(":"))),
            ("/etc/envoy/jobsvc.protoset", str(protoset)),
        ):
            assert text.count(written) == 1
            text = text.replace(written, here)
        self._config = self.directory / "envoy.yaml"
        self._config.write_text(text)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def request(
        self, method: str, path: str, body: bytes = b"", /, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Header names with `_` for `-`."""
        with closing(http.client.HTTPConnection(self.url, timeout=SECONDS_MAX)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            with connection.getresponse() as response:
                yield response

    def _launch(self) -> subprocess.Popen[bytes]:
        options = ("--use-dynamic-base-id", "--log-level", "warning", "--concurrency", "1")
        return self._spawn([str(BIN / "envoy"), "-c", str(self._config), *options])

    def _probe(self) -> None:
        with self.request("GET", "/") as response:
            assert response.status == http.client.NOT_FOUND

    def _wipe(self) -> None:
        """It stores nothing."""


def _socket(host: str, port: str | int) -> str:
    return f"{{ address: {host}, port_value: {port} }}"


@pytest.fixture(scope="module")
def envoy(dev_address: str, released: Path) -> Iterator[Envoy]:
    with Envoy(dev_address, released / "jobsvc.protoset") as node:
        yield node


# JSON.


def post(envoy: Envoy, method: str, body: object) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    with envoy.request("POST", JOB_SERVICE + method, data, content_type=JSON) as response:
        assert response.headers["content-type"] == JSON
        return response.status, json.loads(response.read())


def submit(envoy: Envoy, **fields: object) -> str:
    status, answer = post(envoy, "SubmitJob", {"job_type": "demo.echo", **fields})
    assert status == http.client.OK
    return str(answer["job"]["job_id"])


def test_submit_and_get_as_json(envoy: Envoy) -> None:
    job_id = submit(envoy, payload={"a": [1, "é"]}, labels={"page": "browser"})
    status, result = post(envoy, "GetResult", {"job_id": job_id, "wait": "20s"})
    assert (status, result["result"]) == (http.client.OK, {"a": [1, "é"]})
    status, answer = post(envoy, "GetJob", {"job_id": job_id})
    assert (status, answer["job"]["state"]) == (http.client.OK, "JOB_STATE_SUCCEEDED")
    assert answer["job"]["payload"] == {"a": [1, "é"]}


def test_a_watch_comes_line_by_line_while_the_job_goes_on(envoy: Envoy) -> None:
    job_id = submit(envoy, queue=NOBODYS_QUEUE)
    body = json.dumps({"job_id": job_id, "heartbeat_interval": "1s"}).encode()
    with envoy.request("POST", JOB_SERVICE + "WatchJob", body, content_type=JSON) as stream:
        assert json.loads(stream.readline())["event"]["type"] == "JOB_EVENT_TYPE_SUBMITTED"
        assert json.loads(stream.readline())["heartbeat"]["last_sequence"] == "1"
        assert post(envoy, "CancelJob", {"job_id": job_id})[0] == http.client.OK
        rest = [json.loads(line) for line in stream]
    (event,) = [message["event"] for message in rest if "event" in message]
    assert (event["sequence"], event["state"]) == ("2", "JOB_STATE_CANCELLED")


def test_an_error_is_json_with_its_details(envoy: Envoy) -> None:
    status, error = post(envoy, "SubmitJob", {"job_type": "demo.echo", "queue": "No"})
    assert (status, error["code"]) == (http.client.BAD_REQUEST, 3)
    info, bad = error["details"]
    assert (info["reason"], info["domain"]) == ("INVALID_FIELD", "jobsvc")
    assert [violation["field"] for violation in bad["field_violations"]] == ["queue"]
    for method in ("GetJob", "WatchJob"):
        status, error = post(envoy, method, {"job_id": UNKNOWN_ID})
        assert (status, error["details"][0]["reason"]) == (http.client.NOT_FOUND, "JOB_UNKNOWN")


@pytest.mark.parametrize(
    ("path", "content_type", "body", "status"),
    [
        (f"{JOB_SERVICE}GetJobb", JSON, b"{}", http.client.NOT_FOUND),
        (f"{JOB_SERVICE}GetJob?job_i=1", JSON, b"{}", http.client.BAD_REQUEST),
        (f"{JOB_SERVICE}GetJob", JSON, b'{"job_id": [', http.client.BAD_REQUEST),
        (f"{JOB_SERVICE}SubmitJob", "text/plain", b"{}", http.client.UNSUPPORTED_MEDIA_TYPE),
        ("/grpc.health.v1.Health/Check", JSON, b"{}", http.client.NOT_FOUND),
    ],
)
def test_what_is_refused_before_the_service_is_asked(
    envoy: Envoy, path: str, content_type: str, body: bytes, status: int
) -> None:
    with envoy.request("POST", path, body, content_type=content_type) as response:
        assert response.status == status


# Calls the page's `watch` with the address of a service, and cuts off its first stream behind the
# first message.
PAGE_RUNNER = """
const [base, jobId] = process.argv.slice(1);
const real = globalThis.fetch;
const asked = [];
globalThis.fetch = async (path, options) => {
  const response = await real(base + path, options);
  asked.push(JSON.parse(options.body).after_sequence);
  if (asked.length > 1) return response;
  const { value } = await response.body.getReader().read();
  const end = value.indexOf(10) + 1;
  return new Response(value.slice(0, end + 5));
};
const seen = [];
for await (const event of watch(jobId)) seen.push(event.sequence);
console.log(JSON.stringify({ asked, seen }));
"""


def test_the_watch_of_the_page_resumes(envoy: Envoy) -> None:
    job_id = submit(envoy)
    post(envoy, "GetResult", {"job_id": job_id, "wait": "20s"})
    (source,) = re.findall(r"^```js\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    command = ["node", "--input-type=module", "-e", source + PAGE_RUNNER, "--"]
    output = subprocess.check_output([*command, f"http://{envoy.url}", job_id], timeout=SECONDS_MAX)
    assert json.loads(output) == {"asked": ["0", "1"], "seen": ["1", "2", "3"]}


def test_pages_of_a_named_origin_may_call(envoy: Envoy) -> None:
    asked = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization, content-type",
    }
    path = JOB_SERVICE + "SubmitJob"
    with envoy.request("OPTIONS", path, b"", origin=ORIGIN, **asked) as answer:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in answer.headers["access-control-allow-headers"]
    with envoy.request("OPTIONS", path, b"", origin="https://other.example", **asked) as answer:
        assert answer.headers["access-control-allow-origin"] is None


# gRPC-Web.


def call_web(envoy: Envoy, method: str, request: Message) -> tuple[list[bytes], dict[str, str]]:
    """The messages of the answer, and its trailers (the headers, where there are none)."""
    message = request.SerializeToString()
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    kind = "application/grpc-web+proto"
    path = JOB_SERVICE + method
    with envoy.request("POST", path, framed, content_type=kind, x_grpc_web="1") as response:
        assert response.status == http.client.OK
        assert response.headers["content-type"] == kind
        body, trailers = response.read(), dict(response.headers)
    messages = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        flags, frame, body = body[0], body[5 : 5 + size], body[5 + size :]
        if flags & 0x80:
            lines = frame.decode().splitlines()
            trailers = dict(line.split(":", 1) for line in lines)
        else:
            messages.append(frame)
    return messages, trailers


def test_submit_and_watch_as_grpc_web(envoy: Envoy) -> None:
    (message,), trailers = call_web(envoy, "SubmitJob", SubmitJobRequest(job_type="demo.echo"))
    assert trailers["grpc-status"] == "0"
    job_id = SubmitJobResponse.FromString(message).job.job_id
    messages, trailers = call_web(envoy, "WatchJob", WatchJobRequest(job_id=job_id))
    assert trailers["grpc-status"] == "0"
    answers = [WatchJobResponse.FromString(message) for message in messages]
    events = [answer.event.sequence for answer in answers if answer.HasField("event")]
    assert events == [1, 2, 3]


def test_an_error_as_grpc_web_has_its_details(envoy: Envoy) -> None:
    messages, trailers = call_web(envoy, "GetJob", GetJobRequest(job_id=UNKNOWN_ID))
    assert (messages, trailers["grpc-status"]) == ([], "5")
    details = _status(trailers["grpc-status-details-bin"]).details
    info = error_details_pb2.ErrorInfo()
    assert details[0].Unpack(info)
    assert info.reason == "JOB_UNKNOWN"


def _status(encoded: str) -> Any:
    """Base64 that may have no padding."""
    return status_pb2.Status.FromString(base64.b64decode(encoded + "=="))
