"""What a client process is told to do, what it says it did, and how both are spoken.

A client gets an Order as JSON, connects and warms up, writes `up`, waits for a line, does what was
ordered, writes a Done as JSON, and stays connected until its input is closed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field

PAYLOAD = {"to": "somebody@example.com", "subject": "A benchmark", "number": 42, "text": "x" * 100}
WARM_UP_SECONDS = 0.5
PAUSE_SECONDS = 0.01  # between jobs that are submitted one after the other
# How often the state of a job is asked for where nobody tells it.
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Order:
    """`kind`: submit (for `seconds`, `bulk` jobs a call), fill (`count` jobs, `bulk` a call),
    rate (`rate` jobs a second for `seconds`, whatever becomes of them), or latency (one job after
    the other until each is seen to end: `count` of them, or as many as end within `seconds`).

    Of this service also watchers (`count` of idle jobs), fanout (`count` watchers of one job that
    has much to say), fleet (one watcher of `count` jobs, for `seconds` at most), or list (`count`
    pages by `filter`, a JobFilter in text form)."""

    kind: str
    side: str = ""
    address: str = ""
    in_flight: int = 1
    bulk: int = 1
    seconds: float = 1.0
    rate: float = 0.0
    count: int = 0
    filter: str = ""


@dataclass(slots=True)
class Done:
    """Times are CLOCK_MONOTONIC, the same in all processes, but for `due`."""

    warmed_up: int = 0  # jobs before the start
    count: int = 0
    began: float = 0.0
    ended: float = 0.0
    cpu_seconds: float = 0.0
    to_start: list[float] = field(default_factory=list)  # seconds, of each job
    to_done: list[float] = field(default_factory=list)
    due: dict[str, float] = field(default_factory=dict)  # by job, in seconds since 1970


def go(warmed_up: int = 0) -> Done:
    """Returns when all clients are to begin."""
    print("up", flush=True)
    sys.stdin.readline()
    return Done(warmed_up, began=time.monotonic(), cpu_seconds=-_cpu_seconds())


def tell(done: Done) -> None:
    """When all that was ordered is done. Blocks until the client's end."""
    done.ended = time.monotonic()
    done.cpu_seconds += _cpu_seconds()
    print(json.dumps(asdict(done)), flush=True)
    sys.stdin.read()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
