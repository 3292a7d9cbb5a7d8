"""One private node of a service: a process tree and a directory, made to be broken by tests."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 20.0

# Below every system's range of ephemeral ports: while a node is down, a client that keeps
# connecting must not be given the node's own port, or it would connect to itself and hold it.
_PORTS = range(15000, 25000)
# What this process has given out; the sockets keep the ports of the same numbers, for UDP.
_given: list[socket.socket] = []

# Outlives the process that made the node, however that ends: when its stdin closes, it kills the
# process groups of the last line that it read, and removes the directory.
_GUARD = """
while read -r line; do groups=$line; done
for group in $groups; do kill -9 "-$group"; done
for try in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1" && exit; sleep 0.2; done
"""


class NodeError(Exception):
    """A node could not be started; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens now; it is given to nobody else while this
    process lives, not by others that ask here either: a node takes seconds to begin to listen."""
    while True:
        address = "127.0.0.1", random.choice(_PORTS)
        sign = socket.socket(type=socket.SOCK_DGRAM)
        with socket.socket() as probe, suppress(OSError):
            sign.bind(address)
            probe.bind(address)
            _given.append(sign)
            return address[1]
        sign.close()


def wait_for(probe: Callable[[], None], until: Callable[[], bool] = lambda: False) -> None:
    """Returns once the probe raises nothing. Raises NodeError if that takes too long, and at once
    where there is nothing to wait for any more."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            return probe()
        except Exception as error:
            if until() or time.monotonic() > deadline:
                raise NodeError(str(error)) from error
        time.sleep(0.05)


class Node(ABC):
    """A node on a free loopback port, in a directory of its own; `start` it, or use it in `with`.

    Nothing of it is left behind: `close` ends and removes it, and so does the end of this process
    in any way, SIGKILL included. Not thread-safe.
    """

    def __init__(self, name: str, *, user: str | None = None) -> None:
        """`user` is the account to run as, which takes root; None is the one of this process."""
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"jobsvc-{name}-"))
        self.log = self.directory / "log"
        self._account = pwd.getpwnam(user) if user else None
        if self._account:
            os.chown(self.directory, self._account.pw_uid, self._account.pw_gid)
        self._main: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self.directory)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    @abstractmethod
    def url(self) -> str:
        """What a client connects to; the same over every restart."""

    @abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Spawns the node's main process, having made what it needs."""

    @abstractmethod
    def _probe(self) -> None:
        """Returns once a client is really served; raises OSError or the driver's error if not."""

    @abstractmethod
    def _wipe(self) -> None:
        """Removes all that the node has stored."""

    @property
    def pid(self) -> int:
        """The main process, of a node that was started."""
        if self._main is None:
            raise NodeError("the node is not running")
        return self._main.pid

    def start(self) -> Self:
        """Starts a node that is new, killed or wiped; returns when it serves. Raises NodeError."""
        if self._main is not None:
            raise NodeError("the node is running already")
        self._main = main = self._launch()
        try:
            wait_for(self._probe, until=lambda: main.poll() is not None)
        except NodeError as error:
            self.kill()
            raise NodeError(f"{type(self).__name__}: {error}\n{self._log_tail()}") from error
        return self

    def kill(self) -> None:
        """SIGKILL to every process of the node, as a power cut would; what it stored stays."""
        if self._main is None:
            return
        self._end(self._main)
        self._main = None

    def wipe(self) -> None:
        """Kills the node and removes all that it stored; `start` then makes it anew."""
        self.kill()
        self._wipe()

    def pause(self) -> None:
        """SIGSTOP to every process of the node: connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kills the node and removes its directory."""
        self.kill()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(STOP_SECONDS_MAX)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _spawn(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Runs a command in a process group of its own that the guard knows; output to the log."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self._account.pw_uid if self._account else None,
                group=self._account.pw_gid if self._account else None,
                extra_groups=[] if self._account else None,
            )
        self._groups.add(process.pid)
        self._tell_guard()
        return process

    def _run(self, command: Sequence[str | Path]) -> None:
        """Runs a command to its end; raises NodeError if it fails."""
        if (process := self._spawn(command)).wait(START_SECONDS_MAX) != 0:
            raise NodeError(f"{command[0]} failed\n{self._log_tail()}")
        self._groups.discard(process.pid)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree(self.pid):
            with suppress(psutil.NoSuchProcess):  # a backend whose client has just gone
                process.send_signal(number)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        tree = self._tree(process.pid)
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(STOP_SECONDS_MAX)
        deadline = time.monotonic() + STOP_SECONDS_MAX
        while not all(map(is_gone, tree)):
            if time.monotonic() > deadline:
                raise NodeError(f"processes outlived SIGKILL: {tree}")
            time.sleep(0.01)
        self._groups.discard(process.pid)
        self._tell_guard()

    def _tell_guard(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(" ".join(map(str, self._groups)).encode() + b"\n")
        self._guard.stdin.flush()

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    @staticmethod
    def _tree(pid: int) -> list[psutil.Process]:
        """The process and all below it, parents first."""
        try:
            top = psutil.Process(pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def is_gone(process: psutil.Process) -> bool:
    """True of a zombie too: whose child it became may take its time to bury it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def remove(path: Path) -> None:
    """Removes a directory tree, if it is there."""
    if path.exists():
        shutil.rmtree(path)
