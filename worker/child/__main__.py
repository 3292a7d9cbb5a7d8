"""A child process: `python -m worker.child FRAMES_FD TICKETS_FD PARENT_PID MODULES`.

Imports the handlers, says which job types they have, and runs one task at a time on its main
thread. A second thread reads frames meanwhile, so that a cancellation is felt and a waiting
progress leaves in time. The main thread is the only one that takes tickets.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from queue import SimpleQueue
from typing import Final, NoReturn

from jobsvc.core.attempts import Claimed, Report
from worker import registry
from worker.child import execution, logs, wire

_TICK_SECONDS: Final = 0.1
_END_SECONDS_MAX: Final = 2.0
_RECEIVE_BYTES: Final = 256 * 1024
_PR_SET_PDEATHSIG: Final = 1


class Child:
    """The child's half of the two sockets; lives until the parent closes them."""

    def __init__(self, frames: socket.socket, tickets: socket.socket) -> None:
        self._frames = frames
        self._tickets = tickets
        self._send_lock = threading.Lock()
        self._inbox: SimpleQueue[tuple[int, Claimed]] = SimpleQueue()
        self._state_lock = threading.Lock()
        self._running: tuple[int, execution.AttemptContext] | None = None
        self._cancelled_number = 0
        self._received = self._finished = 0

    def send(self, frame: bytes) -> None:
        """Send a frame, waiting while the parent is busy; ends the process if it is gone."""
        try:
            with self._send_lock:
                self._frames.sendall(frame)
        except OSError:
            _end_group()

    def serve(self) -> None:
        """Run tasks until there are no more."""
        threading.Thread(target=self._read, name="frames", daemon=True).start()
        while ticket := self._tickets.recv(wire.TICKET.size):
            (number,) = wire.TICKET.unpack(ticket)
            self._run(number, self._take(number))

    def _take(self, number: int) -> Claimed:
        """The task of a ticket; those before it were taken back, and are passed over."""
        while True:
            received, task = self._inbox.get()
            if received == number:
                return task

    def _run(self, number: int, task: Claimed) -> None:
        def report(report: Report) -> None:
            self.send(wire.report_frame(number, report))

        context = execution.AttemptContext(task, report)
        with self._state_lock:
            self._running = number, context
            if self._cancelled_number == number:
                context.ask_to_stop()
        began = time.monotonic()
        ending = execution.run(task, context)
        seconds = time.monotonic() - began
        with self._state_lock:
            self._running = None
            self._finished = number
        self.send(wire.ending_frame(number, ending, seconds))

    def _read(self) -> None:
        reader = wire.FrameReader()
        while True:
            busy = self._received > self._finished
            readable, _, _ = select.select([self._frames], [], [], _TICK_SECONDS if busy else None)
            if not readable:
                self._tick()
                continue
            try:
                data = self._frames.recv(_RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                # The main thread sees the end of the tickets and leaves by itself, unless a
                # handler keeps it.
                time.sleep(_END_SECONDS_MAX)
                _end_group()
            for frame in reader.feed(data):
                self._handle(frame)

    def _handle(self, frame: wire.Frame) -> None:
        number = frame.number
        if frame.kind == wire.TASK:
            self._received = number
            self._inbox.put((number, wire.read_task(frame)))
        elif frame.kind == wire.CANCEL:
            with self._state_lock:
                self._cancelled_number = number
                if self._running is not None and self._running[0] == number:
                    self._running[1].ask_to_stop()

    def _tick(self) -> None:
        with self._state_lock:
            running = self._running
        if running is not None:
            running[1].tick()


def _end_group() -> NoReturn:
    """End this process and whatever its handlers have started."""
    os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)  # not reached


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before that
        os._exit(1)


def main(arguments: list[str]) -> int:
    """The process's whole life; returns its exit code."""
    frames_fd, tickets_fd, parent_pid = map(int, arguments[:3])
    _die_with_parent(parent_pid)
    # The parent decides when to stop, also where a terminal or a service manager signals the
    # whole group. A handler of ours, not SIG_IGN, which programs started by jobs would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    faulthandler.enable()
    for fd in (frames_fd, tickets_fd):
        os.set_inheritable(fd, False)
    child = Child(socket.socket(fileno=frames_fd), socket.socket(fileno=tickets_fd))
    logs.start_in_process()
    try:
        job_types = registry.load(arguments[3].split(","))
    except registry.HandlersError as error:
        child.send(wire.broken_frame(str(error)))
        return 1
    child.send(wire.ready_frame(job_types))
    child.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
