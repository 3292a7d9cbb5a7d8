"""`jobsvc dev`: everything in one process, on SQLite and the broker in memory."""

from __future__ import annotations

import email
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jobsvc.client import Client, state_name
from jobsvc.store.database import Database
from jobsvc.store.dialects.engines import sqlite_url
from tests.checker import check
from tests.harness import Load, Process, until
from tests.harness.load import QUICK_RETRY, mixed
from tests.harness.service import SETTINGS
from tests.services import free_port

GRPCURL = Path(sys.executable).parent / "grpcurl"
SEED = {
    "job_type": "send_email",
    "payload": {"recipient_email": "test@example.com", "subject": "Hello", "body": "Good day."},
}

Start = Callable[..., Process]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Its name is one that says something else in a URL."""
    return tmp_path / "data?mode=ro#100%20x"


@pytest.fixture
def start(tmp_path: Path, data_dir: Path) -> Iterator[Start]:
    """Starts it on the data directory; `listen` is its address."""
    started: list[Process] = []

    def begin(listen: str = "127.0.0.1:0", **given: str) -> Process:
        arguments = ["dev", "--data-dir", str(data_dir), "--listen", listen]
        settings = {**SETTINGS, "JOBSVC_HANDLERS": "worker.handlers", **given}
        started.append(Process(f"dev{len(started) + 1}", arguments, settings, tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def grpcurl(address: str, *words: str, data: object = None) -> str:
    given = [] if data is None else ["-d", json.dumps(data)]
    command = [str(GRPCURL), "-plaintext", *given, address, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def messages(text: str) -> Iterator[Any]:
    """The JSON documents of a stream, one behind the other."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        message, end = decoder.raw_decode(text)
        yield message
        text = text[end:]


def test_grpcurl_session(start: Start, data_dir: Path) -> None:
    address = start().wait_ready()["address"]
    services = grpcurl(address, "list").split()
    assert {"jobsvc.v1.JobService", "grpc.health.v1.Health"} <= set(services)
    assert "rpc SubmitJob " in grpcurl(address, "describe", "jobsvc.v1.JobService")
    health = json.loads(grpcurl(address, "grpc.health.v1.Health/Check"))
    assert health == {"status": "SERVING"}
    submitted = json.loads(grpcurl(address, "jobsvc.v1.JobService/SubmitJob", data=SEED))
    job_id = submitted["job"]["job_id"]
    stream = grpcurl(address, "jobsvc.v1.JobService/WatchJob", data={"job_id": job_id})
    events = [message["event"] for message in messages(stream) if "event" in message]
    assert [event["type"].removeprefix("JOB_EVENT_TYPE_") for event in events] == [
        "SUBMITTED",
        "STARTED",
        "SUCCEEDED",
    ]
    mail = email.message_from_bytes((data_dir / "mail" / f"{job_id}.eml").read_bytes())
    assert (mail["To"], mail["Subject"]) == ("test@example.com", "Hello")
    assert str(mail.get_payload()).strip() == "Good day."


def test_line_to_paste_submits_a_job(start: Start) -> None:
    process = start()
    address = process.wait_ready()["address"]
    line = process.out_path.read_text()
    assert line.count("\n") == 1
    assert "submit demo.sleep" in line
    assert line.endswith(f"--watch --address {address}\n")


def test_survives_a_kill_in_the_middle(start: Start, data_dir: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    process = start(address)
    process.wait_ready()
    channels: list[grpc.Channel] = []

    def connect() -> grpc.Channel:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 500)]
        channels.append(grpc.insecure_channel(address, options=options))
        return channels[-1]

    requests = mixed(200, sleeps=20, seconds=0.2)
    assert requests[0].retry_policy == QUICK_RETRY
    load = Load(connect, requests, threads=4)
    load.wait_acknowledged(100)
    process.kill()
    start(address).wait_ready()
    ids = load.join()
    database = Database(sqlite_url(data_dir / "jobsvc.db"))
    try:
        until(lambda: _all_ended(database, ids), 40, "all jobs have ended")
        report = check(
            database, acknowledged=ids, all_ended=True, outbox_empty=True, jobs_min=len(requests)
        )
        assert report.jobs == len(requests)
        assert set(report.states) == {"SUCCEEDED"}
    finally:
        database.close()
        for channel in channels:
            channel.close()


def _all_ended(database: Database, ids: list[str]) -> bool:
    try:
        check(database, acknowledged=ids, all_ended=True, outbox_empty=True)
    except AssertionError:
        return False
    return True


def test_a_paused_queue_stays_so_and_then_goes_by_priority(start: Start) -> None:
    """Over a `kill -9`; and where the only place is taken, the best of those that came since."""
    process = start()
    with Client(str(process.wait_ready()["address"])) as client:
        client.admin.pause_queue("default")
        low = [client.submit("demo.echo").job.job_id for _ in range(5)]
    process.kill()
    with Client(str(start().wait_ready()["address"])) as client:
        client.admin.update_queue("default", max_running=1)
        high = [client.submit("demo.echo", priority=p).job.job_id for p in (5, 9)]
        assert {state_name(job.state) for job in client.jobs()} == {"QUEUED"}
        client.admin.resume_queue("default")
        for job_id in (*low, *high):
            client.wait(job_id, timeout=20)
        order = sorted(client.jobs(), key=lambda job: job.start_time.ToNanoseconds())
        assert [job.job_id for job in order] == [*reversed(high), *low]
        client.admin.update_queue("default", max_running=0)
        running = [client.submit("demo.sleep", {"seconds": 600}).job.job_id for _ in range(2)]
        for job_id in running:
            until(lambda j=job_id: client.get(j).attempt, 20, "the slots are taken")  # type: ignore[misc]
        low = [client.submit("demo.echo").job.job_id for _ in range(10)]
        best = client.submit("demo.echo", priority=1).job.job_id
        for job_id in running:
            client.cancel(job_id)
        for job_id in (*low, best):
            client.wait(job_id, timeout=20)
        started = {job.job_id: job.start_time.ToNanoseconds() for job in client.jobs()}
        assert started[best] <= min(started[job_id] for job_id in low)


def test_a_cancel_does_not_wait_for_a_heartbeat(start: Start) -> None:
    process = start(JOBSVC_LEASE="1h", JOBSVC_HEARTBEAT="25m")
    with Client(str(process.wait_ready()["address"])) as client:
        job_id = client.submit("demo.sleep", {"seconds": 600}).job.job_id
        until(lambda: client.get(job_id).attempt, 20, "it runs")
        client.cancel(job_id)
        assert state_name(client.wait(job_id, timeout=20).state) == "CANCELLED"


def test_second_one_on_the_directory_is_refused(start: Start) -> None:
    first = start()
    first.wait_ready()
    second = start()
    assert second.wait() == 1
    assert f"process {first.pid}" in second.tail()
    assert first.running
    first.terminate()
    assert first.wait() == 0
