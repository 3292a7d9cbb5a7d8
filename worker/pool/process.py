"""Handlers in child processes, so that whatever one does hits its own job only.

One thread of the parent does all the I/O and owns all children: it starts them (the kernel kills a
child when the thread that started it ends), sends tasks, reads what they tell, watches timeouts
and kills. Where runs are short, a child is sent its next tasks ahead, so that it need not wait for
the parent between two. The tickets of `worker.child.wire` make that safe: a task is taken back from
its child, whatever the child is doing, or was certainly started.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Final

from jobsvc import vital
from jobsvc.core.attempts import (
    WORKER_LOST,
    AttemptFailed,
    AttemptKey,
    Ending,
    Interrupted,
    JobTypeInfo,
    Stopped,
    clean_error,
)
from worker.child import wire
from worker.pool.base import Listener, Pool, Run, logger, timed_out
from worker.pool.child import START_SECONDS_MAX, Child, ChildLimits
from worker.registry import HandlersError

CANCEL_GRACE_SECONDS: Final = 1.0

# Tasks are sent ahead to a child as long as all it has should take no longer than this, and taken
# back when the first of them does.
_AHEAD_SECONDS_MAX: Final = 0.02
_TASKS_AT_CHILD_MAX: Final = 32
# While every child has its next tasks, what they tell is read at most so often: to be woken for
# each ending costs more than all else about it.
_GATHER_SECONDS: Final = 0.003

_START_BACKOFF_SECONDS: Final = 0.1
_START_BACKOFF_SECONDS_MAX: Final = 10.0
_CHECK_SECONDS: Final = 0.5
_WAKE_BYTES: Final = 4096

# What only the service itself may know.
_SECRETS: Final = ("JOBSVC_DATABASE_URL", "JOBSVC_BROKER_URL", "JOBSVC_TOKENS")


def _precedence(child: Child) -> tuple[int, int]:
    """Whose turn it is among those that take tasks: what a worn one still runs has its slot."""
    rank = 1 if not child.worn else 0 if child.runs else 2
    return rank, len(child.runs)


class ProcessPool(Pool):
    """`size` child processes that run handlers. The parent imports none."""

    def __init__(
        self,
        size: int,
        handler_modules: Sequence[str],
        listener: Listener,
        environment: Mapping[str, str] | None = None,
        limits: ChildLimits | None = None,
        *,
        cancel_grace_seconds: float = CANCEL_GRACE_SECONDS,
    ) -> None:
        super().__init__(size, listener)
        self._limits = limits or ChildLimits()
        self._modules = handler_modules
        self._environment = {
            name: value
            for name, value in {**os.environ, **(environment or {})}.items()
            if not name.startswith(_SECRETS)
        }
        self._cancel_grace_seconds = cancel_grace_seconds
        self._thread = vital.thread("pool", self._main)
        self._started: Future[list[JobTypeInfo]] = Future()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._asleep = False
        self._children: list[Child] = []
        self._owners: dict[AttemptKey, tuple[Child, int]] = {}  # of what was sent, by key
        self._requests: list[tuple[AttemptKey, Ending]] = []
        self._last_number = 0
        self._start_failures = 0
        self._broken = ""
        self._start_not_before = 0.0
        self._check_at = 0.0
        self._stop_at: float | None = None

    # From any thread.

    def _start(self) -> list[JobTypeInfo]:
        """Start the children; the first one's word on its job types holds."""
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread.start()
        try:
            return self._started.result()
        except HandlersError:
            self.stop(0)
            raise

    @property
    def broken(self) -> str:
        """Why the last child that was to replace one could not start, while there is no other."""
        with self._lock:
            return "" if self._usable() else self._broken

    def cancel(self, key: AttemptKey) -> None:
        """Ask the handler to stop, and kill its process after the grace."""
        self._request(key, Stopped())

    def abandon(self, key: AttemptKey) -> None:
        """Kill the task's process at once."""
        self._request(key, Interrupted())

    def stop(self, grace_seconds: float) -> None:
        """End the pool; no child is left when this returns."""
        stop_at = time.monotonic() + grace_seconds
        with self._lock:
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._wake()
        self._thread.join()

    def _request(self, key: AttemptKey, ending: Ending) -> None:
        with self._lock:
            self._requests.append((key, ending))
            self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self._wake_in.send(b"\0")

    def _usable(self) -> int:
        return min(self.size, sum(child.usable for child in self._children))

    def _recall_if_submitted_by(self, latest: float) -> None:
        for child in self._children:
            ahead = list(child.runs.values())[1:]
            if any(run.submitted <= latest for run in ahead):
                self._recall(child)

    # On the I/O thread, with the lock but where said.

    def _main(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 - whoever submits hears of it
            logger.critical("the pool has failed, and stops", exc_info=True)
            if not self._started.done():
                self._started.set_exception(error)
        self._finish()

    def _turn(self) -> bool:
        """Do what is due, tell what is to be told, wait and read. False when all is over."""
        with self._lock:
            self._tend(time.monotonic())
            if self._stop_at is not None and not self._children and not self._news:
                self._stopped = True
                return False
            news = self._take_news()
            self._asleep = not news
            wait_seconds = self._wait_seconds(time.monotonic()) if self._asleep else 0.0
            crowded = self._is_crowded()
        news.deliver(self._listener)  # without the lock: the listener may call us
        if crowded:
            time.sleep(_GATHER_SECONDS)
        events = self._selector.select(wait_seconds)
        with self._lock:
            self._asleep = False
            for key, mask in events:
                if key.data is None:
                    self._wake_out.recv(_WAKE_BYTES)
                elif key.data in self._children:
                    self._serve(key.data, mask)
        return True

    def _finish(self) -> None:
        """Leave nothing behind, and no task without an ending; without the lock."""
        with self._lock:
            self._stopped = True
            self._asleep = False
            if not self._started.done():
                self._started.set_exception(HandlersError("the pool was stopped at its start"))
            for child in self._children:
                child.kill()
                child.bury()
                for run in child.runs.values():
                    self._news.endings.append((run.task, Interrupted()))
            for run in self._waiting.values():
                self._news.endings.append((run.task, Interrupted()))
            self._children.clear()
            self._owners.clear()
            self._waiting.clear()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()
        self._news.deliver(self._listener)

    def _tend(self, now: float) -> None:
        for key, ending in self._requests:
            self._grant(key, ending, now)
        self._requests.clear()
        if now >= self._check_at:
            self._check_at = now + _CHECK_SECONDS
            for child in list(self._children):
                self._check(child, now)
        for child in self._children:
            self._tend_head(child, now)
        if self._stop_at is None:
            self._balance(now)
            self._assign(now)
        else:
            self._wind_down(now)

    def _wait_seconds(self, now: float) -> float:
        """How long nothing is due, unless something comes."""
        due = [self._check_at]
        if self._stop_at is not None and self._owners:
            due.append(self._stop_at)
        if self._start_not_before > now:
            due.append(self._start_not_before)
        for child in self._children:
            if child.killed or child.head is None:
                continue
            _, head = child.head
            if head.started is None:
                return 0.0  # it has just come forward: the next turn tends it
            due.append(head.started + head.task.timeout)
            if head.kill_at is not None:
                due.append(head.kill_at)
            if len(child.runs) > 1:
                due.append(head.started + _AHEAD_SECONDS_MAX)
        return max(0.0, min(due) - now)

    def _is_crowded(self) -> bool:
        """Whether every child has its next task: none waits for us, and nobody for a lone job."""
        if self._requests or self._stop_at is not None:
            return False
        return min((len(child.runs) for child in self._children if child.usable), default=0) > 1

    def _grant(self, key: AttemptKey, ending: Ending, now: float) -> None:
        """Cancel or abandon a task, wherever it is."""
        if key in self._owners:
            self._recall(self._owners[key][0], head_too=True)
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self._news.endings.append((waiting.task, ending))
        elif key in self._owners:
            child, number = self._owners[key]
            run = child.runs[number]
            if isinstance(ending, Interrupted):
                run.verdict = ending
                self._kill(child)
            elif run.verdict is None:
                run.verdict = ending
                run.kill_at = now + self._cancel_grace_seconds
                self._send(child, wire.cancel_frame(number))

    def _check(self, child: Child, now: float) -> None:
        """See what the sockets do not tell: a death hidden by a fork that holds them, a hang."""
        if child.has_exited():
            self._bury(child)
        elif child.killed and now >= child.deadline:
            child.kill_guard()
        elif (not child.ready or child.dismissed) and now >= child.deadline and not child.killed:
            if not child.ready:
                child.broken = f"not loaded within {START_SECONDS_MAX:g} s"
            child.kill()

    def _tend_head(self, child: Child, now: float) -> None:
        if child.killed or child.head is None:
            return
        _, run = child.head
        if run.started is None:
            run.started = now
            if not run.told_started:
                run.told_started = True
                self._news.started.append(run.task)
        elapsed = now - run.started
        if elapsed >= run.task.timeout:
            run.verdict = timed_out(run.task) if run.verdict is None else run.verdict
            self._kill(child)
        elif run.kill_at is not None and now >= run.kill_at:
            self._kill(child)
        elif len(child.runs) > 1 and elapsed >= _AHEAD_SECONDS_MAX:
            self._recall(child)

    def _recall(self, child: Child, *, head_too: bool = False) -> None:
        """Put what the child has not started back to the front of the queue."""
        for run in reversed(child.take_back(head_too=head_too)):
            del self._owners[run.task.key]
            run.started = run.verdict = None
            self._waiting[run.task.key] = run
            self._waiting.move_to_end(run.task.key, last=False)

    def _kill(self, child: Child) -> None:
        self._recall(child, head_too=True)
        child.kill()

    def _balance(self, now: float) -> None:
        """Keep `size` children that take tasks; a worn one goes when its successor is ready."""
        staying = [child for child in self._children if not child.dismissed]
        wanted = self.size + sum(child.worn for child in staying)
        if now >= self._start_not_before:
            for _ in range(wanted - len(staying)):
                self._spawn(now)
        fresh = sum(child.ready and not child.worn and not child.killed for child in staying)
        for child in staying:
            if child.worn and not child.runs and not child.killed and fresh >= self.size:
                child.dismiss()

    def _spawn(self, now: float) -> None:
        try:
            child = Child(self._modules, self._environment, self._limits)
        except OSError as error:  # no processes or descriptors left
            self._start_failed(f"no child process can be started: {error}", now)
            return
        self._children.append(child)
        self._selector.register(child.frames, selectors.EVENT_READ, child)

    def _start_failed(self, why: str, now: float) -> None:
        if not self._started.done():
            self._started.set_exception(HandlersError(why))
            return
        if self._stop_at is not None:
            return  # it was we who ended it
        self._start_failures += 1
        self._broken = why
        backoff = _START_BACKOFF_SECONDS * 2.0 ** min(self._start_failures, 10)
        backoff = min(backoff, _START_BACKOFF_SECONDS_MAX)
        self._start_not_before = now + backoff
        logger.error("%s; the next attempt is in %.1f s", why, backoff)

    def _assign(self, now: float) -> None:
        """Give each task to the child that it would start on first, and all of a child at once."""
        if not self._waiting:
            return
        usable = [child for child in self._children if child.usable]
        # A worn child works on while its successor starts, but never beside it.
        fresh = sum(not child.worn for child in usable)
        usable.sort(key=_precedence)
        usable = usable[: self.size]
        loads = [len(child.runs) for child in usable]
        limits = [
            0 if child.worn and fresh >= self.size else self._takes(child, now) for child in usable
        ]
        given: list[dict[int, Run]] = [{} for _ in usable]
        while self._waiting and usable:
            place = loads.index(min(loads))
            if loads[place] >= limits[place]:
                break  # it had better wait here
            key, run = self._waiting.popitem(last=False)
            self._last_number += 1
            self._owners[key] = usable[place], self._last_number
            given[place][self._last_number] = run
            loads[place] += 1
        for child, runs in zip(usable, given, strict=True):
            if runs:
                child.send_tasks(runs)
                self._watch_writes(child)
                self._tend_head(child, now)

    def _takes(self, child: Child, now: float) -> int:
        """How many tasks it is to have, those that it has included: one, or as many more as will
        have run within a moment. Nothing more while it has more than half of that: they come
        together then."""
        if child.head is not None:
            started = child.head[1].started
            if started is None or now - started >= _AHEAD_SECONDS_MAX:
                return 0
        most = int(_AHEAD_SECONDS_MAX / max(self._average_seconds, 1e-6))
        most = max(1, min(most, _TASKS_AT_CHILD_MAX))
        return most if len(child.runs) <= most // 2 else 0

    def _wind_down(self, now: float) -> None:
        for child in self._children:
            self._recall(child)
        for run in self._waiting.values():
            self._news.endings.append((run.task, Interrupted()))
        self._waiting.clear()
        for child in self._children:
            if child.killed or child.dismissed:
                continue
            if child.runs and self._stop_at is not None and now >= self._stop_at:
                for run in child.runs.values():
                    run.verdict = run.verdict or Interrupted()
                child.kill()
            elif not child.ready:
                child.kill()
            elif not child.runs:
                child.dismiss()

    # What comes from the children.

    def _serve(self, child: Child, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            child.flush()
            self._watch_writes(child)
        if mask & selectors.EVENT_READ:
            self._read(child)
        if child.ended:
            self._bury(child)

    def _read(self, child: Child) -> bool:
        """Read once; false if nothing was there."""
        try:
            frames = child.receive()
            for frame in frames or ():
                self._handle(child, frame)
        except (wire.ProtocolError, KeyError, ValueError, TypeError, IndexError) as error:
            logger.error("a child process sent what cannot be read, and is killed: %r", error)
            child.ended = True
            return False
        return frames is not None

    def _handle(self, child: Child, frame: wire.Frame) -> None:
        if frame.kind in wire.ENDINGS:
            ending = wire.read_ending(frame)
            run = child.runs.pop(frame.number)
            del self._owners[run.task.key]
            self._count_run(frame.seconds)
            self._news.endings.append((run.task, ending))
            if child.dismissed:
                self._recall(child, head_too=True)
            self._tend_head(child, time.monotonic())
        elif frame.kind == wire.READY:
            child.begin()
            self._start_failures = 0
            self._broken = ""
            if not self._started.done():
                self._started.set_result(wire.read_ready(frame))
        elif frame.kind == wire.RETIRED:
            child.retire()
            job_type = child.runs[frame.number].task.job_type
            why = frame.head.decode(errors="replace")
            logger.warning("a child process is replaced: after a job of %s it %s", job_type, why)
        elif frame.kind == wire.BROKEN:
            child.broken = frame.head.decode(errors="replace")
        else:
            task = child.runs[frame.number].task
            self._news.reports.append((task, wire.read_report(frame)))

    def _send(self, child: Child, data: bytes) -> None:
        child.send(data)
        self._watch_writes(child)

    def _watch_writes(self, child: Child) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.unsent else 0)
        if self._selector.get_key(child.frames).events != events:
            self._selector.modify(child.frames, events, child)

    def _bury(self, child: Child) -> None:
        """Settle what a child leaves that is dead, or of no use any more."""
        while not child.ended and self._read(child):
            pass
        child.kill()  # what its handlers have started, and itself if it only closed its socket
        self._recall(child, head_too=True)
        self._selector.unregister(child.frames)
        self._children.remove(child)
        cause = child.bury()
        if not child.ready:
            where = f"while it loaded the handlers from {','.join(self._modules)}"
            why = child.broken or f"a child process died {where}: {cause}"
            self._start_failed(why, time.monotonic())
        for number, run in child.runs.items():
            del self._owners[run.task.key]
            message = f"the child process died: {cause}"
            ending: Ending = AttemptFailed(clean_error(WORKER_LOST, message), crashed=True)
            if run.verdict is not None:
                ending = run.verdict
            elif number != child.victim:  # it came next, after the kill was decided
                ending = Interrupted()
            self._news.endings.append((run.task, ending))
        child.runs.clear()
