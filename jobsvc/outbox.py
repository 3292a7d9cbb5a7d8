"""The way from a committed change to the broker and to the watchers.

Whoever commits a change hands its `Effects` to `Outbox.tell` and goes on. One thread publishes what
has gathered, waits for the broker's confirmation and deletes the outbox rows. Nothing depends on
it: a row that was not published is found by the relay, a hint that was not sent by the sweep.

In a server the same thread is also the relay (rows that nobody published) and sends again what a
broker must have lost, because both publish and so need the one connection. Neither holds up what
was handed over since: of each it does one batch at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from jobsvc import metrics, telemetry, vital
from jobsvc.broker.publisher import Publisher
from jobsvc.broker.topology import Broker, BrokerUnavailable
from jobsvc.core.backoff import Backoff
from jobsvc.core.model import Change, Dispatch, Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.redispatch import Redispatch
from jobsvc.store import dispatching, hot, queues
from jobsvc.store.database import Database

BATCH = 200
# What is handed over beyond this is left to the relay, so that a broker that is away costs no
# memory.
BACKLOG_MAX = 10_000
# A confirmation, and the deleting of outbox rows, does for all that was sent within this. Much less
# than the relay leaves such a row alone.
SETTLE_SECONDS = 0.05
# Between one sending of jobs and the next.
GATHER_SECONDS = 0.005
KEEP_ALIVE_SECONDS = 1.0

OnChanges = Callable[[Iterable[Change]], None]


class Outbox:
    """Owns its thread. `on_changes` is called on whichever thread calls `tell`."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        *,
        on_changes: OnChanges | None = None,
        hints: bool = True,
        relay_interval: float | None = None,
        redispatch_interval: float = 15.0,
    ) -> None:
        """`relay_interval` in seconds makes it relay and redispatch too (a server's outbox).
        `hints`: tell other processes of changes."""
        self._database = database
        self._on_changes = on_changes
        self._hints = hints and not broker.memory
        self._relay_interval = relay_interval
        self._redispatch_interval = redispatch_interval
        self._publisher = Publisher(
            broker,
            self._generations,
            self._leave_behind,
            self._on_new_broker if relay_interval is not None else None,
        )
        self._redispatch = Redispatch(database, self._publisher)
        self._dispatches: deque[Dispatch] = deque()
        self._unsettled: list[int] = []  # outbox rows whose messages were sent
        self._settle_due = 0.0
        self._changes: dict[str, int] = {}
        self._controls: deque[Mapping[str, object]] = deque()
        self._work = threading.Condition()
        self._stopping = False
        self._send_due = 0.0
        self._keep_alive_due = self._relay_due = self._redispatch_due = 0.0
        self._backoff = Backoff()
        self._log = telemetry.get_logger("outbox")
        self._thread = vital.thread("outbox", self._run)
        metrics.BROKER_UP.set_function(lambda: self.broker_reachable)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Publishes what is waiting, if the broker answers, and ends the thread."""
        with self._work:
            self._stopping = True
            self._work.notify()
        self._thread.join()

    @property
    def broker(self) -> Broker:
        return self._publisher.broker

    @property
    def broker_reachable(self) -> bool:
        return self._publisher.connected

    def tell(self, effects: Effects, *, watched: bool = True) -> None:
        """Takes over what a committed transaction left to be told. Never blocks, never raises.

        `watched` False: no other process is told, as nobody can be watching these jobs (they are
        new) but for who watches all of them, and looks by itself.
        """
        metrics.count_steps(effects.steps)
        if self._on_changes is not None and effects.changes:
            self._on_changes(effects.changes)
        hints = self._hints and watched and effects.changes
        if not hints and not effects.dispatches:
            return
        with self._work:
            room = BACKLOG_MAX - len(self._dispatches)
            self._dispatches.extend(effects.dispatches[:room])
            if hints and len(self._changes) < BACKLOG_MAX:
                self._changes.update((c.job_id, c.last_sequence) for c in effects.changes)
            self._work.notify()

    def control(self, body: Mapping[str, object]) -> None:
        """Tells all workers something that they would find out later anyway."""
        with self._work:
            if len(self._controls) < BACKLOG_MAX:
                self._controls.append(body)
            self._work.notify()

    def _run(self) -> None:
        backoff = self._backoff
        while not self._stopping or (not backoff.failures and self._has_work()):
            try:
                self._wait()
                self._step()
                if backoff.failures and self._publisher.connected:
                    self._log.info("broker reached")
                    backoff.reset()
            except (BrokerUnavailable, DatabaseUnavailable) as error:
                self._unsettled.clear()  # the relay's
                self._pause(error)
            except Exception:  # noqa: BLE001 - logged; the loop must go on
                self._log.exception("outbox step failed")
                self._unsettled.clear()
                self._publisher.close()
                self._pause(None)
        self._publisher.close()

    def _pause(self, error: Exception | None) -> None:
        if error is not None and not self._backoff.failures:
            self._log.warning("broker or database out of reach", reason=str(error))
        deadline = time.monotonic() + self._backoff.next()
        with self._work:
            while not self._stopping and (left := deadline - time.monotonic()) > 0:
                self._work.wait(left)

    def _wait(self) -> None:
        """Until there is something to publish, or the next tick."""
        ticks = [self._keep_alive_due]
        if self._unsettled:
            ticks.append(self._settle_due)
        if self._relay_interval is not None:
            ticks += [self._relay_due, self._redispatch_due]
        with self._work:
            while not (self._has_work() or self._redispatch.pending or self._stopping):
                left = min(ticks) - time.monotonic()
                if left <= 0 or not self._work.wait(left):
                    break
        urgent = self._changes or self._controls or self._redispatch.pending or self._stopping
        if not urgent and (left := self._send_due - time.monotonic()) > 0:
            time.sleep(left)  # jobs that come one by one, but quickly, share what sending any costs

    def _has_work(self) -> bool:
        unsettled = self._stopping and self._unsettled
        return bool(self._dispatches or self._changes or self._controls or unsettled)

    def _step(self) -> None:
        dispatches, changes, controls = self._take()
        if changes:  # first: somebody is looking, and nothing is waited for
            self._publisher.hint(changes)
        for body in controls:
            self._publisher.control(body)
        self._send(dispatches)
        if self._unsettled:
            self._settle_if_due()
        if time.monotonic() >= self._keep_alive_due:
            self._publisher.keep_alive()
            self._keep_alive_due = time.monotonic() + KEEP_ALIVE_SECONDS
        self._publisher.connect()
        if self._relay_interval is not None:
            self._tick(self._relay_interval)

    def _take(self) -> tuple[list[Dispatch], list[Change], list[Mapping[str, object]]]:
        with self._work:
            count = min(len(self._dispatches), BATCH)
            dispatches = [self._dispatches.popleft() for _ in range(count)]
            changes = [Change(job_id, last) for job_id, last in self._changes.items()]
            controls = list(self._controls)
            self._changes.clear()
            self._controls.clear()
        return dispatches, changes, controls

    def _send(self, dispatches: Sequence[Dispatch]) -> None:
        if not dispatches:
            return
        self._publisher.send(dispatches)
        self._send_due = time.monotonic() + GATHER_SECONDS
        if not self._unsettled:
            self._settle_due = time.monotonic() + SETTLE_SECONDS
        self._unsettled += [dispatch.outbox_id for dispatch in dispatches]

    def _settle_if_due(self) -> None:
        """What was sent is owed no more once the broker has it. That is asked for together for all
        that is sent within a moment: each time costs a statement and several waits."""
        full = len(self._unsettled) >= BATCH
        if full or self._stopping or time.monotonic() >= self._settle_due:
            self._settle()

    def _settle(self) -> None:
        refused = self._publisher.settle()
        sent, self._unsettled = self._unsettled, []
        _forget(self._database, sent, refused)

    def _tick(self, relay_interval: float) -> None:
        now = time.monotonic()
        if now >= self._relay_due:
            more = relay_once(self._database, self._publisher, BATCH) == BATCH
            self._relay_due = now if more else now + relay_interval
        if now >= self._redispatch_due:
            if self._hints:
                self._publisher.announce()
            self._redispatch.look()
            self._redispatch_due = now + self._redispatch_interval
        if self._redispatch.pending and not self._stopping:
            self._send(self._redispatch.next_batch(BATCH))

    def _on_new_broker(self) -> None:
        self._redispatch.on_new_broker()

    def _generations(self, names: Iterable[str]) -> Mapping[str, int]:
        wanted = list(names)
        if wanted:
            self._database.write(lambda tx: queues.add_queues(tx, wanted))
        return self._database.read(queues.generations)

    def _leave_behind(self, name: str, broken: int) -> None:
        self._database.write(lambda tx: queues.next_generation(tx, name, broken))


def relay_once(database: Database, publisher: Publisher, limit: int) -> int:
    """Publishes up to `limit` outbox rows that their writer did not. Answers how many."""
    owed = database.write(lambda tx: dispatching.take_owed(tx, limit))
    if owed:
        refused = publisher.publish(owed)
        _forget(database, [d.outbox_id for d in owed], refused)
    return len(owed)


def _forget(database: Database, sent: Sequence[int], refused: Collection[int]) -> None:
    """What the broker refused is owed still; the relay sends it again when it is due."""
    if settled := [each for each in sent if each not in refused]:
        hot.forget_published(database, settled)
