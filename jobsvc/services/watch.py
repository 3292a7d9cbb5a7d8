"""Watching jobs: one hub a server for all of its watchers.

A watcher is a cursor and a dirty mark. What marks it dirty is a hint (the speed) or the sweep over
all watched jobs (the guarantee); neither carries events. A dirty watcher whose mailbox is empty is
read for, many in one query, so that a slow one costs one page of events and no more.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jobsvc import metrics, telemetry
from jobsvc.core.model import Change, JobEvent
from jobsvc.core.states import JobState
from jobsvc.errors import (
    DatabaseUnavailable,
    Draining,
    JobsvcError,
    JobUnknown,
    LimitReached,
    SequenceOutOfRange,
    StreamExpired,
)
from jobsvc.services.mailboxes import Mailboxes, byte_count
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store.hot import watching
from jobsvc.store.reads import lookups
from jobsvc.store.reads.lookups import Cursor

WATCHERS_MAX = 20_000
PAGE_EVENTS = 64  # of one watcher in one read
READ_CURSORS = 25  # in one query
HEADS_MAX = 1000  # in one query
# What more watchers read, or more than this to take apart, is kept off the event loop.
LOOP_CURSORS_MAX = 4
LOOP_BYTES_MAX = 64 * 1024
# After a read for so many watchers others wait for a moment, so that hints gather; one that is
# alone waits for nobody.
CROWD = 4
GATHER_SECONDS = 0.01
RETRY_SECONDS = 0.5
STREAM_AGE_SECONDS = 30 * 60.0
STREAM_AGE_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Heartbeat:
    time: datetime
    last_sequence: int


class _Watcher:
    __slots__ = (
        "beat_at",
        "cursor",
        "delivered",
        "dirty",
        "emptied",
        "ended",
        "error",
        "events",
        "expires_at",
        "heartbeat_seconds",
        "job_id",
        "new",
        "started",
        "up_to_date",
        "waiting",
    )

    def __init__(self, job_id: str, after_sequence: int, heartbeat_seconds: float) -> None:
        now = time.monotonic()
        age = STREAM_AGE_SECONDS * random.uniform(1 - STREAM_AGE_JITTER, 1 + STREAM_AGE_JITTER)
        self.job_id = job_id
        self.heartbeat_seconds = heartbeat_seconds
        self.beat_at = now + heartbeat_seconds
        self.expires_at = now + age
        self.events: Sequence[JobEvent] = ()  # the mailbox
        self.emptied = False  # its mailbox was, for want of room; nothing is read until it asks
        self.cursor = after_sequence  # the last sequence that was put into the mailbox
        self.delivered = after_sequence
        self.new = True  # whether there is such a job is not known yet
        self.dirty = False  # there may be more than the mailbox holds
        self.up_to_date = False  # the last read found all there was
        self.started = False  # something was delivered
        self.ended = False  # what was delivered last is terminal
        self.error: JobsvcError | None = None
        self.waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class WatchHub:
    """Belongs to one event loop; only `notify` may be called from other threads."""

    def __init__(self, threads: AsyncDatabase, sweep_interval: float) -> None:
        self._threads = threads
        self._sweep_interval = sweep_interval
        self._watchers: defaultdict[str, set[_Watcher]] = defaultdict(set)
        self._count = 0
        # A dict for its order: nobody is passed over by those who are marked again and again.
        self._unread: dict[_Watcher, None] = {}
        self._mailboxes: Mailboxes[_Watcher] = Mailboxes()
        self._work = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._log = telemetry.get_logger("watch")
        metrics.WATCHERS.set_function(lambda: self.watcher_count)

    @property
    def watcher_count(self) -> int:
        return self._count

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            asyncio.create_task(self._read_forever(), name="watch-reader"),
            asyncio.create_task(self._sweep_forever(), name="watch-sweep"),
        ]

    def drain(self) -> None:
        """Ends every watch with Draining, and any that is begun later. What was read already is
        delivered; nothing more is read, or a busy job's watchers would never end."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def notify(self, changes: Iterable[Change]) -> None:
        """A hint that these jobs have events up to these sequences. From any thread."""
        watched = [c for c in changes if c.job_id in self._watchers]
        if watched and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._mark, watched)

    async def watch(
        self, job_id: str, after_sequence: int, heartbeat_seconds: float
    ) -> AsyncGenerator[JobEvent | Heartbeat, None]:
        """Every event after `after_sequence`, once and in order, then each new one; ends after a
        terminal event that is the job's last so far.

        Raises JobUnknown, SequenceOutOfRange, DatabaseUnavailable, LimitReached, Draining, and
        StreamExpired after about half an hour.
        """
        watcher = self._enter(job_id, after_sequence, heartbeat_seconds)
        try:
            while (messages := await self._next(watcher)) is not None:
                for message in messages:
                    yield message
        finally:
            self._leave(watcher)

    async def heads(self, job_ids: Sequence[str]) -> Mapping[str, tuple[int, JobState]]:
        """Job id -> (last sequence, state), for those that exist."""
        database = self._threads.database
        if database.sqlite or len(job_ids) > LOOP_CURSORS_MAX:
            return await self._threads.run(watching.heads, database, job_ids)
        asked = watching.heads_asked(job_ids)
        return lookups.by_job(await self._threads.once(watching.HEADS, asked))

    def _enter(self, job_id: str, after_sequence: int, heartbeat_seconds: float) -> _Watcher:
        if self._draining:
            raise Draining
        if self._count >= WATCHERS_MAX:
            raise LimitReached(f"this server has {WATCHERS_MAX} watchers already; try another")
        watcher = _Watcher(job_id, after_sequence, heartbeat_seconds)
        self._watchers[job_id].add(watcher)
        self._count += 1
        self._unread[watcher] = None
        self._work.set()
        return watcher

    def _leave(self, watcher: _Watcher) -> None:
        self._count -= 1
        self._unread.pop(watcher, None)
        self._mailboxes.forget(watcher)
        others = self._watchers[watcher.job_id]
        others.discard(watcher)
        if not others:
            del self._watchers[watcher.job_id]

    async def _next(self, watcher: _Watcher) -> Sequence[JobEvent | Heartbeat] | None:
        """Waits for what is to be delivered next; None: the history has ended."""
        while True:
            if watcher.error is not None:
                raise watcher.error
            if watcher.up_to_date and watcher.ended and not watcher.events:
                return None
            now = time.monotonic()
            if now >= watcher.expires_at:
                raise StreamExpired
            if watcher.events:
                return self._take(watcher)
            if self._draining:
                raise Draining
            watcher.emptied = False
            if watcher.dirty:
                self._unread[watcher] = None
                self._work.set()
            if now >= watcher.beat_at or (watcher.up_to_date and not watcher.started):
                watcher.started = True
                watcher.beat_at = now + watcher.heartbeat_seconds
                return [Heartbeat(datetime.now(UTC), watcher.delivered)]
            await self._wait(watcher, min(watcher.beat_at, watcher.expires_at) - now)

    def _take(self, watcher: _Watcher) -> Sequence[JobEvent]:
        events = watcher.events
        count = self._mailboxes.take(watcher, events)
        events, watcher.events = events[:count], events[count:]
        watcher.started = True
        watcher.ended = events[-1].type.terminal
        watcher.delivered = events[-1].sequence
        watcher.beat_at = time.monotonic() + watcher.heartbeat_seconds
        return events

    async def _wait(self, watcher: _Watcher, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        watcher.waiting = loop.create_future()
        timer = loop.call_later(max(seconds, 0.0), watcher.wake)
        try:
            await watcher.waiting
        finally:
            timer.cancel()
            watcher.waiting = None

    def _mark(self, changes: Iterable[Change]) -> None:
        for change in changes:
            for watcher in self._watchers.get(change.job_id, ()):
                if change.last_sequence > watcher.cursor:
                    watcher.dirty = True
                    self._unread[watcher] = None
        if self._unread:
            self._work.set()

    async def _read_forever(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            count = 0
            try:
                while self._unread:
                    count += await self._read_some()
            except Exception as error:  # noqa: BLE001 - logged; the loop must go on
                if not isinstance(error, DatabaseUnavailable):
                    self._log.exception("reading for watchers failed")
                self._fail_new()
                self._work.set()
                await asyncio.sleep(RETRY_SECONDS)
            if count >= CROWD:
                await asyncio.sleep(GATHER_SECONDS)

    async def _read_some(self) -> int:
        """Answers for how many watchers it read."""
        new = [w for w in self._unread if w.new][:HEADS_MAX]
        if len(new) > READ_CURSORS:  # most who come in a crowd have seen all there is
            await self._begin(new)
        cursors = self._next_cursors()
        if not cursors:
            return 0
        reading = [watcher for watchers in cursors.values() for watcher in watchers]
        for watcher in reading:
            self._unread.pop(watcher, None)
            watcher.dirty = False  # what is hinted from here on may not be in this read
        try:
            found = await self._events_after(list(cursors))
        except BaseException:
            for watcher in reading:
                watcher.dirty = True
            self._mark_unread(reading)
            raise
        unknown = []
        for cursor, watchers in cursors.items():
            events = found.get(cursor, ())
            share = byte_count(events) // len(watchers)
            for watcher in watchers:
                if watcher.new and cursor not in found:
                    unknown.append(watcher)
                else:
                    watcher.new = False
                    self._put(watcher, events, share)
        if unknown:
            self._mark_unread(unknown)
            await self._begin(unknown)
        return len(reading)

    async def _events_after(self, cursors: Sequence[Cursor]) -> Mapping[Cursor, list[JobEvent]]:
        if self._threads.database.sqlite or len(cursors) > LOOP_CURSORS_MAX:
            database = self._threads.database
            return await self._threads.run(watching.events_after, database, cursors, PAGE_EVENTS)
        asked = watching.events_asked(cursors, PAGE_EVENTS)
        rows = await self._threads.once(watching.EVENTS_AFTER, *asked)
        if sum(len(row[-1] or "") for row in rows) > LOOP_BYTES_MAX:
            return await self._threads.run(lookups.by_cursor, rows)
        return lookups.by_cursor(rows)

    def _mark_unread(self, watchers: Iterable[_Watcher]) -> None:
        """Of these, whoever has not left."""
        here = (w for w in watchers if w in self._watchers.get(w.job_id, ()))
        self._unread.update(dict.fromkeys(here))

    def _next_cursors(self) -> dict[tuple[str, int], list[_Watcher]]:
        """Whom to read for next: (job id, sequence) -> the watchers of that job that stand there.

        One whose mailbox is still full comes back by itself when it has emptied it.
        """
        cursors: dict[tuple[str, int], list[_Watcher]] = {}
        for watcher in tuple(self._unread):
            cursor = watcher.job_id, watcher.cursor
            if watcher.events or watcher.emptied:
                self._unread.pop(watcher, None)
            elif cursor in cursors:
                cursors[cursor].append(watcher)
            elif len(cursors) < READ_CURSORS:
                cursors[cursor] = [watcher]
        return cursors

    def _put(self, watcher: _Watcher, events: Sequence[JobEvent], count: int) -> None:
        """`count` of their bytes are this watcher's: others may have got the same events."""
        following = watcher.up_to_date  # and not still replaying what is old
        watcher.events = events
        watcher.up_to_date = len(events) < PAGE_EVENTS
        if events:
            watcher.cursor = events[-1].sequence
            if following:
                age = datetime.now(UTC) - events[-1].event_time
                metrics.WATCH_LAG.observe(max(age.total_seconds(), 0.0))
        if not watcher.up_to_date:
            watcher.dirty = True
        for other in self._mailboxes.put(watcher, count):
            self._empty(other)
        watcher.wake()

    @staticmethod
    def _empty(watcher: _Watcher) -> None:
        """For want of room: what was in its mailbox is read again when it has come so far."""
        watcher.events = ()
        watcher.cursor = watcher.delivered
        watcher.up_to_date = False
        watcher.dirty = watcher.emptied = True
        watcher.wake()

    async def _begin(self, new: list[_Watcher]) -> None:
        """Looks up how far the jobs of these have come, and ends who is entitled to nothing. Those
        for whom there is something to read are read for next."""
        ids = list({w.job_id for w in new})
        heads = await self.heads(ids)
        for watcher in new:
            watcher.new = False
            head = heads.get(watcher.job_id)
            if head is None:
                self._end(watcher, JobUnknown(watcher.job_id))
            elif watcher.cursor > head[0]:
                self._end(watcher, SequenceOutOfRange(watcher.cursor, 1, head[0]))
            elif watcher.cursor == head[0]:  # nothing to replay
                watcher.up_to_date = True
                watcher.ended = head[1].terminal
                self._unread.pop(watcher, None)
                watcher.wake()

    def _end(self, watcher: _Watcher, error: JobsvcError) -> None:
        self._unread.pop(watcher, None)
        watcher.error = error
        watcher.wake()

    def _fail_new(self) -> None:
        """Whoever has just come is told; the others wait for the database to come back."""
        for watcher in [w for w in self._unread if w.new]:
            self._end(watcher, DatabaseUnavailable())

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_interval)
            ids = list(self._watchers)
            try:
                for start in range(0, len(ids), HEADS_MAX):
                    await self._sweep(ids[start : start + HEADS_MAX])
            except DatabaseUnavailable:
                continue  # the next sweep finds what this one would have
            except Exception:  # noqa: BLE001 - logged; the loop must go on
                self._log.exception("sweep failed")

    async def _sweep(self, ids: list[str]) -> None:
        heads = await self.heads(ids)
        self._mark(Change(job_id, last) for job_id, (last, _) in heads.items())
        for job_id in ids:
            if job_id not in heads:
                for watcher in tuple(self._watchers.get(job_id, ())):
                    if not watcher.new:
                        self._end(watcher, JobUnknown(job_id))
