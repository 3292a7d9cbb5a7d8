"""The commands that start, prepare and ask the service."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.pem import Authority
from tests.unit.cli.conftest import Run, Script


def test_settings_are_listed_without_secrets(run: Run) -> None:
    ended = run("settings", JOBSVC_BROKER_URL="amqp://u:hunter2@h", JOBSVC_TOKEN="hunter2")
    assert ended.code == 0
    assert "hunter2" not in ended.out
    lines = {line.split()[0]: line.split()[1:] for line in ended.lines}
    assert lines["JOBSVC_BROKER_URL"] == ["amqp://u:***@h", "environment"]
    assert lines["JOBSVC_LISTEN"] == ["127.0.0.1:50051", "default"]


@pytest.mark.parametrize("command", ["server", "worker", "migrate"])
def test_a_start_says_every_bad_setting(run: Run, command: str) -> None:
    ended = run(command, JOBSVC_LEASE="soon", JOBSVC_TOKENS="x")
    assert (ended.code, ended.out) == (2, "")
    assert "JOBSVC_DATABASE_URL: must be set" in ended.err
    assert "JOBSVC_LEASE: not a span" in ended.err
    assert "JOBSVC_TOKENS: line 1: not of the form" in ended.err


def test_dev_needs_no_urls_but_good_flags(run: Run, tmp_path: Path) -> None:
    ended = run("dev", "--listen", "0.0.0.0:1", "--data-dir", str(tmp_path / "data"))
    assert ended.code == 2
    assert ended.err.count("\n") == 2
    assert "JOBSVC_INSECURE=1" in ended.err
    assert not (tmp_path / "data").exists()


def test_migrate(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    url = f"sqlite:///{path}"
    ended = run("migrate", "--check", JOBSVC_DATABASE_URL=url)
    assert ended.code == 1
    assert ended.lines
    assert run("migrate").code == 0
    with sqlite3.connect(path) as connection:
        connection.execute("SELECT count(*) FROM jobs").fetchone()
    connection.close()
    ended = run("migrate", "--check")
    assert (ended.code, ended.out) == (0, "")


def test_a_token_is_printed_with_the_line_that_stores_it(run: Run) -> None:
    ended = run("token", "ci", "read", "submit")
    assert ended.code == 0
    text, line = ended.lines
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert line == f"ci  {digest}  submit read"
    assert text not in ended.err
    assert run("token", "ci", "read", "submit").lines[0] != text


@pytest.mark.parametrize(
    "words", [["ci"], ["ci", "write"], ["two words", "read"], ["anonymous", "read"], []]
)
def test_no_token_that_could_not_be_stored(run: Run, words: list[str]) -> None:
    ended = run("token", *words)
    assert (ended.code, ended.out) == (2, "")


def test_health_is_asked_without_a_token(script: Script, jobsvc: Run) -> None:
    ended = jobsvc("healthcheck", "--address", script.address, JOBSVC_TOKEN="t0ken")
    assert ended.code == 0
    # Nor is it a reason to refuse to ask.
    ended = jobsvc("healthcheck", "--address", "name.invalid:1")
    assert (ended.code, ended.err.startswith("UNAVAILABLE: ")) == (1, True)


def test_health_of_a_server_with_tls(run: Run, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, key = map(Path, authority.issue("server", "jobs.internal"))
    pair = (key.read_bytes(), certificate.read_bytes())
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    flags = ["--address", f"127.0.0.1:{port}", "--tls-ca", authority.path]
    assert run("healthcheck", *flags).code == 1
    ended = run("healthcheck", *flags, "--tls-server-name", "jobs.internal")
    assert (ended.code, ended.err) == (0, "SERVING\n")
    ended = run("healthcheck", *flags[:2], JOBSVC_TLS_CA=authority.path)
    assert ended.code == 1
    ended = run("healthcheck", *flags[:2], JOBSVC_TLS_SERVER_NAME="jobs.internal")
    assert ended.code == 0
    server.stop(0).wait()


def test_health_of_a_server(script: Script, jobsvc: Run) -> None:
    ended = jobsvc("healthcheck")
    assert (ended.code, ended.err) == (0, "SERVING\n")
    script.answers["health"].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    ended = jobsvc("healthcheck", "--address", script.address)
    assert (ended.code, ended.err) == (1, "NOT_SERVING\n")


def test_health_of_nobody(run: Run) -> None:
    ended = run("healthcheck", "--address", "127.0.0.1:1")
    assert ended.code == 1
    assert ended.err.startswith("UNAVAILABLE: ")


class _Probe(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on stderr, which the tests look at."""


@pytest.fixture
def probe() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Probe) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_health_by_url(run: Run, probe: str) -> None:
    assert run("healthcheck", "--url", probe).code == 0
    assert run("healthcheck", "--url", probe + "/").code == 0
    assert run("healthcheck", "--url", probe + "/livez").code == 0
    ended = run("healthcheck", "--url", probe + "/readyz")
    assert (ended.code, ended.err) == (1, "503 Service Unavailable\n")
    assert run("healthcheck", "--url", "http://127.0.0.1:1").code == 1
    assert run("healthcheck", "--url", "file:///etc").code == 2
    assert run("healthcheck", "--url", probe, "--address", "127.0.0.1:1").code == 2


def test_a_health_check_by_url_imports_next_to_nothing(probe: str) -> None:
    """Containers ask every ten seconds, each time in a process of its own."""
    program = (
        "import sys; from jobsvc.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, *sorted(sys.modules))"
    )
    command = [sys.executable, "-c", program, "healthcheck", "--url"]
    for path, code in (("/livez", "0"), ("/readyz", "1")):
        asked = [*command, probe + path]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        assert told[0] == code
        heavy = {"grpc", "pydantic", "typer", "jobsvc.cli.app", "google.protobuf", "urllib.request"}
        assert heavy.isdisjoint(told)
