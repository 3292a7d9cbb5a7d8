"""Log records on their way to whoever reads them, or does not."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from jobsvc import metrics
from jobsvc.log_writer import LogWriter

RECORD = b"x" * 99 + b"\n"
PIPE_BYTES = 4096


class Pipe:
    """A small one; how many were dropped is told to `told`."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.told: SimpleQueue[int] = SimpleQueue()

    def log(self, bytes_max: int = 10_000) -> LogWriter:
        return LogWriter(self.writer, self.told.put, bytes_max)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(self.reader, count - len(data))
        return data


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.reader)


def dropped() -> float:
    return metrics.LOG_DROPPED._value.get()  # type: ignore[no-any-return]


def test_what_is_read_is_all_there_and_in_order(pipe: Pipe) -> None:
    log = pipe.log(1_000_000)
    lines = [b"%05d\n" % number for number in range(5_000)]
    for line in lines:
        log.put(line)
    assert pipe.read(6 * 5_000) == b"".join(lines)


def test_a_record_longer_than_the_pipe_is_written_whole(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)  # as others who have it may want it
    log = pipe.log(1_000_000)
    log.put(b"y" * 50_000 + b"\n")
    log.put(RECORD)
    assert pipe.read(50_101) == b"y" * 50_000 + b"\n" + RECORD


def test_what_nobody_reads_is_dropped_counted_and_told(pipe: Pipe) -> None:
    """Whoever logs does not wait: a test that hangs here has failed."""
    log, before = pipe.log(), dropped()
    for _ in range(1_000):
        log.put(RECORD * 2)
    lost = int(dropped() - before)
    # At most the pipe's and the bound's, at least the bound's.
    assert 2_000 - (PIPE_BYTES + 10_000) // 100 <= lost <= 2_000 - 10_000 // 100
    pipe.read((2_000 - lost) * len(RECORD))
    assert pipe.told.get(timeout=20) == lost
    log.put(RECORD)
    assert pipe.read(len(RECORD)) == RECORD
    assert dropped() - before == lost


def test_a_log_whose_reader_has_left_is_counted_and_not_told() -> None:
    pipe, before = Pipe(), dropped()
    os.close(pipe.reader)
    log = pipe.log()
    for _ in range(10):
        log.put(RECORD)
    log.flush()
    assert dropped() - before == 10
    assert pipe.told.empty()


def test_flush_does_not_wait_for_ever(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsvc.log_writer.FLUSH_SECONDS_MAX", 0.01)
    log = pipe.log()
    for _ in range(100):
        log.put(RECORD)
    log.flush()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_writes_its_own_records_alone(pipe: Pipe) -> None:
    log = pipe.log()
    for _ in range(60):
        log.put(RECORD)
    child = os.fork()
    if child == 0:
        log.put(b"child\n")
        log.flush()
        os._exit(0)
    data = pipe.read(60 * len(RECORD) + 6)
    os.waitpid(child, 0)
    assert data.count(RECORD) == 60
    assert data.count(b"child\n") == 1


PROCESS = """
from jobsvc import telemetry
from jobsvc.settings import load
telemetry.configure(load({}, log_format="json"))
log = telemetry.get_logger("x")
for number in range(2_000):
    log.info("job submitted", number=number)
print("done", flush=True)
input()
"""


def test_a_process_whose_log_nobody_reads_goes_on() -> None:
    """And whoever reads late misses nothing of what it kept."""
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        _, log = process.communicate(b"\n")
    assert log.count(b'"event":"job submitted"') == 2_000
