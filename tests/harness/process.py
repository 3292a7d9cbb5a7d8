"""One process of the service, its log in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.harness.wait import until
from tests.services.node import is_gone

ROOT = Path(__file__).parents[2]
READY_SECONDS_MAX = 30.0
END_SECONDS_MAX = 20.0
TAIL_LINES = 30

# The kernel kills it with the test run, however that ends. Start it on the main thread.
_MAIN = """
import ctypes
ctypes.CDLL(None).prctl(1, 9)
from jobsvc.cli import main
main()
"""


class ProcessFailed(AssertionError):
    """The message ends with the tail of the process's log."""


class Process:
    """`jobsvc ARGUMENTS`, with its standard error in NAME.log and its output in NAME.out."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        settings: Mapping[str, str],
        directory: Path,
    ) -> None:
        self.name = name
        self.log_path = directory / f"{name}.log"
        self.out_path = directory / f"{name}.out"
        self._records: list[dict[str, Any]] = []
        self._read = 0  # bytes of the log
        self._reading = threading.Lock()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JOBSVC_")}
        with self.log_path.open("ab") as log, self.out_path.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, *arguments],
                cwd=ROOT,
                env={**inherited, **settings},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def records(self) -> list[dict[str, Any]]:
        """The records of its log so far. Each line is read once: logs grow long, and are polled."""
        with self._reading, self.log_path.open("rb") as log:
            log.seek(self._read)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._read += len(whole + newline)
            for line in whole.splitlines():
                if line.startswith(b"{"):
                    with suppress(ValueError):  # what the interpreter says is no record
                        self._records.append(json.loads(line))
            return self._records.copy()

    def wait_record(self, event: str, seconds: float, **fields: Any) -> dict[str, Any]:
        """The first record of that event with those fields, once there is one."""

        def find() -> dict[str, Any] | None:
            for record in self.records():
                if record["event"] == event and fields.items() <= record.items():
                    return record
            if not self.running:
                raise ProcessFailed(f"{self.name} ended without {event!r}\n{self.tail()}")
            return None

        try:
            found = until(find, seconds, f"{event!r} in the log of {self.name}")
        except ProcessFailed:
            raise
        except AssertionError as error:
            raise ProcessFailed(f"{error}\n{self.tail()}") from None
        assert found is not None
        return found

    def wait_ready(self) -> dict[str, Any]:
        return self.wait_record("ready", READY_SECONDS_MAX)

    def kill(self) -> None:
        """SIGKILL, and nothing of it is left when this returns."""
        children = self.children()
        self._process.kill()
        self._process.wait(END_SECONDS_MAX)
        until(lambda: all(map(is_gone, children)), END_SECONDS_MAX, f"{self.name} left nothing")

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = END_SECONDS_MAX) -> int:
        """Its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(
                f"{self.name} did not end in {seconds:g} s\n{self.tail()}"
            ) from None

    def children(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        """Ends it in whatever state it is."""
        if self.running:
            self.kill()

    def tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"--- end of {self.log_path.name} ---", *lines])
