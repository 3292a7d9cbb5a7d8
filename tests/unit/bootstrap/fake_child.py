"""What the supervisor starts in its tests, instead of a server.

Its settings name a directory, and what the first, the second, … of all children is to do; those
beyond do as the last. It imports little, to be quick.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path


def turn(directory: str) -> int:
    """Whose turn it is: the number of those before this one."""
    for number in range(1000):
        try:
            Path(directory, str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError


def main() -> int:
    channel = socket.socket(fileno=int(sys.argv[1]))
    lines = channel.makefile("rb")
    settings = json.loads(lines.readline())
    does = settings["do"]
    deed = does[min(turn(settings["directory"]), len(does) - 1)]

    def tell(kind: str, value: object = None) -> None:
        channel.sendall(json.dumps([kind, value]).encode() + b"\n")

    match deed:
        case "refuses":
            tell("failed", "the schema is older")
            return 1
        case "crashes":
            return 3
        case "hangs":
            signal.pause()
    ends_with = 5 if deed == "ends badly" else 0
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ends_with))
    ready = 0.0 if deed == "is away" else 1.0
    tell("ready")
    for count, _ in enumerate(lines, 1):
        tell(
            "metrics",
            [
                ("jobsvc_ready", "", "gauge", [("jobsvc_ready", {}, ready)]),
                ("asked", "", "counter", [("asked_total", {}, float(count))]),
            ],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
