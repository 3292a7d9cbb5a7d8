"""Threads, and a parent, without which a process is alive and useless; and how processes end.

A worker whose claiming thread has died still renews the leases of jobs that nobody runs. Whatever
ends such a thread ends the process, for its supervisor to start anew.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

from jobsvc import telemetry

EXIT_CODE = 70  # EX_SOFTWARE

_PR_SET_PDEATHSIG = 1


def thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Not yet started. `target` is to return only when it was asked to."""

    def run() -> None:
        try:
            target()
        except BaseException:  # noqa: BLE001 - nothing is left to hand it to
            telemetry.get_logger("jobsvc").exception("a vital thread died", thread=name)
            telemetry.flush()
            os._exit(EXIT_CODE)

    return threading.Thread(target=run, name=name, daemon=True)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when the parent's thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before that
        os._exit(1)


def died_of(code: int) -> str:
    """What a process died of, by its exit code as `subprocess` has it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"
