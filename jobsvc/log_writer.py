"""The way of log records to stderr. Whoever logs does not wait for whoever reads: a thread of its
own writes, and what it cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import SimpleQueue

from jobsvc import metrics

# Some 15,000 records.
PENDING_BYTES_MAX = 4 * 1024 * 1024
FLUSH_SECONDS_MAX = 1.0


class LogWriter:
    """Begins with the first record. May be used by any thread, and by one that is interrupted while
    it does, as signal handlers and finalizers log too."""

    def __init__(
        self,
        descriptor: int,
        on_dropped: Callable[[int], None],
        bytes_max: int = PENDING_BYTES_MAX,
    ) -> None:
        """`on_dropped` is told how many records did not fit, once there is room again."""
        self._descriptor = descriptor
        self._on_dropped = on_dropped
        self._bytes_max = bytes_max
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()
        self._pending = 0  # bytes
        self._dropped = 0
        self._thread: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._forget)

    def put(self, records: bytes) -> None:
        """Whole lines; up to PIPE_BUF bytes they are not mixed with those of other processes."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            fits = self._pending + len(records) <= self._bytes_max
            if fits:
                self._pending += len(records)
                self._queue.put(records)
            else:
                self._dropped += _count(records)

    def flush(self) -> None:
        """Returns when what was put is written, or nobody has read it for a while."""
        if self._thread is None:
            return
        written = threading.Event()
        self._queue.put(written)
        written.wait(FLUSH_SECONDS_MAX)

    def _run(self) -> None:
        while True:
            records = self._queue.get()
            if isinstance(records, threading.Event):
                records.set()
                continue
            try:
                self._write(records)
            except OSError:
                _count(records)  # nobody is left to read the log, or to be told so
            with self._lock:
                self._pending -= len(records)
                has_room = self._pending <= self._bytes_max // 2
                dropped = self._dropped if has_room else 0
                self._dropped -= dropped
            if dropped:
                self._on_dropped(dropped)

    def _write(self, records: bytes) -> None:
        left = memoryview(records)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody who shares the descriptor wants it so
                select.select([], [self._descriptor], [])

    def _forget(self) -> None:
        """In a fork, which has no such thread: what waits is its parent's to write."""
        self._thread = None
        self._queue = SimpleQueue()
        self._lock = threading.RLock()
        self._pending = self._dropped = 0


def _count(records: bytes) -> int:
    """Dropped records."""
    count = records.count(b"\n")
    metrics.LOG_DROPPED.inc(count)
    return count
