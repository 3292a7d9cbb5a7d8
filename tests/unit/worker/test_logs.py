"""What handlers print and log, in real child processes and in a worker's threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

# A worker's own process, as the telemetry and the pool of a worker are set up.
WORKER = """
import sys
from jobsvc import telemetry
from jobsvc.settings import load
from tests.unit.worker.recorder import Recorder, make_task
from worker.child import logs
from worker.pool import make_pool

isolation, log_format, level, *types = sys.argv[1:]
telemetry.configure(load({}, log_format=log_format, log_level=level))
recorder = Recorder()
form = {logs.VARIABLE: f"{log_format}:{level}"}
pool = make_pool(isolation, 1, ["tests.unit.worker.chatty_handlers"], recorder, form)
pool.start()
print("the worker's own", flush=True)
for number, job_type in enumerate(types):
    task = make_task(job_type, {"text": f"text{number}"})
    pool.submit([task])
    ending = recorder.wait_ending(task)
    assert type(ending).__name__ == "Succeeded", ending
pool.stop(0)
"""


def run(isolation: str, log_format: str, *types: str, level: str = "info") -> tuple[str, str]:
    """What came to the worker's stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, isolation, log_format, level, *types],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def records(isolation: str, *types: str, level: str = "info") -> list[dict[str, Any]]:
    """Each line is one."""
    out, err = run(isolation, "json", *types, level=level)
    assert out.replace("loading\n", "") == "the worker's own\n"
    return [record for record in map(json.loads, err.splitlines()) if record["event"] != "loading"]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_each_line_is_a_record_of_its_job(isolation: str) -> None:
    found = records(isolation, "t.chat", "t.quiet", "t.chat")
    for number, name in ((0, "text0"), (2, "text2")):
        told = [record for record in found if record["job_id"] == f"job-{number}"]
        events = [record["event"] for record in told]
        assert events[:6] == [
            f"{name} printed",
            "and more",
            f"{name} unended",
            f"{name} bytes \N{SNOWMAN}",
            r"\xff",
            f"{name} stderr",
        ]
        assert events[6:8] == [f"{name} logged", f"{name} raised"]
        assert any(f"{name} warned" in event for event in events) or number == 2  # told once
        assert events[-1] == f"{name} last"
        for record in told:
            assert (record["job_type"], record["attempt"]) == ("t.chat", 1)
            assert record.keys() >= {"time", "level", "logger", "queue", "trace_id"}
        logged, raised = told[6:8]
        assert (logged["level"], logged["logger"]) == (
            "info",
            "tests.unit.worker.chatty_handlers",
        )
        assert (logged["order"], logged["token"]) == (name, "***")
        assert raised["level"] == "error"
        assert f"KeyError: '{name}'" in raised["exception"]
        assert [record["level"] for record in told[4:6]] == ["info", "warning"]
    assert {record.get("job_id") for record in found} == {"job-0", "job-2"}


def test_a_childs_threads_speak_for_its_job() -> None:
    (record,) = records("process", "t.chat_threaded")
    assert (record["event"], record["job_id"]) == ("text0 in a thread", "job-0")


def test_a_long_line_comes_in_pieces() -> None:
    pieces = [record["event"] for record in records("process", "t.long")]
    assert "".join(pieces) == "x" * 40_000
    assert len(pieces) == 3


def test_what_is_below_the_level_is_not_told() -> None:
    events = {record["event"] for record in records("process", "t.chat", level="warning")}
    assert "text0 stderr" in events
    assert not {"text0 printed", "text0 logged"} & events
    assert "text0 debug" in {r["event"] for r in records("process", "t.chat", level="debug")}


def test_on_a_console_prints_stay_as_they_are() -> None:
    _, err = run("process", "console", "t.chat")
    lines = err.splitlines()
    assert "text0 printed" in lines
    (logged,) = [line for line in lines if "text0 logged" in line]
    assert "info" in logged
    assert "job_id=job-0" in logged


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_secrets_in_the_texts_of_libraries_are_hidden(isolation: str) -> None:
    (record,) = records(isolation, "t.secrets")
    assert record["event"] == "cannot reach amqp://u:***@h//"
    assert "ValueError: postgresql://u:***@h/d" in record["exception"]
