"""What both kinds of pool have in common: the interface, the queue, the pace."""

from __future__ import annotations

import abc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from worker.outcome import TIMEOUT, ErrorInfo, Failed, JobTypeInfo, Outcome, Report, Task

logger = logging.getLogger("worker.pool")

# Until a task has been seen to end, runs count as long ones, so that nobody claims far ahead.
_FIRST_AVERAGE_SECONDS: Final = 1.0
_AVERAGE_WEIGHT: Final = 0.1


class Listener(Protocol):
    """Hears what becomes of tasks, on a thread of the pool, which waits meanwhile: do not block.

    A task gets exactly one `on_outcome` (or is returned by `withdraw`), and nothing after it.
    """

    def on_started(self, task: Task) -> None:
        """The handler is about to run."""

    def on_report(self, task: Task, report: Report) -> None:
        """The handler told something."""

    def on_outcome(self, task: Task, outcome: Outcome) -> None:
        """The attempt has ended, or will never begin."""


@dataclass(slots=True, eq=False)
class Run:
    """A task in a pool; times are monotonic seconds."""

    task: Task
    submitted: float
    started: float | None = None
    told_started: bool = False
    # Reported in place of a crash if the process dies: why we kill it.
    verdict: Outcome | None = None
    kill_at: float | None = None


# A call of the listener that is still to be made.
Notice = Callable[[], None]


def deliver(notices: list[Notice]) -> None:
    """Make the calls, in order; a listener that raises is logged, and stops nothing."""
    for notice in notices:
        try:
            notice()
        except Exception:
            logger.exception("the pool's listener failed")


def timed_out(task: Task) -> Failed:
    """The outcome of an attempt that ran into its timeout."""
    message = f"the attempt ran longer than its timeout of {task.timeout_seconds:g} s"
    return Failed(ErrorInfo(TIMEOUT, message))


class Pool(abc.ABC):
    """Runs tasks, `size` at once, in the order in which they were submitted.

    All methods may be called from any thread; `start` comes first, and once. Unknown tokens, those
    of tasks that have ended among them, are ignored.
    """

    def __init__(self, size: int, listener: Listener) -> None:
        if size < 1:
            raise ValueError(f"a pool needs a size of 1 or more, not {size}")
        self.size: Final = size
        self._listener: Final = listener
        self._lock: Final = threading.RLock()
        self._waiting: OrderedDict[str, Run] = OrderedDict()
        self._notices: list[Notice] = []
        self._average_seconds = _FIRST_AVERAGE_SECONDS
        self._stopped = False

    @abc.abstractmethod
    def start(self) -> list[JobTypeInfo]:
        """Load the handlers and say which job types they have.

        Returns when the first task could run. Raises HandlersError, and is stopped then.
        """

    def submit(self, task: Task) -> None:
        """Queue a task; how many is the caller's to bound.

        A task that comes while the pool stops is Interrupted; once it has, this raises
        RuntimeError.
        """
        with self._lock:
            if self._stopped:
                raise RuntimeError("the pool has stopped")
            self._waiting[task.token] = Run(task, time.monotonic())
            self._wake()

    @abc.abstractmethod
    def cancel(self, token: str) -> None:
        """End a task as Cancelled: at once if it has not started, else as soon as can be.

        What had finished before the handler could see the cancellation keeps its outcome.
        """

    @abc.abstractmethod
    def abandon(self, token: str) -> None:
        """Give a task up whose lease is lost: it is stopped as hard as can be, and Interrupted."""

    def withdraw(self, older_than_seconds: float) -> list[Task]:
        """Take back the tasks that have waited so long and not started; they get no outcome.

        If there are any, runs take longer than those that have ended tell: they count as so long
        that nobody claims ahead until enough short ones have ended again.
        """
        with self._lock:
            latest = time.monotonic() - older_than_seconds
            self._recall_if_submitted_by(latest)
            tokens = [token for token, run in self._waiting.items() if run.submitted <= latest]
            taken = [self._waiting.pop(token).task for token in tokens]
            if taken:
                longer = older_than_seconds * self.size
                self._average_seconds = max(self._average_seconds, longer)
            self._wake()
            return taken

    @abc.abstractmethod
    def stop(self, grace_seconds: float) -> None:
        """End the pool: tasks that have not started are Interrupted at once, running ones after
        the grace. Returns when every outcome was told. A second call can shorten the grace.
        """

    @property
    def slots(self) -> int:
        """How many tasks it can run at once just now: `size`, less the slots whose process is
        still starting, or whose handler runs on after its attempt has ended."""
        with self._lock:
            return self._usable()

    @property
    def average_run_seconds(self) -> float:
        """Moving average of how long tasks run, 1 s before the first."""
        return self._average_seconds

    def _tell_started(self, run: Run) -> None:
        self._notices.append(partial(self._listener.on_started, run.task))

    def _tell_report(self, run: Run, report: Report) -> None:
        self._notices.append(partial(self._listener.on_report, run.task, report))

    def _tell_outcome(self, run: Run, outcome: Outcome) -> None:
        self._notices.append(partial(self._listener.on_outcome, run.task, outcome))

    def _count_run(self, seconds: float) -> None:
        self._average_seconds += _AVERAGE_WEIGHT * (seconds - self._average_seconds)

    @abc.abstractmethod
    def _wake(self) -> None:
        """Have the pool's threads look at the queue; called with the lock held."""

    @abc.abstractmethod
    def _recall_if_submitted_by(self, latest: float) -> None:
        """Put back into the queue what was sent ahead, if some of it is that old."""

    @abc.abstractmethod
    def _usable(self) -> int:
        """What `slots` answers; called with the lock held."""
