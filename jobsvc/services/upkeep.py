"""What keeps jobs moving when nobody calls: promote, expire, reap, release, purge.

Each is `x_once(database, limit) -> (count, effects)`, safe to run in every server side by side;
`Loop` is the one timer for all of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from jobsvc import metrics, telemetry, vital
from jobsvc.core.model import Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store import dispatching, registry, verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.rules import releasing

Once = Callable[[Database, int], tuple[int, Effects]]

LIMIT = 500
PURGE_INTERVAL_SECONDS = 60.0
MEASURE_INTERVAL_SECONDS = 10.0


def promote_once(database: Database, limit: int) -> tuple[int, Effects]:
    return database.write(lambda tx: verbs.promote(tx, limit))


def expire_once(database: Database, limit: int) -> tuple[int, Effects]:
    return database.write(lambda tx: verbs.expire(tx, limit))


def reap_once(database: Database, limit: int) -> tuple[int, Effects]:
    count, effects = database.write(lambda tx: verbs.reap(tx, limit))
    metrics.LEASES_EXPIRED.inc(count)
    return count, effects


class Release:
    """Offers room to held jobs. Each server has one of its own, which remembers where it was."""

    def __init__(self) -> None:
        self._after = ""
        self._opens = math.inf

    def once(self, database: Database, limit: int) -> tuple[int, Effects]:
        released = database.write(lambda tx: releasing.release_held(tx, limit, self._after))
        self._after, self._opens = released.after, released.opens
        return released.count, released.effects

    def opens(self) -> float:
        """In how many seconds there is room by a rate, as of the last time."""
        return self._opens


def purge_once(database: Database, limit: int, resume: timedelta) -> tuple[int, Effects]:
    def purge(tx: Transaction) -> int:
        registry.forget_dead(tx)
        return verbs.purge(tx, limit, resume)

    return database.write(purge), Effects()


def measure_once(database: Database, _limit: int) -> tuple[int, Effects]:
    """What only the database knows of the backlog, for `/metrics`."""
    backlog = database.read(dispatching.backlog)
    for queue, age in backlog.oldest.items():
        metrics.OLDEST_QUEUED.labels(queue).set(age)
    for queue, count in backlog.workers.items():
        metrics.WORKERS.labels(queue).set(count)
    metrics.OUTBOX_AGE.set(backlog.owed)
    return 0, Effects()


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    interval: float
    once: Once
    # In how many seconds it is due, where that is sooner than the interval.
    sooner: Callable[[], float] = lambda: math.inf


def tasks(promote_interval: float, reap_interval: float, resume: timedelta) -> list[Task]:
    """`resume`: how long a resume token of a fleet watcher is good."""
    release = Release()
    return [
        Task("promote", promote_interval, promote_once),
        Task("expire", promote_interval, expire_once),
        Task("release", promote_interval, release.once, release.opens),
        Task("reap", reap_interval, reap_once),
        Task("purge", PURGE_INTERVAL_SECONDS, partial(purge_once, resume=resume)),
        Task("measure", MEASURE_INTERVAL_SECONDS, measure_once),
    ]


class Loop:
    """Runs a task every interval in a thread of its own, and again at once while batches come
    full. The database being away is waited out."""

    def __init__(self, task: Task, database: Database, outbox: Outbox) -> None:
        self._task = task
        self._database = database
        self._outbox = outbox
        self._stopping = threading.Event()
        self._log = telemetry.get_logger("upkeep")
        self._thread = vital.thread(task.name, self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(min(self._task.interval, self._task.sooner())):
            try:
                while self._once() >= LIMIT and not self._stopping.is_set():
                    pass
            except DatabaseUnavailable:
                continue  # the database's own log has told
            except Exception:  # noqa: BLE001 - logged; the loop must go on
                self._log.exception("upkeep failed", task=self._task.name)

    def _once(self) -> int:
        count, effects = self._task.once(self._database, LIMIT)
        self._outbox.tell(effects)
        if count:
            self._log.info("jobs moved", task=self._task.name, count=count)
        for dead in effects.failed:
            self._log.error("job failed", **dead.told())
        return count
