"""A process does not outlive the threads that it cannot do without."""

from __future__ import annotations

import subprocess
import sys

from jobsvc import vital

DIES = """
import time
from jobsvc import vital
def fail():
    raise RuntimeError("out of luck")
vital.thread("claim", fail).start()
time.sleep(60)
"""


def test_the_process_ends_with_the_thread_and_says_why() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DIES], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == vital.EXIT_CODE
    assert "a vital thread died" in ended.stdout + ended.stderr
    assert "out of luck" in ended.stdout + ended.stderr


def test_a_thread_that_returns_ends_nothing() -> None:
    seen: list[int] = []
    thread = vital.thread("short", lambda: seen.append(1))
    thread.start()
    thread.join()
    assert seen == [1]
