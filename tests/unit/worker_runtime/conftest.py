"""The rooms of a worker between a real store and a pool and a consumer that tests play."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import pytest

from jobsvc.broker.topology import Broker
from jobsvc.core import backoff
from jobsvc.core.attempts import AttemptKey, Claimed, Ending, Interrupted, Report
from jobsvc.core.model import Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store.database import Database, Transaction
from tests.store.house import EVERY_TYPE, LEASE_SECONDS, House
from tests.unit.conftest import POOL_SIZE, hasten
from worker.pool import Listener
from worker.pool import Pool as RealPool
from worker.runtime.attempts import Attempts
from worker.runtime.claiming import Claiming
from worker.runtime.consumer import Consumer as RealConsumer
from worker.runtime.consumer import Delivery
from worker.runtime.inbox import Inbox
from worker.runtime.keeping import AttemptKeeper
from worker.runtime.prefetch import Prefetch
from worker.runtime.recording import Recording

T = TypeVar("T")
SECONDS_MAX = 10.0
CONCURRENCY = 2


class Shaky(Database):
    """`away`: does not answer. `check` may refuse what is about to be written."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=POOL_SIZE)
        hasten(self)
        self.away = False
        self.tries = 0
        self.writes = 0

    def write(self, body: Callable[[Transaction], T], *, numbered: bool = False) -> T:
        self.tries += 1
        if self.away:
            raise DatabaseUnavailable
        answer = super().write(body, numbered=numbered)
        self.writes += 1
        return answer


class Seen:
    """Lists that grow, and that tests wait on."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def note(self, what: list[Any], entry: Any) -> None:
        with self.changed:
            what.append(entry)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, SECONDS_MAX), "it never came"


class Pool(Seen):
    """Holds the tasks until a test ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Claimed] = []
        self.cancelled: list[AttemptKey] = []
        self.abandoned: list[AttemptKey] = []
        self.unstarted: list[Claimed] = []
        self.average_run_seconds = 1.0
        self.slots = CONCURRENCY
        self.broken = ""
        self.job_types = EVERY_TYPE
        self.listener: Listener

    def submit(self, tasks: Iterable[Claimed]) -> None:
        for task in tasks:
            self.note(self.tasks, task)

    def cancel(self, key: AttemptKey) -> None:
        self.note(self.cancelled, key)

    def abandon(self, key: AttemptKey) -> None:
        self.note(self.abandoned, key)
        task = next(task for task in self.tasks if task.key == key)
        self.listener.on_endings([(task, Interrupted())])

    def withdraw(self, older_than_seconds: float) -> list[Claimed]:
        taken, self.unstarted = self.unstarted, []
        return taken

    def of(self, job_id: str) -> Claimed:
        """The task of a job, once it is there."""
        self.wait(lambda: any(task.job_id == job_id for task in self.tasks))
        return [task for task in self.tasks if task.job_id == job_id][-1]

    def tell(self, job_id: str, *reports: Report) -> None:
        task = self.of(job_id)
        self.listener.on_reports([(task, report) for report in reports])

    def end(self, job_id: str, ending: Ending) -> None:
        self.listener.on_endings([(self.of(job_id), ending)])


class Consumer(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.acknowledged: list[Delivery] = []
        self.given_back: list[Delivery] = []
        self.prefetches: list[int] = []
        self.suspensions: list[bool] = []

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.note(self.acknowledged, delivery)

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.note(self.given_back, delivery)

    def set_prefetch(self, prefetch: int) -> None:
        self.note(self.prefetches, prefetch)

    def suspend(self) -> None:
        self.note(self.suspensions, True)

    def resume(self) -> None:
        self.note(self.suspensions, False)

    def wait_acknowledged(self, *deliveries: Delivery) -> None:
        self.wait(lambda: all(delivery in self.acknowledged for delivery in deliveries))


class Teller(Outbox):
    """Remembers, and publishes nothing."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, Broker("memory://"))
        self.told: list[Effects] = []

    def tell(self, effects: Effects, *, watched: bool = True) -> None:
        self.told.append(effects)


class Runtime:
    """`alone`: in a process with its broker, as `jobsvc dev` is."""

    def __init__(self, database: Shaky, *, alone: bool = False) -> None:
        self.database = database
        self.house = House(database)
        self.pool = Pool()
        self.consumer = Consumer()
        self.outbox = Teller(database)
        self.beat = threading.Event()
        self._tags = itertools.count(1)
        claimable = threading.Event()
        pool, consumer = cast(RealPool, self.pool), cast(RealConsumer, self.consumer)
        self.attempts = Attempts(claimable, self.beat)
        self.inbox = Inbox(claimable, self.attempts, redelivered=not alone)
        self.recording = Recording(
            database,
            self.outbox,
            self.attempts,
            consumer,
            worker_id="w1",
            concurrency=CONCURRENCY,
        )
        self.pool.listener = self.recording
        prefetch = None
        if not alone:
            prefetch = Prefetch(consumer, pool, self.attempts, concurrency=CONCURRENCY)
        self.claiming = Claiming(
            database,
            self.outbox,
            self.inbox,
            self.attempts,
            consumer,
            pool,
            self.recording,
            prefetch,
            claimable,
            worker_id="w1",
            lease_seconds=LEASE_SECONDS,
        )
        self.keeper = AttemptKeeper(
            self.attempts, self.inbox, pool, consumer, prefetch, worker_id="w1"
        )
        self.started = False

    def start(self) -> None:
        self.started = True
        self.recording.start()
        self.claiming.start()

    def deliver(self, job_id: str, *, priority: int = 0, age: float = 0.0) -> Delivery:
        delivery = Delivery(
            job_id, priority, "default", next(self._tags), 1, time.monotonic() - age
        )
        if not self.inbox.on_deliveries([delivery]):
            self.consumer.give_back([delivery])
        return delivery

    def run(self, **fields: Any) -> tuple[str, Delivery]:
        """A new job that runs here."""
        job_id = self.house.submit(**fields)
        delivery = self.deliver(job_id)
        self.pool.of(job_id)
        return job_id, delivery

    def stop(self) -> None:
        self.claiming.stop()
        for held in list(self.attempts._held.values()):
            if not held.ended:
                self.pool.end(held.job_id, Interrupted())
        self.recording.stop()


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Shaky]:
    made = Shaky(sqlite_url)
    yield made
    made.close()


@pytest.fixture
def idle(database: Shaky, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Not started yet: what is delivered waits."""
    monkeypatch.setattr(backoff, "SECONDS_MIN", 0.01)
    monkeypatch.setattr(backoff, "SECONDS_MAX", 0.02)
    made = Runtime(database)
    yield made
    database.away = False
    if made.started:
        made.stop()


@pytest.fixture
def runtime(idle: Runtime) -> Runtime:
    idle.start()
    return idle
