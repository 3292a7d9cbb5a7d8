"""What both kinds of pool have in common: the interface, the queue, the pace."""

from __future__ import annotations

import abc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from jobsvc.core.attempts import (
    TIMEOUT,
    AttemptFailed,
    AttemptKey,
    Claimed,
    Ending,
    JobTypeInfo,
    Report,
    clean_error,
)

logger = logging.getLogger("worker.pool")

T = TypeVar("T")

# Until a task has been seen to end, runs count as long ones, so that nobody claims far ahead.
_FIRST_AVERAGE_SECONDS: Final = 1.0
_AVERAGE_WEIGHT: Final = 0.1


class Listener(Protocol):
    """Hears what becomes of tasks, on a thread of the pool, which waits meanwhile: do not block.

    A task gets exactly one ending (or is returned by `withdraw`), and nothing after it. What has
    gathered comes in one call of each kind, in this order, and of each task as it happened.
    """

    def on_started(self, tasks: Sequence[Claimed]) -> None:
        """Their handlers are about to run."""

    def on_reports(self, reports: Sequence[tuple[Claimed, Report]]) -> None:
        """Handlers told something."""

    def on_endings(self, endings: Sequence[tuple[Claimed, Ending]]) -> None:
        """Attempts have ended, or will never begin."""


@dataclass(slots=True, eq=False)
class Run:
    """A task in a pool; times are monotonic seconds."""

    task: Claimed
    submitted: float
    started: float | None = None
    told_started: bool = False
    # Reported in place of a crash if the process dies: why we kill it.
    verdict: Ending | None = None
    kill_at: float | None = None


@dataclass(slots=True)
class News:
    """What the listener is still to hear."""

    started: list[Claimed] = field(default_factory=list)
    reports: list[tuple[Claimed, Report]] = field(default_factory=list)
    endings: list[tuple[Claimed, Ending]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.started or self.reports or self.endings)

    def deliver(self, listener: Listener) -> None:
        """A listener that raises is logged, and stops nothing."""
        if self.started:
            _call(listener.on_started, self.started)
        if self.reports:
            _call(listener.on_reports, self.reports)
        if self.endings:
            _call(listener.on_endings, self.endings)


def _call(hear: Callable[[list[T]], None], what: list[T]) -> None:
    try:
        hear(what)
    except Exception:
        logger.exception("the pool's listener failed")


def timed_out(task: Claimed) -> AttemptFailed:
    """The ending of an attempt that ran into its timeout."""
    message = f"the attempt ran longer than its timeout of {task.timeout:g} s"
    return AttemptFailed(clean_error(TIMEOUT, message))


class Pool(abc.ABC):
    """Runs tasks, `size` at once, in the order in which they were submitted.

    All methods may be called from any thread; `start` comes first, and once. Unknown keys, those
    of tasks that have ended among them, are ignored.
    """

    def __init__(self, size: int, listener: Listener) -> None:
        if size < 1:
            raise ValueError(f"a pool needs a size of 1 or more, not {size}")
        self.size: Final = size
        self._job_types: frozenset[str] = frozenset()
        self._listener: Final = listener
        self._lock: Final = threading.RLock()
        self._waiting: OrderedDict[AttemptKey, Run] = OrderedDict()
        self._news = News()
        self._average_seconds = _FIRST_AVERAGE_SECONDS
        self._stopped = False

    def start(self) -> list[JobTypeInfo]:
        """Load the handlers and say which job types they have.

        Returns when the first task could run. Raises HandlersError, and is stopped then.
        """
        infos = self._start()
        self._job_types = frozenset(info.name for info in infos)
        return infos

    @property
    def job_types(self) -> frozenset[str]:
        """What its handlers can run; nothing before `start`, and while it is broken."""
        return frozenset() if self.broken else self._job_types

    @property
    def broken(self) -> str:
        """Why no handler can run until that changes; empty while some can."""
        return ""

    def submit(self, tasks: Iterable[Claimed]) -> None:
        """Queue tasks; how many is the caller's to bound.

        What comes while the pool stops is Interrupted; once it has, this raises RuntimeError.
        """
        now = time.monotonic()
        with self._lock:
            if self._stopped:
                raise RuntimeError("the pool has stopped")
            for task in tasks:
                self._waiting[task.key] = Run(task, now)
            self._wake()

    @abc.abstractmethod
    def cancel(self, key: AttemptKey) -> None:
        """End a task as Stopped: at once if it has not started, else as soon as can be.

        What had finished before the handler could see the cancellation keeps its ending.
        """

    @abc.abstractmethod
    def abandon(self, key: AttemptKey) -> None:
        """Give a task up whose lease is lost: it is stopped as hard as can be, and Interrupted."""

    def withdraw(self, older_than_seconds: float) -> list[Claimed]:
        """Take back the tasks that have waited so long and not started; they get no ending.

        If there are any, runs take longer than those that have ended tell: they count as so long
        that nobody claims ahead until enough short ones have ended again.
        """
        with self._lock:
            latest = time.monotonic() - older_than_seconds
            self._recall_if_submitted_by(latest)
            keys = [key for key, run in self._waiting.items() if run.submitted <= latest]
            taken = [self._waiting.pop(key).task for key in keys]
            if taken:
                longer = older_than_seconds * self.size
                self._average_seconds = max(self._average_seconds, longer)
            self._wake()
            return taken

    @abc.abstractmethod
    def stop(self, grace_seconds: float) -> None:
        """End the pool: tasks that have not started are Interrupted at once, running ones after
        the grace. Returns when every ending was told. A second call can shorten the grace.
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

    def _take_news(self) -> News:
        news, self._news = self._news, News()
        return news

    def _count_run(self, seconds: float) -> None:
        self._average_seconds += _AVERAGE_WEIGHT * (seconds - self._average_seconds)

    @abc.abstractmethod
    def _start(self) -> list[JobTypeInfo]:
        """What `start` does."""

    @abc.abstractmethod
    def _wake(self) -> None:
        """Have the pool's threads look at the queue; called with the lock held."""

    @abc.abstractmethod
    def _recall_if_submitted_by(self, latest: float) -> None:
        """Put back into the queue what was sent ahead, if some of it is that old."""

    @abc.abstractmethod
    def _usable(self) -> int:
        """What `slots` answers; called with the lock held."""
