"""What a process is like before its first job, and putting it back so after each.

Looked at between all jobs, so it costs some 20 microseconds where a job has left nothing. What
cannot be put back, or is still running, is a reason to replace the process.
"""

from __future__ import annotations

import gc
import locale
import os
import resource
import signal
import socket
import sys
import threading
import time

# As `signal` has it, but twenty times as fast.
from _signal import getsignal  # type: ignore[import-not-found]
from collections.abc import Callable
from typing import Any, Final

from worker.child import guard

_TIMERS: Final = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
# Without the real-time ones, which nothing sends unasked.
_SIGNALS: Final = tuple(sorted(number for number in signal.valid_signals() if number < 32))
_LIMITS: Final = (
    *(resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE),
    *(resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC),
)
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
# For what a job has told to end and has not waited for.
_LEAVE_SECONDS_MAX: Final = 0.1
_LOOK_SECONDS: Final = 0.001


def _identity() -> tuple[object, ...]:
    return os.getresuid(), os.getresgid(), os.getpriority(os.PRIO_PROCESS, 0)


def _environment() -> dict[bytes, bytes]:
    # The mapping behind os.environ: to decode it all costs fifty times as much.
    data: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]  # noqa: SLF001
    return data


class Order:
    """Made once the handlers are loaded: what they have started and set until then may stay."""

    def __init__(self, memory_bytes_max: int = 0) -> None:
        """Beyond so much resident memory the process is to be replaced; 0 for no bound."""
        self._memory_bytes_max = memory_bytes_max
        self._handlers = tuple(map(getsignal, _SIGNALS))
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._limits = tuple(map(resource.getrlimit, _LIMITS))
        self._identity = _identity()
        self._locale = locale.setlocale(locale.LC_ALL)
        self._environment = dict(_environment())
        self._affinity = os.sched_getaffinity(0)
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self._socket_timeout = socket.getdefaulttimeout()
        self._recursion_limit = sys.getrecursionlimit()
        self._collects = gc.isenabled()
        self._threads = set(threading.enumerate())
        self._processes = set(guard.children(os.getpid()))
        self._memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def restore(self) -> str:
        """Put the process back in order; empty, or why it has to be replaced: "it …"."""
        try:
            self._restore_signals()
            self._restore_process()
            self._restore_interpreter()
            return self._left_processes() or self._left_threads() or self._grown()
        except Exception as error:  # noqa: BLE001 - whatever a job has done to it
            return f"left what cannot be put back: {type(error).__name__}: {error}"

    def _restore_signals(self) -> None:
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        if (handlers := tuple(map(getsignal, _SIGNALS))) != self._handlers:
            for number, left, ours in zip(_SIGNALS, handlers, self._handlers, strict=True):
                if left != ours:
                    signal.signal(number, ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        signal.set_wakeup_fd(-1)

    def _restore_process(self) -> None:
        os.umask(self._umask)
        os.fchdir(self._directory)
        if (limits := tuple(map(resource.getrlimit, _LIMITS))) != self._limits:
            for limit, left, ours in zip(_LIMITS, limits, self._limits, strict=True):
                if left != ours:
                    resource.setrlimit(limit, ours)
        if os.sched_getaffinity(0) != self._affinity:
            os.sched_setaffinity(0, self._affinity)
        if (identity := _identity()) != self._identity:
            raise PermissionError(f"user, group or priority, {identity}")

    def _restore_interpreter(self) -> None:
        if locale.setlocale(locale.LC_ALL) != self._locale:
            locale.setlocale(locale.LC_ALL, self._locale)
        if _environment() != self._environment:
            os.environ.clear()
            os.environb.update(self._environment)
            time.tzset()
        sys.stdin, sys.stdout, sys.stderr = self._streams
        socket.setdefaulttimeout(self._socket_timeout)
        if sys.getrecursionlimit() != self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
        if gc.isenabled() != self._collects:
            (gc.enable if self._collects else gc.disable)()

    def _left_processes(self) -> str:
        if not self._has_processes():
            return ""
        left = _stays(lambda: self._has_processes() and self._others())
        return f"left running processes ({len(left)})" if left else ""

    def _has_processes(self) -> bool:
        """Whether there are any, below this one too; buries those that have ended."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            while (ended := os.waitid(os.P_ALL, 0, options)) is not None:
                if ended.si_pid in self._processes:
                    return True
                os.waitpid(ended.si_pid, 0)
        except ChildProcessError:
            return False
        return True

    def _others(self) -> list[int]:
        return [pid for pid in guard.children(os.getpid()) if pid not in self._processes]

    def _left_threads(self) -> str:
        if threading.active_count() <= len(self._threads):
            return ""
        left = _stays(lambda: [t for t in threading.enumerate() if t not in self._threads])
        return f"left running threads ({', '.join(t.name for t in left)})" if left else ""

    def _grown(self) -> str:
        if not self._memory_bytes_max or self._resident() <= self._memory_bytes_max:
            return ""
        gc.collect()
        resident = self._resident()
        return f"holds {resident >> 20} MiB" if resident > self._memory_bytes_max else ""

    def _resident(self) -> int:
        return int(os.pread(self._memory, 128, 0).split()[1]) * _PAGE_BYTES


def _stays(look: Callable[[], Any]) -> Any:
    """What is still there after a while; empty as soon as nothing is."""
    give_up_at = time.monotonic() + _LEAVE_SECONDS_MAX
    while (left := look()) and time.monotonic() < give_up_at:
        time.sleep(_LOOK_SECONDS)
    return left
