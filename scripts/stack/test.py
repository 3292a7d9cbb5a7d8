#!/usr/bin/env python3
"""The stack as a whole, from outside; scripts/stack-test says what it does, and runs it."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVICE = "jobsvc.v1.JobService"
# A lost worker's job: the lease (30 s), the reaper (5 s) and the first backoff; and then some.
HEAL_SECONDS_MAX = 120.0
UP_SECONDS_MAX = 300.0
BASE = ("docker-compose.yml",)
WAITING = {f"JOB_STATE_{state}" for state in ("QUEUED", "RUNNING", "RETRYING")}
PRODUCTION = ("docker-compose.yml", "docker-compose.prod.yml")
# Within a container: kills the one child that its first process, init, was given.
KILL = """
import os, pathlib, signal
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    if stat.read_text().rpartition(")")[2].split()[1] == "1":
        os.kill(int(stat.parent.name), signal.SIGKILL)
"""


class Failed(Exception):
    """What was expected and did not come true."""


def expect(true: bool, what: str) -> None:
    if not true:
        raise Failed(what)


def until(what: str, probe: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        expect(time.monotonic() < deadline, f"{what}, within {seconds:g} s")
        time.sleep(0.5)


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"      {name}", flush=True)
    yield
    print(f"ok    {name} ({time.monotonic() - started:.1f} s)", flush=True)


def run(*command: str, environment: Mapping[str, str] | None = None, seconds: float = 60.0) -> str:
    """Its standard output. Raises Failed with what it wrote where it does not exit with 0."""
    done = subprocess.run(
        command,
        env=os.environ | (environment or {}),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-4000:]
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout


def answers(*command: str) -> bool:
    try:
        run(*command)
    except (Failed, OSError, subprocess.TimeoutExpired):
        return False
    return True


class Stack:
    def __init__(self, secrets: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._compose = (
            ["docker", "compose"] if answers("docker", "compose", "version") else ["docker-compose"]
        )
        self._project = f"jobsvc-test-{os.getpid()}"
        self._environment = {
            "JOBSVC_SECRETS": str(secrets),
            "JOBSVC_PORT": self.address.rpartition(":")[2],
            "JOBSVC_HANDLERS": "worker.handlers,worker.handlers.demo",
            # What docker-compose.prod.yml asks for.
            "JOBSVC_PUBLISH": self.address,
            "JOBSVC_HOST": "jobs.example.com",
            "JOBSVC_REGISTRY": "jobsvc",
            "JOBSVC_TAG": "test",
            "POSTGRES_IMAGE": os.environ.get("POSTGRES_IMAGE", "postgres:18"),
            "RABBITMQ_IMAGE": os.environ.get("RABBITMQ_IMAGE", "rabbitmq:4.3"),
        }
        self.way_in = ["-plaintext"]

    def compose(self, *words: str, files: Sequence[str] = BASE, seconds: float = 120.0) -> str:
        named = [word for file in files for word in ("-f", file)]
        command = [*self._compose, "--project-name", self._project, *named, *words]
        return run(*command, environment=self._environment, seconds=seconds)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--all", "--quiet", service).split()

    def inspect(self, container: str, template: str) -> str:
        return run("docker", "inspect", "--format", template, container).strip()

    def healthy(self, container: str) -> bool:
        state = self.inspect(container, "{{.State.Status}} {{.State.Health.Status}}")
        return state == "running healthy"

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        data = json.dumps(request)
        answer = run("grpcurl", *self.way_in, "-d", data, self.address, f"{SERVICE}/{method}")
        return dict(json.loads(answer))

    def submit(self, count: int, job_type: str, payload: object) -> list[str]:
        """The ids of that many new jobs."""
        request = {"job_type": job_type, "payload": payload}
        answer = self.call("SubmitJobs", requests=[request] * count)
        return [response["job"]["job_id"] for response in answer["responses"]]

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.call("GetJob", job_id=job_id)["job"])

    def result(self, job_id: str) -> dict[str, Any]:
        """How it ended, or stands after ten seconds."""
        return self.call("GetResult", job_id=job_id, wait="10s")

    def events(self, job_id: str) -> list[dict[str, Any]]:
        return list(self.call("ListJobEvents", job_id=job_id, page_size=1000)["events"])

    def await_all(self, job_ids: Sequence[str]) -> None:
        """Every one of them succeeds, and has one whole history."""
        deadline = time.monotonic() + HEAL_SECONDS_MAX
        for job_id in job_ids:
            while not (events := self.events(job_id))[-1]["type"].endswith("_SUCCEEDED"):
                state = self.result(job_id)["state"]
                expect(state in {*WAITING, "JOB_STATE_SUCCEEDED"}, f"{job_id} to succeed: {state}")
                expect(time.monotonic() < deadline, f"{job_id} to end: {state}")
            numbers = [int(event["sequence"]) for event in events]
            ends = [event for event in events if event["type"].endswith("_SUCCEEDED")]
            expect(numbers == list(range(1, len(events) + 1)), f"no gap in {job_id}: {numbers}")
            expect(ends == events[-1:], f"one end of {job_id}: {events}")

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40")


def images(stack: Stack) -> None:
    with step("build the images"):
        stack.compose("build", seconds=900)
    for target in ("server", "worker", "migrate"):
        name = f"jobsvc/{target}:test"
        size = int(run("docker", "image", "inspect", "--format", "{{.Size}}", name))
        user = run("docker", "image", "inspect", "--format", "{{.Config.User}}", name).strip()
        expect(user == "10001:10001", f"{name} to run as 10001, not as {user!r}")
        print(f"      {name}: {size / 1e6:.0f} MB")


def start(stack: Stack) -> None:
    with step("bring the stack up, every part healthy"):
        stack.compose("up", "--detach", "--wait", "--pull", "missing", seconds=UP_SECONDS_MAX)
    expect(len(stack.containers("worker")) == 2, "two workers")
    health = run("grpcurl", *stack.way_in, stack.address, "grpc.health.v1.Health/Check")
    expect(json.loads(health) == {"status": "SERVING"}, f"SERVING, not {health}")
    server = stack.containers("server")[0]
    expect(stack.inspect(server, "{{.HostConfig.ReadonlyRootfs}}") == "true", "a read-only root")


def echo(stack: Stack) -> None:
    with step("run jobs from outside"):
        (job_id,) = stack.submit(1, "demo.echo", {"hello": "world"})
        stack.await_all([job_id])
        result = stack.result(job_id)["result"]
        expect(result == {"hello": "world"}, f"the payload as the result, not {result}")
        stack.await_all(stack.submit(20, "demo.echo", {"hello": "world"}))


def lose_a_worker(stack: Stack) -> list[str]:
    """The ids of its jobs. Until the leases of those that ran have run out the rest can go on."""
    with step("kill -9 a worker in the middle of 40 jobs; it comes back by itself"):
        job_ids = stack.submit(40, "demo.sleep", {"seconds": 1, "steps": 2})
        victim = stack.containers("worker")[0]
        until("a job to run", lambda: any_runs(stack, job_ids), 20)
        born = stack.inspect(victim, "{{.State.StartedAt}}")
        # Within the container, as a crash or the memory limit would; `docker kill` is an order to
        # stay down. The first process is init.
        subprocess.run(["docker", "exec", victim, "python", "-c", KILL], check=False)
        until(
            "the worker to be started anew",
            lambda: stack.inspect(victim, "{{.State.StartedAt}}") != born,
            30,
        )
        until("it to consume", lambda: stack.healthy(victim), 60)
    return job_ids


def any_runs(stack: Stack, job_ids: Sequence[str]) -> bool:
    return any(stack.job(i)["state"] == "JOB_STATE_RUNNING" for i in job_ids[:8])


def lose_the_broker(stack: Stack, before: list[str]) -> None:
    """`before`: jobs of the lost worker."""
    with step("kill the broker in the middle of 40 jobs, submit 20 without it, start it"):
        job_ids = before + stack.submit(40, "demo.sleep", {"seconds": 0.5, "steps": 1})
        (broker,) = stack.containers("rabbitmq")
        run("docker", "kill", "--signal", "KILL", broker)
        job_ids += stack.submit(20, "demo.echo", {"while": "away"})
        worker = stack.containers("worker")[0]
        until("a worker to be unhealthy", lambda: not stack.healthy(worker), 90)
        run("docker", "start", broker)
        until("the broker to be back", lambda: stack.healthy(broker), 90)
        stack.await_all(job_ids)
        until("the worker to be healthy again", lambda: stack.healthy(worker), 60)


def stop(stack: Stack) -> None:
    with step("stop it while a job runs: the job ends, exit codes are 0, all is there again"):
        (job_id,) = stack.submit(1, "demo.sleep", {"seconds": 6, "steps": 2})
        until("the job to run", lambda: any_runs(stack, [job_id]), 20)
        stack.compose("stop", "worker", "server")
        for container in stack.containers("server") + stack.containers("worker"):
            code = stack.inspect(container, "{{.State.ExitCode}}")
            name = stack.inspect(container, "{{.Name}}")
            expect(code == "0", f"exit code 0 of {name}, not {code}")
        stack.compose("stop", "postgres", "rabbitmq")
        stack.compose("up", "--detach", "--wait", seconds=UP_SECONDS_MAX)
        stack.await_all([job_id])
        attempt = stack.job(job_id).get("attempt")
        expect(attempt == 1, f"one attempt, which the stop let finish, not {attempt}")


def production(stack: Stack, secrets: Path) -> None:
    with step("put docker-compose.prod.yml on top: TLS, and only who has a token"):
        stack.compose("up", "--detach", "--wait", files=PRODUCTION, seconds=UP_SECONDS_MAX)
        tls = ["-cacert", str(secrets / "grpc" / "ca.crt"), "-authority", "jobs.example.com"]
        bearer = f"authorization: Bearer {(secrets / 'smoke_token').read_text().strip()}"
        stack.way_in = tls
        expect("Unauthenticated" in refusal(stack), "a call without a token to be refused")
        stack.way_in = ["-plaintext", "-H", bearer]
        expect(refusal(stack) != "", "a call without TLS to be refused")
        stack.way_in = [*tls, "-H", bearer]
        stack.await_all(stack.submit(5, "demo.echo", {"over": "tls"}))
        smoke = ("run", "--rm", "--no-deps", "-T", "client")
        stack.compose(*smoke, "healthcheck", files=PRODUCTION)
        answer = stack.compose(*smoke, "run", "demo.echo", '{"a": 1}', files=PRODUCTION)
        expect('"a"' in answer, f"the smoke test's result, not {answer}")


def refusal(stack: Stack) -> str:
    """Why a submit was refused; empty if it was not."""
    try:
        stack.submit(1, "demo.echo", {})
    except Failed as failed:
        return str(failed)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests the stack as a whole.")
    parser.add_argument("--required", action="store_true", help="no engine is an error")
    arguments = parser.parse_args()
    if not answers("docker", "info"):
        print("no Docker engine answers (`docker info` fails): the stack was NOT tested")
        return 1 if arguments.required else 0
    with tempfile.TemporaryDirectory(prefix="jobsvc-stack-") as directory:
        secrets = Path(directory) / "secrets"
        run("scripts/stack-secrets", "--host", "jobs.example.com", str(secrets))
        stack = Stack(secrets)
        try:
            images(stack)
            start(stack)
            echo(stack)
            lose_the_broker(stack, lose_a_worker(stack))
            stop(stack)
            production(stack, secrets)
        except (Failed, subprocess.TimeoutExpired) as failed:
            print(f"FAILED, expected: {failed}\n{stack.logs()}", file=sys.stderr)
            return 1
        finally:
            stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")
    print("the stack does what it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
