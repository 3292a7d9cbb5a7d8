"""Messages that a broker must have lost are sent again: all of them where it is new or was wiped,
those of one queue where it has fewer than jobs wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jobsvc import telemetry
from jobsvc.broker.publisher import Publisher
from jobsvc.core.model import Dispatch
from jobsvc.store import dispatching
from jobsvc.store.database import Database
from jobsvc.store.recovery import Recovery, dispatched_before, overdue


@dataclass(frozen=True, slots=True)
class _Task:
    recovery: Recovery
    queue: str | None  # None: all


class Redispatch:
    """Used by the outbox's thread, which sends what `next_batch` answers and does all else that it
    has to between two."""

    def __init__(self, database: Database, publisher: Publisher) -> None:
        self._database = database
        self._publisher = publisher
        self._short_of: set[str] = set()  # queues, as of the last look
        self._tasks: list[_Task] = []
        self._log = telemetry.get_logger("outbox")

    @property
    def pending(self) -> bool:
        """Whether there is more to be sent."""
        return bool(self._tasks)

    def on_new_broker(self) -> None:
        """It is new or has lost everything: each job that waits gets a new message.

        The broker is marked as ours right after this, so that other servers leave it to us. What is
        not sent should we die meanwhile is missed by their next looks.
        """
        before = self._database.write(lambda tx: tx.now)
        self._tasks = [_Task(Recovery(dispatched_before(before)), None)]
        self._log.info("the broker holds nothing of ours; jobs are dispatched anew")

    def look(self) -> None:
        """A queue with long-waiting jobs is short of messages when fewer are ready or with workers
        than jobs wait to be claimed, or when none is ready at all: workers pass on within seconds
        what they cannot start. Seen twice in a row, its long-waiting jobs get new ones; once could
        be chance: a message is on its way between the two counts."""
        self._publisher.follow()
        before, self._short_of = self._short_of, set()
        if self._tasks:
            return
        for queue in self._database.read(dispatching.overdue_queues):
            if self._is_short(queue):
                self._short_of.add(queue)
                if queue in before:
                    now = self._database.write(lambda tx: tx.now)
                    self._tasks.append(_Task(Recovery(overdue(queue, now)), queue))

    def _is_short(self, queue: str) -> bool:
        ready = self._publisher.depth(queue) or 0
        # A worker on the memory transport holds all there is, for as long as it takes.
        if not ready and not self._publisher.broker.memory:
            return True
        return self._database.write(partial(dispatching.short, queue=queue, ready=ready))

    def next_batch(self, limit: int) -> Sequence[Dispatch]:
        """The best that are left, to be sent; or none, though more may be pending."""
        task = self._tasks[0]
        dispatches = task.recovery.step(self._database, limit)
        if task.recovery.done:
            self._tasks.pop(0)
            self._tell(task)
        return dispatches

    def _tell(self, task: _Task) -> None:
        if task.recovery.count:
            where = {} if task.queue is None else {"queue": task.queue}
            self._log.warning("messages were missing", jobs=task.recovery.count, **where)
