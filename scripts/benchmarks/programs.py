"""Processes of a side, and what they cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from tests.harness import until

ROOT = Path(__file__).parents[2]
READY_SECONDS_MAX = 60.0
END_SECONDS_MAX = 20.0


class Program:
    """A process that runs until it is closed; it ends with this one, however that does.

    Its output goes to `log` together with its errors, or with `piped` to `stdout`.
    """

    def __init__(
        self,
        log: Path,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        piped: bool = False,
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else file,
                stderr=file,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in its log; raises AssertionError with the log's end if none comes."""

        def find() -> re.Match[str] | None:
            text = self._log.read_text(errors="replace")
            assert self.process.poll() is None, f"{self._log.name} ended:\n{text[-3000:]}"
            return re.search(pattern, text)

        found = until(find, READY_SECONDS_MAX, f"{pattern!r} in {self._log.name}")
        assert found is not None
        return found

    def read_line(self) -> str:
        """The next line of a piped one's output; raises RuntimeError with its log if it ended."""
        if line := self.stdout.readline():
            return line
        raise RuntimeError(f"{self._log.name} ended:\n{self._log.read_text()[-3000:]}")

    def close(self) -> None:
        """Kills it with all below it, unless it was closed before."""
        if self.process.returncode is not None:
            return
        tree = [psutil.Process(self.pid), *children(self.pid)]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_SECONDS_MAX)
        psutil.wait_procs(tree, END_SECONDS_MAX)


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """To its end; raises RuntimeError with what it said if it fails."""
    found = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if found.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{found.stdout[-3000:]}")


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this process' own interpreter."""
    return [sys.executable, "-m", module, *arguments]


def children(pid: int) -> list[Any]:
    """All below a process."""
    return list(psutil.Process(pid).children(recursive=True))


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Of the process itself and of all below it, those that have ended among them."""
    process = psutil.Process(pid)
    while True:
        times = process.cpu_times()
        below = times.children_user + times.children_system
        for child in children(pid):
            with suppress(psutil.NoSuchProcess):
                below += sum(child.cpu_times()[:4])
        # One that ended meanwhile is in neither, or in both.
        if process.cpu_times()[2:4] == times[2:4]:
            return times.user + times.system, below


def memory_kib(pid: int) -> dict[str, float]:
    """Resident, proportional (shared pages divided by who shares them) and unshared memory."""
    info = psutil.Process(pid).memory_full_info()
    return {"rss": info.rss / 1024, "pss": info.pss / 1024, "uss": info.uss / 1024}
