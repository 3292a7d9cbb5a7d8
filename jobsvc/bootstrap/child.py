"""One server of several on one address: `python -m jobsvc.bootstrap.child CHANNEL_FD PARENT_PID`.

Parent and child write lines of JSON to the channel. The parent, `supervisor.py`, begins with the
settings; each line after them asks for the metrics. The child tells once that it serves, or why it
cannot, and then what it is asked for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading

import prometheus_client

from jobsvc import vital
from jobsvc.bootstrap.merging import snapshot
from jobsvc.errors import DatabaseUnavailable, JobsvcError
from jobsvc.settings import Settings

READY = "ready"
FAILED = "failed"
METRICS = "metrics"


class Parent:
    """The child's end of the channel."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lines = channel.makefile("rb")
        self._lock = threading.Lock()

    def settings(self) -> Settings:
        return Settings.model_validate_json(self._lines.readline())

    def tell(self, kind: str, value: object = None) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        with self._lock:
            self._channel.sendall(line)

    def answer(self) -> None:
        """For as long as there is a parent; its end is this process's."""
        for _ in self._lines:
            self.tell(METRICS, snapshot(prometheus_client.REGISTRY))
        os._exit(vital.EXIT_CODE)


def main(arguments: list[str]) -> int:
    """The process's whole life; answers its exit code."""
    channel_fd, parent_pid = map(int, arguments)
    vital.die_with_parent(parent_pid)
    os.set_inheritable(channel_fd, False)
    parent = Parent(socket.socket(fileno=channel_fd))
    settings = parent.settings()
    vital.thread("parent", parent.answer).start()
    # Takes most of a start, and so comes after what must not wait.
    from jobsvc.bootstrap import server

    try:
        return server.run(settings, announce=lambda _settings, _address: parent.tell(READY))
    except DatabaseUnavailable as error:
        parent.tell(FAILED, error.explained)
        return 1
    except JobsvcError as error:
        parent.tell(FAILED, str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
