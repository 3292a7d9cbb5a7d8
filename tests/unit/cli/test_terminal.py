"""The command as a process of its own: on a terminal, in a pipe, interrupted."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from generated.jobsvc.v1.job_service_pb2 import GetJobResponse, SubmitJobResponse
from tests.unit.cli.conftest import Script
from tests.unit.cli.examples import JOB_ID, job, result, stream

JOBSVC = [sys.executable, "-c", "from jobsvc.cli import main; main()"]


@pytest.fixture
def environ(script: Script) -> dict[str, str]:
    return {**os.environ, "JOBSVC_ADDRESS": script.address, "TERM": "xterm", "COLUMNS": "120"}


def on_terminal(
    words: list[str], environ: dict[str, str], interrupt_at: str = ""
) -> tuple[int, str]:
    """Exit code and what a terminal was sent. Interrupted once it has been sent `interrupt_at`."""
    master, slave = pty.openpty()
    process = subprocess.Popen([*JOBSVC, *words], stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # how Linux says that nobody has the other end open any more
            break
        if interrupt_at and interrupt_at.encode() in shown:
            process.send_signal(signal.SIGINT)
            interrupt_at = ""
    os.close(master)
    return process.wait(20), shown.decode()


def test_a_bar_follows_the_job(script: Script, environ: dict[str, str]) -> None:
    moved = threading.Event()

    def slowly() -> Iterator[Any]:
        for message in stream("FAILED"):
            yield message
            if message.event.HasField("progress"):
                moved.wait(0.5)  # so long that the bar is drawn

    script.answers["WatchJob"] = slowly()
    code, shown = on_terminal(["watch", JOB_ID], environ)
    assert code == 1
    assert "step" in shown
    assert "━" in shown
    assert "INFO two\\nlines \\u001b[31m" in shown
    assert "Oops: why" in shown


def test_a_terminal_gets_tables(script: Script, environ: dict[str, str]) -> None:
    script.answers["GetJob"] = GetJobResponse(job=job())
    code, shown = on_terminal(["get", JOB_ID], environ)
    assert code == 0
    assert shown.splitlines()[0].split() == ["job_id", JOB_ID]


def test_a_payload_comes_from_a_pipe(script: Script, environ: dict[str, str]) -> None:
    script.answers["SubmitJob"] = SubmitJobResponse(job=job())
    script.answers["GetResult"] = result()
    ended = subprocess.run(
        [*JOBSVC, "submit", "t", "-", "--wait"],
        input='{"a": "ü"}'.encode(),
        capture_output=True,
        env=environ,
        timeout=20,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, b"42\n")
    assert dict(script.requests[0].payload) == {"a": "ü"}


@contextmanager
def watching(
    environ: dict[str, str], program: str = JOBSVC[-1]
) -> Iterator[subprocess.Popen[bytes]]:
    """It has printed its first event."""
    words = [*JOBSVC[:-1], program, "watch", JOB_ID]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, env=environ) as process:
        try:
            assert process.stdout is not None
            assert b'"sequence": "1"' in process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture
def endless(script: Script) -> Iterator[None]:
    """The job that is watched runs on and on."""
    over = threading.Event()

    def messages() -> Iterator[Any]:
        yield from stream()[:3]
        over.wait(20)

    script.answers["WatchJob"] = messages()
    yield
    over.set()


@pytest.mark.usefixtures("endless")
def test_an_interrupt_ends_a_watch_quietly(environ: dict[str, str]) -> None:
    with watching(environ) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert all(json.loads(line)["job_id"] == JOB_ID for line in out.splitlines())
    assert err == b""


# As if what the interrupt comes upon could not be interrupted.
DEAF = """
import time
from jobsvc.client import Client

watch = Client.watch

def deaf(*arguments):
    yield next(watch(*arguments))
    try:
        print("deaf", flush=True)
        time.sleep(30)
    except BaseException:
        time.sleep(30)

Client.watch = deaf
"""


def test_an_interrupt_waits_for_nothing(script: Script, environ: dict[str, str]) -> None:
    script.answers["WatchJob"] = stream()
    with watching(environ, DEAF + JOBSVC[-1]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 130


@pytest.mark.usefixtures("endless")
def test_an_interrupt_leaves_the_terminal_as_it_was(environ: dict[str, str]) -> None:
    """A bar hides the cursor."""
    code, shown = on_terminal(["watch", JOB_ID], environ, interrupt_at="━")
    assert code == 130
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.endswith("\r\x1b[2K\x1b[?25h")


def test_a_reader_that_went_away_ends_a_watch_quietly(
    script: Script, environ: dict[str, str]
) -> None:
    gone = threading.Event()

    def rest() -> Iterator[Any]:
        messages = stream()
        yield from messages[:2]
        gone.wait(20)
        yield from messages[2:]

    script.answers["WatchJob"] = rest()
    with watching(environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        gone.set()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


def test_a_full_stdout_is_one_line(script: Script, environ: dict[str, str]) -> None:
    script.answers["GetJob"] = GetJobResponse(job=job())
    with Path("/dev/full").open("wb") as full:
        command = [*JOBSVC, "get", JOB_ID]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environ, check=False
        )
    assert done.returncode == 74
    assert done.stderr == b"cannot write to stdout: No space left on device\n"
