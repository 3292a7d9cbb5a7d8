"""The process above the one that runs handlers, so that nothing they start outlives it.

A handler can start what leaves its group and session, and can be killed at any time; so can the
worker. The guard runs no handler. Whatever loses its parent below it becomes its own child, and
once the process that runs handlers has ended, or the worker has, it kills all that is left and ends
as that process did. The kernel kills the process that runs handlers when its guard ends.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

END: Final = signal.SIGUSR1
"""Has a guard kill everything below it. None that a terminal or a service manager sends to all."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
# What is left after so long cannot be killed: it is another user's, or hangs in the kernel.
_KILL_SECONDS_MAX: Final = 1.0


def split(parent_pid: int, fds: Iterable[int]) -> None:
    """Fork the process that runs handlers, and return in that one alone; the caller is its guard
    from now on, and keeps none of `fds`."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _die_with(parent_pid, END)
    guard_pid = os.getpid()
    child_pid = os.fork()
    if child_pid == 0:
        os.setsid()
        _die_with(guard_pid, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    for fd in fds:
        os.close(fd)
    _guard(child_pid)


def children(pid: int) -> list[int]:
    """The living and unburied children of a process of this user; none where there is no /proc."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        texts = [(task / "children").read_text() for task in tasks.iterdir()]
    except OSError:  # a thread has just ended, or the kernel was built without these files
        return [int(other.name) for other in _processes() if _parent(other) == pid]
    return [int(child) for text in texts for child in text.split()]


def _processes() -> Iterable[Path]:
    return Path("/proc").glob("[0-9]*")


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return 0


def _die_with(parent_pid: int, signal_number: int) -> None:
    """Have the kernel send the signal when the parent's thread that started this process ends, and
    make this process the parent of what loses its own below it."""
    if sys.platform == "linux":
        import ctypes

        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_PR_SET_PDEATHSIG, int(signal_number))
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent_pid:  # it ended before that
        os._exit(1)


def _guard(child_pid: int) -> NoReturn:
    while os.waitid(os.P_PID, child_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if signal.sigwait((signal.SIGCHLD, END)) == END:
            os.kill(child_pid, signal.SIGKILL)
        _bury_others(child_pid)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child_pid, signal.SIGKILL)  # its number is its own until it is waited for
    _, status = os.waitpid(child_pid, 0)
    _kill_all()
    _end_like(status)


def _bury_others(child_pid: int) -> None:
    """Wait for orphans that have ended."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_ALL, 0, options)) is not None and ended.si_pid != child_pid:
        os.waitpid(ended.si_pid, 0)


def _kill_all() -> None:
    """Kill generation by generation: who loses its parent becomes our child."""
    give_up_at = time.monotonic() + _KILL_SECONDS_MAX
    while time.monotonic() < give_up_at:
        for pid in children(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core is enough
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    os._exit(os.WEXITSTATUS(status))
