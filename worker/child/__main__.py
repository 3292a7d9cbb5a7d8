"""A child process: `python -m worker.child FRAMES_FD TICKETS_FD PARENT_PID MODULES MEMORY LIMIT`,
the last two in bytes: with more it is to be replaced between two jobs, and it cannot have more.

Imports the handlers, says which job types they have, and runs one task at a time on its main
thread. A second thread reads frames meanwhile, so that a cancellation is felt and a waiting
progress leaves in time. The main thread is the only one that takes tickets. What handlers fork has
neither socket: this process alone speaks for its task.
"""

from __future__ import annotations

import faulthandler
import os
import resource
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
from worker.child import execution, guard, logs, wire
from worker.child.order import Order

_TICK_SECONDS: Final = 0.1
_END_SECONDS_MAX: Final = 2.0
_RECEIVE_BYTES: Final = 256 * 1024
# The parent decides when to stop, also where a terminal or a service manager signals the whole
# group. A handler of ours, not SIG_IGN, which programs started by jobs would inherit.
_PARENTS_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


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
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._let_go)

    def _let_go(self) -> None:
        """In a fork: neither does it speak, nor is it deaf to signals, as libraries count on it."""
        self._frames.close()
        self._tickets.close()
        for number in _PARENTS_SIGNALS:
            if signal.getsignal(number) is _leave_to_parent:
                signal.signal(number, signal.SIG_DFL)

    def send(self, frame: bytes) -> None:
        """Send a frame, waiting while the parent is busy; ends the process if it is gone.

        Raises RuntimeError in a fork of the process.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a fork of a handler's process cannot speak for its job")
        try:
            with self._send_lock:
                self._frames.sendall(frame)
        except OSError:
            _end()

    def serve(self, memory_bytes_max: int) -> None:
        """Run tasks until there are no more, or one has left what the next would feel."""
        threading.Thread(target=self._read, name="frames", daemon=True).start()
        order = Order(memory_bytes_max)
        while ticket := self._tickets.recv(wire.TICKET.size):
            (number,) = wire.TICKET.unpack(ticket)
            ending = self._run(number, self._take(number))
            why = order.restore()  # before the ending: what a job has left hits itself, not others
            if why:
                self.send(wire.retired_frame(number, why) + ending)
                return
            self.send(ending)

    def _take(self, number: int) -> Claimed:
        """The task of a ticket; those before it were taken back, and are passed over."""
        while True:
            received, task = self._inbox.get()
            if received == number:
                return task

    def _run(self, number: int, task: Claimed) -> bytes:
        """The frame that ends the task."""

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
        return wire.ending_frame(number, ending, seconds)

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
            except MemoryError:  # a handler has taken all that there is
                time.sleep(_TICK_SECONDS)
                continue
            if not data:
                # The main thread sees the end of the tickets and leaves by itself, unless a
                # handler keeps it.
                time.sleep(_END_SECONDS_MAX)
                _end()
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


def _leave_to_parent(*_: object) -> None:
    """Handles its signals."""


def _end() -> NoReturn:
    """End this process at once; its guard ends whatever its handlers have started."""
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)  # not reached


def main(arguments: list[str]) -> int:
    """The process's whole life; returns its exit code."""
    frames_fd, tickets_fd, parent_pid = map(int, arguments[:3])
    guard.split(parent_pid, (frames_fd, tickets_fd))
    for number in _PARENTS_SIGNALS:
        signal.signal(number, _leave_to_parent)
    faulthandler.enable()
    for fd in (frames_fd, tickets_fd):
        os.set_inheritable(fd, False)
    memory_bytes_max, limit_bytes = map(int, arguments[4:6])
    if limit_bytes:
        # Not RLIMIT_AS: what is only reserved, or mapped from files, would count there.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    child = Child(socket.socket(fileno=frames_fd), socket.socket(fileno=tickets_fd))
    logs.start_in_process()
    try:
        job_types = registry.load(arguments[3].split(","))
    except registry.HandlersError as error:
        child.send(wire.broken_frame(str(error)))
        return 1
    child.send(wire.ready_frame(job_types))
    child.serve(memory_bytes_max)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
