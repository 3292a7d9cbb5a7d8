"""The examples follow a job while its server stands still, is killed, and is started anew.

Python and Node run always; more are named in JOBSVC_TEST_EXAMPLES, as paths of programs that
scripts/examples has built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from jobsvc.store.tables import job_events
from jobsvc.tokens import make_token
from tests.harness import Service, until
from tests.harness.fixtures import service
from tests.harness.process import ROOT
from tests.pem import Authority
from tests.services import free_port

__all__ = ["service"]

EXAMPLES = ROOT / "docs/examples"
BUILT = os.environ.get("JOBSVC_TEST_EXAMPLES", "").split()
PLAIN_ONLY = {"java"}  # the Netty of Debian knows no ALPN
LINES = 20
SECONDS_MAX = 20


class Run:
    """An example that follows a job of type test.gate; its output is in files."""

    def __init__(self, name: str, command: list[str], directory: Path, **env: str) -> None:
        self.name = name
        self.gate = directory / f"{name}.gate"
        self._command = [*command, "test.gate", self._payload, name]
        self._env = {**os.environ, "HEARTBEAT_SECONDS": "1", **env}
        self._out, self._err = directory / f"{name}.out", directory / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(self._command, env=self._env, stdout=out, stderr=err)

    @property
    def _payload(self) -> str:
        return json.dumps({"path": str(self.gate), "lines": LINES})

    @property
    def printed(self) -> list[str]:
        return self._out.read_text().splitlines()

    @property
    def told(self) -> str:
        """What it said of broken connections."""
        return self._err.read_text()

    def wait(self) -> int:
        return self._process.wait(SECONDS_MAX)

    def again(self, **env: str) -> list[str]:
        """What the same call prints once more."""
        command, changed = self._command, {**self._env, **env}
        return subprocess.check_output(command, env=changed, text=True).splitlines()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to import the generated code from, as the example does."""
    directory = tmp_path_factory.mktemp("stubs")
    protos = [str(path) for path in (ROOT / "protos/jobsvc/v1").glob("*.proto")]
    made = [f"--python_out={directory}", f"--grpc_python_out={directory}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), *made]
    subprocess.run([*command, *protos], check=True)
    # Elsewhere there is no package `jobsvc` that would be found before one without this.
    (directory / "jobsvc/__init__.py").touch()
    return directory


@pytest.fixture(scope="module")
def node_modules() -> None:
    """What the lock file names is installed beside the example."""
    lock, installed = (EXAMPLES / "node" / name for name in ("package-lock.json", "node_modules"))
    stamp = installed / ".package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--silent"], cwd=lock.parent, check=True)


@dataclass(frozen=True, slots=True)
class Door:
    """Settings of a server, without their prefix, and the environment of its clients."""

    server: dict[str, str]
    client: dict[str, str]


@pytest.fixture
def plain() -> Door:
    """Open to whoever has a token."""
    address = f"127.0.0.1:{free_port()}"
    token, line = make_token("example", ("submit", "read"))
    return Door(
        {"listen": address, "tokens": line},
        {"JOBSVC_ADDRESS": address, "JOBSVC_TOKEN": token, "JOBSVC_TLS_CA": ""},
    )


@pytest.fixture
def secure(plain: Door, tmp_path: Path) -> Door:
    """The same behind TLS, at another address."""
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue("server", "localhost")
    port = free_port()
    return Door(
        {**plain.server, "listen": f"127.0.0.1:{port}", "tls_cert": certificate, "tls_key": key},
        {**plain.client, "JOBSVC_ADDRESS": f"localhost:{port}", "JOBSVC_TLS_CA": authority.path},
    )


@pytest.fixture
def runs(
    service: Service, plain: Door, stubs: Path, node_modules: None, tmp_path: Path
) -> Iterator[list[Run]]:
    """Every example, started on a service with one server."""
    handlers = "worker.handlers,tests.harness.handlers"
    service.start(1, 1, handlers=handlers, concurrency="4", **plain.server)
    commands = {
        "python": [sys.executable, str(EXAMPLES / "python/main.py")],
        "node": ["node", str(EXAMPLES / "node/main.js")],
        **{Path(program).name: [program] for program in BUILT},
    }
    env = {**plain.client, "JOBSVC_PROTOS": str(ROOT / "protos"), "PYTHONPATH": str(stubs)}
    started = [Run(name, command, tmp_path, **env) for name, command in commands.items()]
    yield started
    for run in started:
        run.close()


@pytest.mark.timeout(120)
def test_each_example_prints_every_event_once(
    service: Service, secure: Door, plain: Door, runs: list[Run]
) -> None:
    until_all(runs, lambda run: run.printed[-1:] == ["2 STARTED RUNNING"], "follows its job")
    (server,) = service.servers
    server.pause()
    until_all(runs, lambda run: "resuming after 2" in run.told, "has noticed the silence")
    server.kill()
    told = {run.name: len(run.told) for run in runs}
    until_all(runs, lambda run: len(run.told) > told[run.name], "has noticed the death")
    service.server(**plain.server)
    for run in runs:
        Path(f"{run.gate}.1").touch()
    for run in runs:
        assert run.wait() == 0, run.told
        check(service, run)
    # The same key is the same job.
    service.server(**secure.server)
    for run in runs:
        door = plain if run.name in PLAIN_ONLY else secure
        assert run.again(**door.client) == run.printed
    service.check((), jobs_min=len(runs))


def until_all(runs: list[Run], condition: Callable[[Run], bool], what: str) -> None:
    for run in runs:
        until(partial(condition, run), SECONDS_MAX, f"{run.name} {what}")


def check(service: Service, run: Run) -> None:
    (first, *events, last) = run.printed
    job_id = first.removeprefix("job ")
    stored = service.events(job_events.c.job_id == job_id)
    assert events == [f"{event.sequence} {event.type} {event.state}" for event in stored]
    assert len(events) == LINES + 3
    kind, _, json_text = last.partition(" ")
    assert (kind, json.loads(json_text)) == ("result", {"attempt": 1})
