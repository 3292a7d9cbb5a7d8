"""An `Attempts` between a real store and a pool and a consumer that tests play themselves."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from jobsvc.broker.topology import Broker
from jobsvc.core.model import Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store.database import Database, Transaction
from tests.store.house import EVERY_TYPE, LEASE_SECONDS, House
from tests.unit.conftest import POOL_SIZE, hasten
from worker import attempt
from worker.attempt import Attempts
from worker.consumer import Delivery
from worker.outcome import Interrupted, Outcome, Task

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
        self.tasks: list[Task] = []
        self.cancelled: list[str] = []
        self.abandoned: list[str] = []
        self.unstarted: list[Task] = []
        self.average_run_seconds = 1.0
        self.slots = CONCURRENCY
        self.attempts: Attempts

    def submit(self, task: Task) -> None:
        self.note(self.tasks, task)

    def cancel(self, token: str) -> None:
        self.note(self.cancelled, token)

    def abandon(self, token: str) -> None:
        self.note(self.abandoned, token)
        self.attempts.on_outcome(self.task(token), Interrupted())

    def withdraw(self, older_than_seconds: float) -> list[Task]:
        taken, self.unstarted = self.unstarted, []
        return taken

    def task(self, token: str) -> Task:
        return next(task for task in self.tasks if task.token == token)

    def of(self, job_id: str) -> Task:
        """The task of a job, once it is there."""
        self.wait(lambda: any(task.job_id == job_id for task in self.tasks))
        return [task for task in self.tasks if task.job_id == job_id][-1]

    def end(self, job_id: str, outcome: Outcome) -> None:
        self.attempts.on_outcome(self.of(job_id), outcome)


class Consumer(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.acknowledged: list[Delivery] = []
        self.given_back: list[Delivery] = []
        self.prefetches: list[int] = []
        self.suspensions: list[bool] = []

    def acknowledge(self, delivery: Delivery) -> None:
        self.note(self.acknowledged, delivery)

    def give_back(self, delivery: Delivery) -> None:
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
    def __init__(self, database: Shaky, republish: bool = True) -> None:
        self.database = database
        self.house = House(database)
        self.pool = Pool()
        self.consumer = Consumer()
        self.outbox = Teller(database)
        self.beats = 0
        self._tags = itertools.count(1)
        self.attempts = Attempts(
            database,
            self.outbox,
            "w1",
            concurrency=CONCURRENCY,
            lease_seconds=LEASE_SECONDS,
            republish=republish,
        )
        self.pool.attempts = self.attempts

    def start(self) -> None:
        self.attempts.start(
            self.pool,  # type: ignore[arg-type]
            EVERY_TYPE,
            self.consumer,  # type: ignore[arg-type]
            self._beat,
        )

    def _beat(self) -> None:
        self.beats += 1

    def deliver(self, job_id: str, *, priority: int = 0, age: float = 0.0) -> Delivery:
        delivery = Delivery(
            job_id, priority, "default", next(self._tags), 1, time.monotonic() - age
        )
        self.attempts.on_delivery(delivery)
        return delivery

    def run(self, **fields: Any) -> tuple[str, Delivery]:
        """A new job that runs here."""
        job_id = self.house.submit(**fields)
        delivery = self.deliver(job_id)
        self.pool.of(job_id)
        return job_id, delivery

    def stop(self) -> None:
        self.attempts.stop_claiming()
        for held in list(self.attempts._running.values()):
            if not held.ended:
                self.pool.end(held.job_id, Interrupted())
        self.attempts.stop_recording()


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Shaky]:
    made = Shaky(sqlite_url)
    yield made
    made.close()


@pytest.fixture
def idle(database: Shaky, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Not started yet: what is delivered waits."""
    monkeypatch.setattr(attempt, "DATABASE_BACKOFF_SECONDS", (0.01, 0.02))
    made = Runtime(database)
    yield made
    database.away = False
    if made.attempts._threads[0].ident is not None:
        made.stop()


@pytest.fixture
def runtime(idle: Runtime) -> Runtime:
    idle.start()
    return idle
