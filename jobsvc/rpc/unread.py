"""Answers that wait in gRPC's core until their clients read them: for how long, and how many bytes.

A client decides how much it takes. What it does not take stays here, with all that belongs to its
call; so it has a time limit, and where there is no room for all, the caller that holds most loses
its oldest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from jobsvc.errors import LimitReached
from jobsvc.rpc.tasks import holder
from jobsvc.telemetry import get_logger

log = get_logger(__name__)

MIB = 1024 * 1024
CALL_BYTES = 4 * 1024  # what is counted for a call beside its answer


@dataclass(frozen=True, slots=True)
class UnreadLimits:
    """Bytes in all, how long an answer may stay, and how long at least where others need room."""

    bytes_max: int = 64 * MIB
    seconds_max: float = 30.0
    pressed_seconds_max: float = 1.0


class Stream(Protocol):
    """One whose messages are written one after the other."""

    caller: str
    blocked: int  # bytes of the message that is being written

    def give_up(self) -> None: ...


@dataclass(slots=True)
class _Answer:
    caller: str
    held: int
    since: float
    serving: asyncio.Task[Any] | None


class Unread:
    """For one event loop."""

    def __init__(self, limits: UnreadLimits | None = None) -> None:
        self._limits = limits or UnreadLimits()
        self._answers: dict[asyncio.Task[Any], _Answer] = {}  # by who holds the call, oldest first
        self._held = 0
        self._by_caller: dict[str, int] = {}
        self._dropped = 0
        self.streams: dict[Stream, None] = {}  # oldest first

    def add(self, caller: str, count: int) -> None:
        """The call of the running task ends with an answer of `count` bytes. Raises LimitReached
        where there is no room for it."""
        task = holder()
        if task is None or task in self._answers:
            return
        count += CALL_BYTES
        if self._held + count > self._limits.bytes_max:
            self._make_room(count)
        now = time.monotonic()
        self._answers[task] = _Answer(caller, count, now, asyncio.current_task())
        self._held += count
        self._by_caller[caller] = self._by_caller.get(caller, 0) + count
        task.add_done_callback(self._remove)

    def keep(self, caller: str, count: int) -> None:
        """The call of the running task ends without an answer, and what it has sent is not read:
        as long as there is room its client can find out why."""
        try:
            self.add(caller, count)
        except LimitReached:
            if (task := holder()) is not None:
                task.cancel()

    def look(self) -> None:
        """Lets go of what nobody has read for too long. To be called now and then."""
        before = time.monotonic() - self._limits.seconds_max
        for task in self._older_than(before):
            self._drop(task)
        self._end_streams()
        if self._dropped:
            log.warning("answers that were not read are dropped", calls=self._dropped)
            self._dropped = 0

    def _older_than(self, moment: float) -> list[asyncio.Task[Any]]:
        older = takewhile(lambda item: item[1].since < moment, self._answers.items())
        return [task for task, _ in older]

    def _make_room(self, count: int) -> None:
        moment = time.monotonic() - self._limits.pressed_seconds_max
        while self._answers and self._held + count > self._limits.bytes_max:
            most = max(self._by_caller, key=self._by_caller.__getitem__)
            task = next(t for t, answer in self._answers.items() if answer.caller == most)
            if self._answers[task].since > moment:
                raise LimitReached("too many answers have not been read by their callers yet")
            self._drop(task)

    def _end_streams(self) -> None:
        blocked: Counter[str] = Counter()
        for stream in self.streams:
            blocked[stream.caller] += stream.blocked
        over = blocked.total() - self._limits.bytes_max
        if over <= 0:
            return
        most = max(blocked, key=blocked.__getitem__)
        for stream in [s for s in self.streams if s.caller == most and s.blocked]:
            if over <= 0:
                break
            over -= stream.blocked
            stream.give_up()

    def _drop(self, task: asyncio.Task[Any]) -> None:
        """The core cancels the call, once neither of its tasks holds it."""
        serving = self._answers[task].serving
        self._dropped += 1
        self._remove(task)
        task.cancel()
        if serving is not None:
            serving.cancel()

    def _remove(self, task: asyncio.Task[Any]) -> None:
        answer = self._answers.pop(task, None)
        if answer is None:
            return
        self._held -= answer.held
        if left := self._by_caller[answer.caller] - answer.held:
            self._by_caller[answer.caller] = left
        else:
            del self._by_caller[answer.caller]
