"""Threads without which a process is alive and useless.

A worker whose claiming thread has died still renews the leases of jobs that nobody runs. Whatever
ends such a thread ends the process, for its supervisor to start anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from jobsvc import telemetry

EXIT_CODE = 70  # EX_SOFTWARE


def thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Not yet started. `target` is to return only when it was asked to."""

    def run() -> None:
        try:
            target()
        except BaseException:  # noqa: BLE001 - nothing is left to hand it to
            telemetry.get_logger("jobsvc").exception("a vital thread died", thread=name)
            os._exit(EXIT_CODE)

    return threading.Thread(target=run, name=name, daemon=True)
