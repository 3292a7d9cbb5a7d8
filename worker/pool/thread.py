"""Handlers in threads of this process: for trusted ones, since nothing can be killed here.

On timeout, cancellation or loss of the lease the ending is told at once, and the slot stays taken
until the handler returns.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final

from jobsvc import telemetry
from jobsvc.core.attempts import AttemptKey, Ending, Interrupted, JobTypeInfo, Report, Stopped
from worker import registry
from worker.child import execution, logs
from worker.child.execution import AttemptContext
from worker.pool.base import Listener, Pool, Run, timed_out

_TICK_SECONDS: Final = 0.1


class ThreadPool(Pool):
    """`size` threads that run handlers, and one that watches the clock and calls the listener."""

    def __init__(
        self,
        size: int,
        handler_modules: Sequence[str],
        listener: Listener,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(size, listener)
        self._modules = handler_modules
        self._environment = environment or {}
        self._changed = threading.Condition(self._lock)
        self._watcher = threading.Thread(target=self._watch, name="pool", daemon=True)
        # By key: what has started and has no ending yet.
        self._running: dict[AttemptKey, tuple[Run, AttemptContext]] = {}
        self._slots_taken = 0
        self._stop_at: float | None = None

    def _start(self) -> list[JobTypeInfo]:
        """Import the handlers into this process and start the threads."""
        os.environ.update(self._environment)
        logs.start_in_threads(self._modules, telemetry.write_line)
        try:
            job_types = registry.load(self._modules)
        except registry.HandlersError:
            self._stopped = True
            raise
        self._watcher.start()
        for number in range(self.size):
            threading.Thread(target=self._work, name=f"handler-{number}", daemon=True).start()
        return job_types

    def cancel(self, key: AttemptKey) -> None:
        """End the task as Stopped now, and ask its handler to stop."""
        with self._changed:
            self._end(key, Stopped())

    def abandon(self, key: AttemptKey) -> None:
        """End the task as Interrupted now, and tell its handler that the lease is lost."""
        with self._changed:
            self._end(key, Interrupted(), lease_lost=True)

    def stop(self, grace_seconds: float) -> None:
        """Wait for running handlers at most so long; those that stay run on in their threads."""
        stop_at = time.monotonic() + grace_seconds
        with self._changed:
            if self._stopped:
                return
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._changed.notify_all()
        self._watcher.join()

    def _end(self, key: AttemptKey, ending: Ending, *, lease_lost: bool = False) -> None:
        run = self._waiting.pop(key, None)
        if run is None and key in self._running:
            run, context = self._running.pop(key)
            context.ask_to_stop(lease_lost=lease_lost)
        if run is not None:
            self._news.endings.append((run.task, ending))
            self._changed.notify_all()

    def _work(self) -> None:
        while (next_run := self._next()) is not None:
            run, context = next_run
            ending = execution.run(run.task, context)
            with self._changed:
                self._slots_taken -= 1
                self._count_run(time.monotonic() - (run.started or 0.0))
                if self._running.pop(run.task.key, None) is not None:
                    self._news.endings.append((run.task, ending))
                self._changed.notify_all()
        execution.close()

    def _next(self) -> tuple[Run, AttemptContext] | None:
        with self._changed:
            while not self._waiting or self._stop_at is not None:
                if self._stopped:
                    return None
                self._changed.wait()
            key, run = self._waiting.popitem(last=False)
            run.started = time.monotonic()
            context = self._context(run)
            self._running[key] = run, context
            self._slots_taken += 1
            self._news.started.append(run.task)
            self._changed.notify_all()
            return run, context

    def _context(self, run: Run) -> AttemptContext:
        task = run.task

        def report(report: Report) -> None:
            with self._changed:
                if task.key in self._running:
                    self._news.reports.append((run.task, report))
                    self._changed.notify_all()

        return AttemptContext(task, report)

    def _watch(self) -> None:
        while not self._stopped:
            with self._changed:
                self._end_overdue(time.monotonic())
                if not self._news:
                    self._stopped = self._stop_at is not None and not self._running
                    if not self._stopped:
                        self._changed.wait(_TICK_SECONDS if self._running else None)
                news = self._take_news()
                contexts = [context for _, context in self._running.values()]
            news.deliver(self._listener)  # without the lock: the listener may call us
            for context in contexts:
                context.tick()
        with self._changed:
            self._changed.notify_all()

    def _end_overdue(self, now: float) -> None:
        if self._stop_at is not None:
            for key in list(self._waiting):
                self._end(key, Interrupted())
        for key, (run, _) in list(self._running.items()):
            started = now if run.started is None else run.started
            if now >= started + run.task.timeout:
                self._end(key, timed_out(run.task))
            elif self._stop_at is not None and now >= self._stop_at:
                self._end(key, Interrupted())

    def _wake(self) -> None:
        self._changed.notify_all()

    def _recall_if_submitted_by(self, latest: float) -> None:
        pass  # nothing is sent ahead: a thread takes a task when it starts it

    def _usable(self) -> int:
        return self.size - (self._slots_taken - len(self._running))
