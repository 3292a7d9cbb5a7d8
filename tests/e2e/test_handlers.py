"""Handlers that change under a worker that runs."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from generated.jobsvc.v1 import job_pb2
from tests.harness import Process, Service, until

SECONDS_MAX = 40
HANDLERS = """
import os
from worker import job

@job("volatile.exit", max_attempts=1)
def leave(payload: dict) -> None:
    os._exit(1)

@job("volatile.echo")
def echo(payload: dict) -> dict:
    print("said", payload["text"])
    return payload
"""


def is_ready(process: Process) -> bool:
    address = process.wait_record("serving metrics", SECONDS_MAX)["address"]
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def test_handlers_that_cannot_be_imported_any_more(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "volatile_handlers.py"
    module.write_text(HANDLERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    service.start(handlers="volatile_handlers", concurrency="1", metrics_listen="127.0.0.1:0")
    worker, client = service.workers[0], service.client()
    until(lambda: is_ready(worker), SECONDS_MAX, "it is ready")

    module.unlink()
    lost = client.submit("volatile.exit").job.job_id
    client.wait(lost, timeout=SECONDS_MAX)
    failed = worker.wait_record("job failed", SECONDS_MAX, job_id=lost)
    assert (failed["level"], failed["error_type"]) == ("error", "WORKER_LOST")
    until(lambda: not is_ready(worker), SECONDS_MAX, "it is not ready any more")
    waiting = client.submit("volatile.echo", {"text": "hello"}).job.job_id
    until(
        lambda: client.explain(waiting).reason == job_pb2.WAIT_REASON_NO_WORKER,
        SECONDS_MAX,
        "the job waits for a worker",
    )

    module.write_text(HANDLERS)
    client.wait(waiting, timeout=SECONDS_MAX)
    until(lambda: is_ready(worker), SECONDS_MAX, "it is ready again")
    said = worker.wait_record("said hello", SECONDS_MAX, job_id=waiting)
    assert said["logger"] == "stdout"
