"""One child process, seen from its worker."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from jobsvc import vital
from worker.child import guard, wire
from worker.pool.base import Run

START_SECONDS_MAX: Final = 60.0
END_SECONDS_MAX: Final = 3.0
_RECEIVE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """When a child is replaced between two jobs, and what it cannot have more of; 0 for no bound
    in bytes."""

    jobs: int = 10_000
    age_seconds: float = math.inf
    memory_bytes: int = 0
    memory_limit_bytes: int = 0


class Child:
    """One child process, its guard, and its two sockets. Used by the I/O thread, or with the pool's
    lock."""

    def __init__(
        self, modules: Sequence[str], environment: Mapping[str, str], limits: ChildLimits
    ) -> None:
        self.frames, theirs = socket.socketpair()
        # Both ends of the tickets stay open here: the parent takes back through the child's.
        self._tickets, self._tickets_theirs = socket.socketpair()
        fds = (theirs.fileno(), self._tickets_theirs.fileno())
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # the working directory comes last, not before what is installed
                    "-m",
                    "worker.child",
                    *map(str, fds),
                    str(os.getpid()),
                    ",".join(modules),
                    str(limits.memory_bytes),
                    str(limits.memory_limit_bytes),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what handlers print is no one's data
                pass_fds=fds,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            self._close_sockets()
            raise
        finally:
            theirs.close()
        self.frames.setblocking(False)
        self._reader = wire.FrameReader()
        self.unsent = bytearray()
        self.ready = self.killed = self.dismissed = self.ended = False
        self.broken = ""
        self._limits = limits
        self._tasks_sent = 0
        self._worn_at = math.inf
        # In the order in which they run; the first is running.
        self.runs: dict[int, Run] = {}
        self.victim: int | None = None  # which of them was running when it was killed
        self.deadline = time.monotonic() + START_SECONDS_MAX

    def begin(self) -> None:
        """It is ready, and ages from now on."""
        self.ready = True
        self._worn_at = time.monotonic() + self._limits.age_seconds

    @property
    def worn(self) -> bool:
        """Whether it is to be replaced: it has run many tasks, or for long."""
        return self._tasks_sent >= self._limits.jobs or time.monotonic() >= self._worn_at

    @property
    def usable(self) -> bool:
        """Whether it takes tasks."""
        return self.ready and not self.killed and not self.dismissed

    @property
    def head(self) -> tuple[int, Run] | None:
        return next(iter(self.runs.items()), None)

    def send(self, data: bytes) -> None:
        """Send what the socket takes and keep the rest; a dead child's is dropped."""
        sent = 0
        if not self.unsent:
            try:
                sent = self.frames.send(data)
            except BlockingIOError:
                pass
            except OSError:
                return  # its end is seen by reading
        self.unsent += data[sent:]

    def flush(self) -> None:
        """Send more of what was kept."""
        try:
            del self.unsent[: self.frames.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()

    def send_tasks(self, runs: Mapping[int, Run]) -> None:
        """Send tasks, by their numbers, and their tickets."""
        self.runs.update(runs)
        self._tasks_sent += len(runs)
        self.send(b"".join(wire.task_frame(number, run.task) for number, run in runs.items()))
        self._send_tickets(runs)

    def _send_tickets(self, numbers: Iterable[int]) -> None:
        # Never full, and never broken: the other end is open here too.
        self._tickets.send(b"".join(map(wire.TICKET.pack, numbers)))

    def take_back(self, *, head_too: bool) -> list[Run]:
        """The runs that have not started and now never will, in order; they are no longer ours.

        The first one counts as started, and is left alone unless `head_too`, or the child took a
        later ticket while we held the first: it has passed that task over then.
        """
        numbers: list[int] = []
        with suppress(BlockingIOError):
            while ticket := self._tickets_theirs.recv(wire.TICKET.size, socket.MSG_DONTWAIT):
                numbers += wire.TICKET.unpack(ticket)
        if numbers and not head_too and numbers == list(self.runs):
            self._send_tickets([numbers.pop(0)])
        return [self.runs.pop(number) for number in numbers]

    def receive(self) -> list[wire.Frame] | None:
        """Frames that have come, None if nothing has; sets `ended`. Raises ProtocolError."""
        try:
            data = self.frames.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self.ended = not data
        return self._reader.feed(data)

    def dismiss(self) -> None:
        """Let an idle child end by itself, for a while."""
        self.retire()
        self._tickets.shutdown(socket.SHUT_WR)
        self.frames.shutdown(socket.SHUT_WR)

    def retire(self) -> None:
        """It takes no more tasks, and ends by itself within a while."""
        self.dismissed = True
        self.deadline = time.monotonic() + END_SECONDS_MAX

    def kill(self) -> None:
        """Have its guard kill the process and everything its handlers have started."""
        if not self.killed:
            self.killed = True
            self.victim = next(iter(self.runs), None)
            self.deadline = time.monotonic() + END_SECONDS_MAX
        os.kill(self.process.pid, guard.END)

    def kill_guard(self) -> None:
        """Kill the guard itself, which a handler may have stopped; the kernel kills the child."""
        os.kill(self.process.pid, signal.SIGKILL)

    def has_exited(self) -> bool:
        """Whether it is dead but not yet waited for, so that its number is still its own."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def bury(self) -> str:
        """Wait for the dead process, close the sockets, and say what it died of."""
        try:
            code = self.process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill_guard()
            code = self.process.wait()
        self._close_sockets()
        return vital.died_of(code)

    def _close_sockets(self) -> None:
        for end in (self.frames, self._tickets, self._tickets_theirs):
            end.close()
