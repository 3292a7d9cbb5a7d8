"""Watching all jobs: one reader a server for all of its fleet watchers.

The reader follows the one order of all events (jobsvc/store/fleet.py) and keeps a window of what it
read last. A watcher is a position in that order and a filter. While its position lies within the
window it takes from there what follows; behind it, because it resumes from an older place or is
slow, it reads pages of its own until it has caught up. So a slow one costs nobody anything, and
what a watcher gets depends on its position alone, whichever server it is on.

A hint or a timer makes the reader look; neither carries events. While something that has committed
is hidden behind a transaction that began earlier and still writes, it looks more often; and where
that lasts, it asks whether that transaction can write events at all, and passes over it if not.

Catching up, with events of a while ago, goes in turns with a pause in proportion to what the
process has done since the last, so that other calls have their share of it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import NamedTuple

from jobsvc import metrics, telemetry
from jobsvc.core.model import JobFilter
from jobsvc.errors import (
    DatabaseUnavailable,
    Draining,
    LimitReached,
    ResumeTokenExpired,
    StreamExpired,
)
from jobsvc.services.pacing import Pace
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import STREAM_AGE_JITTER, STREAM_AGE_SECONDS
from jobsvc.store import schema
from jobsvc.store.database import Connection, Database
from jobsvc.store.dialects.reading import in_microseconds, moment
from jobsvc.store.reads import fleet
from jobsvc.store.reads.fleet import FleetEvent, Page, Position

WATCHERS_MAX = 1_000
PAGE_EVENTS = 200  # in one read, and at most so many are in a watcher's hands
WINDOW_EVENTS = 8_192
WINDOW_BYTES = 16 * 1024 * 1024
CATCHING_UP_MAX = 2  # reads at once: the threads are there for all calls
# Reads are at least so far apart, so that hints of a busy moment gather.
GATHER_SECONDS = 0.02
# The longest between two reads. What another server takes and nobody starts gives no hint.
LOOK_SECONDS_MAX = 1.0
# The first of the waits while something is hidden; each is twice the one before.
LOOK_AGAIN_SECONDS = 0.02
# After so long it asks who holds it up, which costs more than a look does.
ASK_SECONDS = 0.25
# After this it begins with what is hidden: the first beat is not to come late.
BEGIN_SECONDS_MAX = 0.5
RETRY_SECONDS = 0.5
# A mark is good for the setting's time, and for so much longer as it may be late when it is sent.
# What comes after it is kept for longer (PURGE_GRACE in jobsvc/store/verbs/upkeep.py).
LATE = timedelta(seconds=10)
# A full page whose events are older is of somebody who catches up.
LIVE = timedelta(seconds=1)
PACE_SHARE = 0.25
PACE_SECONDS_MAX = 0.15
# A watcher whose latest mark lies further back than where it stands gets a fresh one.
FRESH = timedelta(minutes=1)
EVENT_BYTES = 1_000  # what one takes beside its texts

_position = attrgetter("mark.position")


class Mark(NamedTuple):
    """Where a watcher stands, for it to go on from: all up to `position` was told to it, or hidden
    by its filter. At `time`, by the database's clock, nothing more had committed."""

    incarnation: str
    time: datetime
    position: Position


class Told:
    """An event that is told to watchers. `wire`: its form on the wire; whoever makes it first
    keeps it here, as it is the same for all of them."""

    __slots__ = ("found", "mark", "size", "wire")

    def __init__(self, found: FleetEvent, mark: Mark) -> None:
        self.found = found
        self.mark = mark
        self.size = EVENT_BYTES + len(found.detail or "")
        self.wire = b""


@dataclass(frozen=True, slots=True)
class Beat:
    time: datetime
    mark: Mark


# Is called for each event before it is told, perhaps in a thread.
Prepare = Callable[[Told], object]


class _Behind(NamedTuple):
    """A page for a watcher that is behind the window, and where it stands afterwards."""

    page: Page
    told: Sequence[Told]
    end: Mark


class _Window:
    """The latest events, from after `start` up to `end`."""

    def __init__(self, page: Page) -> None:
        """Of no events: what comes after the page."""
        self.start = page.end
        self.end = Mark(page.incarnation, page.now, page.end)
        self._told: list[Told] = []
        self._bytes = 0

    def extend(self, told: Sequence[Told], end: Mark) -> None:
        self._told += told
        self._bytes += sum(each.size for each in told)
        self.end = end
        over = 0
        while len(self._told) - over > WINDOW_EVENTS or self._bytes > WINDOW_BYTES:
            self._bytes -= self._told[over].size
            over += 1
        if over:
            self.start = self._told[over - 1].mark.position
            del self._told[:over]

    def after(self, mark: Mark) -> tuple[Sequence[Told], Mark]:
        """The next events, and where their reader stands then."""
        first = bisect_right(self._told, mark.position, key=_position)
        told = self._told[first : first + PAGE_EVENTS]
        if len(told) == PAGE_EVENTS:
            return told, told[-1].mark
        # A watcher that caught up by itself may be ahead of the window.
        return told, max(self.end, mark, key=attrgetter("position"))


class _Watcher:
    __slots__ = (
        *("ahead", "beat_at", "expires_at", "heartbeat_seconds", "mark", "matches", "prepare"),
        "woken",
    )

    def __init__(
        self,
        mark: Mark,
        matches: Callable[[FleetEvent], bool],
        prepare: Prepare,
        heartbeat_seconds: float,
    ) -> None:
        now = time.monotonic()
        age = STREAM_AGE_SECONDS * random.uniform(1 - STREAM_AGE_JITTER, 1 + STREAM_AGE_JITTER)
        self.mark = mark
        self.matches = matches
        self.prepare = prepare
        self.ahead: asyncio.Task[_Behind] | None = None  # reads what it will need next
        self.heartbeat_seconds = heartbeat_seconds
        self.beat_at = now  # at once
        self.expires_at = now + age
        self.woken = asyncio.Event()

    def beat_is_due(self) -> bool:
        if time.monotonic() < self.beat_at:
            return False
        self.put_off_beat()
        return True

    def put_off_beat(self) -> None:
        self.beat_at = time.monotonic() + self.heartbeat_seconds

    def read_ahead(self, reading: Coroutine[None, None, _Behind]) -> None:
        self.ahead = asyncio.create_task(reading)

    async def stop_reading(self) -> None:
        if self.ahead is not None:
            self.ahead.cancel()
            await asyncio.gather(self.ahead, return_exceptions=True)

    async def wait(self, seconds_max: float) -> None:
        """Until there may be something for it to do."""
        seconds = min(min(self.beat_at, self.expires_at) - time.monotonic(), seconds_max)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self.woken.wait()
        self.woken.clear()


class Fleet:
    """Belongs to one event loop; only `notify` may be called from other threads."""

    def __init__(
        self, database: Database, threads: AsyncDatabase, sweep_interval: float, resume: timedelta
    ) -> None:
        """`resume`: how long a mark is good for."""
        self._database = database
        self._threads = threads
        self._look_seconds = min(sweep_interval, LOOK_SECONDS_MAX)
        self._resume = resume
        self._look_again = LOOK_AGAIN_SECONDS
        self._count = 0  # of watchers, whether they have begun or not
        self._watchers: set[_Watcher] = set()
        self._beginning: list[asyncio.Future[Page]] = []
        self._window: _Window | None = None
        self._held_since: float | None = None
        self._held_at = 0
        self._apart = False
        self._catching_up = asyncio.Semaphore(CATCHING_UP_MAX)
        self._pace = Pace(PACE_SHARE, PACE_SECONDS_MAX)
        self._work = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: asyncio.Task[None] | None = None
        self._draining = False
        self._log = telemetry.get_logger("fleet")
        metrics.FLEET_WATCHERS.set_function(lambda: self.watcher_count)
        metrics.FLEET_HELD.set_function(lambda: self.held_seconds)

    @property
    def watcher_count(self) -> int:
        return self._count

    @property
    def held_seconds(self) -> float:
        """Since when one and the same transaction has been hiding what has committed."""
        return 0.0 if self._held_since is None else time.monotonic() - self._held_since

    @property
    def latest(self) -> Mark | None:
        """How far the reader has come; None while nobody watches."""
        return self._window.end if self._window is not None else None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.create_task(self._read_forever(), name="fleet-reader")

    def drain(self) -> None:
        """Ends every watch with Draining, and any that is begun later."""
        self._draining = True
        if self._reader is not None:
            self._reader.cancel()
        self._fail_beginning(Draining())
        self._wake_all()

    async def stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def notify(self) -> None:
        """A hint that there are new events. From any thread."""
        awaited = self._count and not self._work.is_set()
        if awaited and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._work.set)

    async def watch(
        self,
        wanted: JobFilter,
        mark: Mark | None,
        heartbeat_seconds: float,
        prepare: Prepare = lambda told: None,
    ) -> AsyncGenerator[Told | Beat, None]:
        """A beat at once; then every event that `wanted` matches, once and in order, from `mark`
        on or else from now on, and a beat whenever nothing was told for so long. `prepare` is
        called for each event before, in a thread where there are many.

        Raises ResumeTokenExpired, DatabaseUnavailable, LimitReached, Draining, and StreamExpired
        after about half an hour.
        """
        if self._count >= WATCHERS_MAX:
            raise LimitReached(f"this server has {WATCHERS_MAX} fleet watchers; try another")
        matches = matcher(wanted)
        self._count += 1
        watcher: _Watcher | None = None
        try:
            watcher = _Watcher(await self._begin(mark), matches, prepare, heartbeat_seconds)
            self._watchers.add(watcher)
            sent = watcher.mark.time
            while True:
                self._check_open(watcher)
                if watcher.beat_is_due() or watcher.mark.time - sent > FRESH:
                    sent = watcher.mark.time
                    yield Beat(datetime.now(UTC), watcher.mark)
                told, end = await self._following(watcher)
                for each in told:
                    if matches(each.found):
                        self._check_open(watcher)
                        watcher.put_off_beat()
                        sent = each.mark.time
                        prepare(each)
                        yield each
                watcher.mark = end
                if not told:
                    await watcher.wait(LOOK_AGAIN_SECONDS if self._is_behind(end) else math.inf)
        finally:
            self._count -= 1
            if watcher is not None:
                self._watchers.discard(watcher)
                await watcher.stop_reading()

    async def _begin(self, mark: Mark | None) -> Mark:
        page = await self._look()
        if mark is None:
            return await self._now(page)
        # Not the bound: another server may know of foreign transactions that this one waits for.
        if mark.position[0] > page.following:
            raise _restored()
        self._check_kept(mark, page)
        return mark

    async def _now(self, page: Page) -> Mark:
        """After all that has committed before, though some of it may be hidden for a moment."""
        latest, patience = page.latest, time.monotonic() + BEGIN_SECONDS_MAX
        while page.bound <= latest and time.monotonic() < patience:
            page = await self._look()
        return Mark(page.incarnation, page.now, page.end)

    async def _look(self) -> Page:
        """A read that begins after this."""
        if self._draining:
            raise Draining
        looked: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self._beginning.append(looked)
        self._work.set()
        return await looked

    def _check_open(self, watcher: _Watcher) -> None:
        if time.monotonic() >= watcher.expires_at:
            raise StreamExpired
        if self._draining:
            raise Draining

    async def _following(self, watcher: _Watcher) -> tuple[Sequence[Told], Mark]:
        """What comes next, and where the watcher stands when it has had that."""
        window, mark = self._window, watcher.mark
        assert window is not None, "it is there as long as there are watchers"
        if mark.incarnation != window.end.incarnation:
            raise _restored()
        if not self._is_behind(mark):
            return window.after(mark)
        if watcher.ahead is None:
            watcher.read_ahead(self._read_behind(watcher, mark))
        assert watcher.ahead is not None
        behind, watcher.ahead = await watcher.ahead, None
        self._check_kept(mark, behind.page)
        if len(behind.told) == PAGE_EVENTS and behind.end.position < window.start:
            watcher.read_ahead(self._read_behind(watcher, behind.end))
        return behind.told, behind.end

    def _is_behind(self, mark: Mark) -> bool:
        return self._window is not None and mark.position < self._window.start

    def _check_kept(self, mark: Mark, page: Page) -> None:
        """Raises ResumeTokenExpired where what follows the mark may be gone."""
        if not page.at_home or mark.incarnation != page.incarnation:
            raise _restored()
        if page.now - mark.time > self._resume + LATE:
            hours = self._resume / timedelta(hours=1)
            raise ResumeTokenExpired(f"the resume point is more than {hours:g}h old")

    async def _read_behind(self, watcher: _Watcher, mark: Mark) -> _Behind:
        """The page that follows the mark, of which all that the watcher wants is prepared."""

        def read(connection: Connection) -> _Behind:
            page = fleet.page_after(connection, mark.position, PAGE_EVENTS, apart=self._apart)
            told, end = _tell(page, mark)
            for each in told:
                if watcher.matches(each.found):
                    watcher.prepare(each)
            return _Behind(page, told, end)

        async with self._catching_up:
            await self._pace.turn()
            return await self._threads.read(read)

    async def _read_forever(self) -> None:
        while True:
            if not self._count:
                self._window = self._held_since = None
                self._apart = False
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._work.wait()
            self._work.clear()
            if not self._count:
                continue
            try:
                while await self._read():
                    pass
            except Exception as error:  # noqa: BLE001 - logged; the loop must go on
                if not isinstance(error, DatabaseUnavailable):
                    self._log.exception("reading for fleet watchers failed")
                self._fail_beginning(DatabaseUnavailable())
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(GATHER_SECONDS)

    def _pause(self) -> float | None:
        if not self._count:
            return None
        return self._look_seconds if self._held_since is None else self._look_again

    async def _read(self) -> bool:
        """Another page for the window; answers whether there may be one more already."""
        beginning = len(self._beginning)
        page, told, end = await self._next()
        self._note_hidden(page)
        if self._window is None or end is None:
            self._window = _Window(page)
            self._wake_all()
        else:
            self._window.extend(told, end)
        for looked in self._beginning[:beginning]:
            if not looked.done():
                looked.set_result(page)
        del self._beginning[:beginning]
        if not told:
            return False
        self._wake_all()
        age = page.now - moment(told[-1].found.time)
        if len(told) == PAGE_EVENTS:
            if age > LIVE:
                await self._pace.turn()
            return True
        metrics.FLEET_LAG.observe(max(age.total_seconds(), 0.0))
        return False

    def _wake_all(self) -> None:
        for watcher in self._watchers:
            watcher.woken.set()

    async def _next(self) -> tuple[Page, Sequence[Told], Mark | None]:
        """What follows the window, and where it ends then; None for another one to begin."""
        last, watchers = self.latest, tuple(self._watchers)

        def read(connection: Connection) -> tuple[Page, Sequence[Told], Mark | None]:
            position = last.position if last is not None else None
            page = fleet.page_after(connection, position, PAGE_EVENTS, apart=self._apart)
            if last is None or last.incarnation != page.incarnation:
                return page, (), None
            told, end = _tell(page, last)
            if len(told) == PAGE_EVENTS:
                _prepare(told, watchers)
            return page, told, end

        found = await self._threads.read(read)
        if not found[0].at_home:
            await self._threads.run(schema.settle, self._database)
            found = await self._threads.read(read)
        return found

    def _note_hidden(self, page: Page) -> None:
        if not page.hidden:
            self._held_since = None
        elif self._held_since is None or page.bound > self._held_at:
            self._held_since, self._held_at = time.monotonic(), page.bound
            self._look_again = LOOK_AGAIN_SECONDS
        else:
            self._look_again = min(2 * self._look_again, self._look_seconds)
        waits = page.hidden and (self._apart or self.held_seconds >= ASK_SECONDS)
        self._apart = page.passed_over or waits

    def _fail_beginning(self, error: Exception) -> None:
        """Whoever has just come is told; the others wait for the database to come back."""
        for looked in self._beginning:
            if not looked.done():
                looked.set_exception(error)
        self._beginning.clear()


def matcher(wanted: JobFilter) -> Callable[[FleetEvent], bool]:
    """`states` and `error_types` are those of the event, all else is its job's."""
    checks: list[Callable[[FleetEvent], bool]] = []
    if wanted.states:
        checks.append(lambda found: found.state in wanted.states)
    if wanted.error_types:
        checks.append(lambda found: _error_type(found) in wanted.error_types)
    if wanted.job_types:
        checks.append(lambda found: found.job_type in wanted.job_types)
    if wanted.queue:
        checks.append(lambda found: found.queue == wanted.queue)
    if wanted.labels:
        checks.append(lambda found: wanted.labels.items() <= found.labels.items())
    if wanted.idempotency_key:
        checks.append(lambda found: found.idempotency_key == wanted.idempotency_key)
    checks += _in_time(attrgetter("created"), wanted.create_time_after, wanted.create_time_before)
    checks += _in_time(attrgetter("finished"), wanted.finish_time_after, wanted.finish_time_before)
    if not checks:
        return lambda found: True
    return lambda found: all(check(found) for check in checks)


def _error_type(found: FleetEvent) -> str | None:
    error = found.event.error
    return error.type if error is not None else None


def _in_time(
    of: Callable[[FleetEvent], int | None], after: datetime | None, before: datetime | None
) -> list[Callable[[FleetEvent], bool]]:
    checks: list[Callable[[FleetEvent], bool]] = []
    if after is not None:
        first = in_microseconds(after)
        checks.append(lambda found: (time := of(found)) is not None and time >= first)
    if before is not None:
        end = in_microseconds(before)
        checks.append(lambda found: (time := of(found)) is not None and time < end)
    return checks


def _prepare(told: Sequence[Told], watchers: Sequence[_Watcher]) -> None:
    """Does here what whoever tells it first would do on the event loop."""
    for each in told:
        wants = (watcher for watcher in watchers if watcher.matches(each.found))
        if (first := next(wants, None)) is not None:
            first.prepare(each)


def _tell(page: Page, before: Mark) -> tuple[Sequence[Told], Mark]:
    """The page's events for those who stand at `before`, and where they stand afterwards."""
    whole = len(page.events) < PAGE_EVENTS
    # What is hidden may have committed at any time since then.
    as_of = page.now if whole and not page.hidden else before.time
    latest = in_microseconds(as_of)
    told: list[Told] = []
    for found in page.events:
        # Behind a page that is full there is more, which has been there since then or later.
        if found.time > latest:
            latest, as_of = found.time, moment(found.time)
        told.append(Told(found, Mark(page.incarnation, as_of, found.position)))
    if not whole:
        return told, told[-1].mark
    return told, Mark(page.incarnation, as_of, max(page.end, before.position))


def _restored() -> ResumeTokenExpired:
    return ResumeTokenExpired("the database has been restored since the resume_token was made")
