"""Over Kombu's memory transport; what only a real broker can do is in tests/broker."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import kombu
import pytest

from jobsvc import outbox as module
from jobsvc.broker.publisher import Publisher
from jobsvc.broker.topology import Broker, BrokerUnavailable
from jobsvc.core import backoff
from jobsvc.core.model import Change, Dispatch, Effects
from jobsvc.outbox import Outbox, relay_once
from jobsvc.store import hot, queues, recovery
from jobsvc.store.database import Database
from jobsvc.store.tables import outbox as outbox_table
from tests.harness.wait import until
from tests.store.house import House, new_id, worker

SECONDS_MAX = 10.0
LONG_AGO = timedelta(minutes=-5)
NEVER = 3600.0


def wait_for_out_of_reach(monkeypatch: pytest.MonkeyPatch, low: float, high: float) -> None:
    monkeypatch.setattr(backoff, "SECONDS_MIN", low)
    monkeypatch.setattr(backoff, "SECONDS_MAX", high)


class Line:
    """What lies between us and the broker, and all that passed along it."""

    def __init__(self) -> None:
        self.cut = False
        self.attempts = 0
        self.published: list[str] = []
        self.hints: list[Change] = []
        self.controls: list[object] = []
        self.depths: dict[str, int | None] = {}
        self.on_publish: Callable[[], None] = lambda: None
        self.changed = threading.Condition()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, SECONDS_MAX)


@dataclass(frozen=True)
class LineBroker(Broker):
    """The memory transport, past a line that can be cut."""

    line: Line = field(default_factory=Line)

    def connection(self) -> kombu.Connection:
        if self.line.cut:
            self._count()
            raise BrokerUnavailable("the line is cut")
        return super().connection()

    def _count(self) -> None:
        with self.line.changed:
            self.line.attempts += 1
            self.line.changed.notify_all()


@pytest.fixture
def queue(house: House) -> str:
    """A queue of this test: those of the memory transport belong to the process."""
    name = f"q{new_id()}"
    house.write(lambda tx: queues.add_queues(tx, [name]))
    return name


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line()
    publish, hint, control, depth = (
        Publisher.send,
        Publisher.hint,
        Publisher.control,
        Publisher.depth,
    )

    def note(what: list[object], entries: Iterable[object]) -> None:
        with made.changed:
            what.extend(entries)
            made.changed.notify_all()

    def check(publisher: Publisher) -> None:
        if made.cut:
            publisher.close()
            publisher.connect()

    def watched_publish(self: Publisher, dispatches: Sequence[Dispatch]) -> None:
        check(self)
        publish(self, dispatches)
        made.on_publish()
        note(made.published, [d.job_id for d in dispatches])  # type: ignore[arg-type]

    def watched_hint(self: Publisher, changes: Sequence[Change]) -> None:
        check(self)
        hint(self, changes)
        note(made.hints, changes)  # type: ignore[arg-type]

    def watched_control(self: Publisher, body: dict[str, object]) -> None:
        check(self)
        control(self, body)
        note(made.controls, [body])

    def told_depth(self: Publisher, queue: str) -> int | None:
        real = depth(self, queue)
        return made.depths.get(queue, real)

    monkeypatch.setattr(Publisher, "send", watched_publish)
    monkeypatch.setattr(Publisher, "hint", watched_hint)
    monkeypatch.setattr(Publisher, "control", watched_control)
    monkeypatch.setattr(Publisher, "depth", told_depth)
    wait_for_out_of_reach(monkeypatch, 0.01, 0.05)
    return made


MakeOutbox = Callable[..., Outbox]


@pytest.fixture
def make(database: Database, line: Line) -> Iterator[MakeOutbox]:
    started: list[Outbox] = []

    def start(**options: object) -> Outbox:
        outbox = Outbox(database, LineBroker("memory://", line=line), **options)  # type: ignore[arg-type]
        outbox.start()
        started.append(outbox)
        return outbox

    yield start
    for outbox in started:
        outbox.stop()


def owed_again(house: House) -> None:
    """Makes every row of the outbox the relay's."""
    house.write(lambda tx: tx.execute(outbox_table.update().values(not_before=tx.now + LONG_AGO)))


def on_broker(queue: str, generation: int = 1) -> list[str]:
    """Takes the bodies of all messages of a queue."""
    broker = Broker("memory://")
    bodies = []
    with broker.connection() as connection:
        channel = connection.channel()
        bound = broker.queue(queue, generation)(channel)
        bound.declare()
        while message := bound.get(no_ack=True):
            bodies.append(
                message.body.decode() if isinstance(message.body, bytes) else message.body
            )
        channel.close()
    return bodies


def test_publishes_what_it_is_told_of_and_pays_the_debt(
    make: MakeOutbox, house: House, queue: str
) -> None:
    outbox = make()
    job_id = house.submit(queue=queue)
    assert house.owed() == ["job"]
    outbox.tell(house.effects, watched=False)
    until(lambda: not house.owed(), SECONDS_MAX, "its row is deleted")
    assert on_broker(queue) == [f'{{"v": 1, "job_id": "{job_id}"}}']


def test_tells_the_callback_of_changes_at_once(database: Database, house: House) -> None:
    told: list[Change] = []
    outbox = Outbox(database, Broker("memory://"), on_changes=told.extend)
    new = house.submit()
    outbox.tell(house.effects, watched=False)
    assert told == [Change(new, 1)]
    claimed = house.start()
    outbox.tell(house.effects)
    assert told == [Change(new, 1), Change(claimed.job_id, 2)]


def test_hints_are_for_other_processes(make: MakeOutbox, line: Line, house: House) -> None:
    """A memory broker has none."""
    outbox = make()
    house.start()
    outbox.tell(house.effects)
    outbox.control({"cancel": "x"})
    line.wait(lambda: len(line.controls) == 1)
    assert line.hints == []


def test_an_outbox_without_relay_leaves_rows_of_others_alone(
    make: MakeOutbox, house: House, queue: str
) -> None:
    house.submit(queue=queue)
    owed_again(house)
    outbox = make()
    job_id = house.submit(queue=queue)
    outbox.tell(house.effects)
    until(lambda: len(house.owed()) == 1, SECONDS_MAX, "its own row is deleted")
    assert [job_id in body for body in on_broker(queue)] == [True]


def test_the_relay_publishes_what_nobody_did(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    make(relay_interval=0.02)
    until(lambda: house.count(outbox_table) == 0, SECONDS_MAX, "it has begun")
    ids = [house.submit(queue=queue) for _ in range(3)]
    owed_again(house)
    until(lambda: not house.owed(), SECONDS_MAX, "the rows are deleted")
    assert sorted(line.published) == sorted(ids)


def test_the_relay_passes_over_rows_that_are_being_published(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    """Their writer has a moment to do it, and so has another relay."""
    make(relay_interval=0.01)
    fresh = house.submit(queue=queue)
    old = house.submit(queue=queue)
    house.write(
        lambda tx: tx.execute(
            outbox_table.update()
            .where(outbox_table.c.job_id == old)
            .values(not_before=tx.now + LONG_AGO)
        )
    )
    until(lambda: not house.owed(old), SECONDS_MAX, "the old row is deleted")
    assert line.published == [old]
    assert house.owed(fresh) == ["job"]


def test_the_relay_goes_on_at_once_while_batches_are_full(
    make: MakeOutbox, house: House, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    for _ in range(7):
        house.submit(queue=queue)
    owed_again(house)
    make(relay_interval=SECONDS_MAX)
    until(lambda: not house.owed(), SECONDS_MAX / 2, "all rows are deleted")


def test_relay_once_takes_a_batch(house: House, database: Database, queue: str) -> None:
    for _ in range(5):
        house.submit(queue=queue)
    owed_again(house)
    publisher = Publisher(Broker("memory://"), lambda _: {queue: 1})
    assert [relay_once(database, publisher, 2) for _ in range(4)] == [2, 2, 1, 0]
    publisher.close()
    assert house.owed() == []
    assert len(on_broker(queue)) == 5


def test_a_broker_that_is_away_costs_nothing_but_time(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    line.cut = True
    outbox = make(relay_interval=0.02)
    job_id = house.submit(queue=queue)
    outbox.tell(house.effects)
    line.wait(lambda: line.attempts >= 3)
    assert not outbox.broker_reachable
    assert house.owed() == ["job"]
    assert line.published == []
    owed_again(house)
    line.cut = False
    until(lambda: not house.owed(), SECONDS_MAX, "the row is deleted")
    assert job_id in line.published
    assert outbox.broker_reachable


def test_it_asks_a_broker_that_is_away_ever_more_seldom(
    make: MakeOutbox, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_out_of_reach(monkeypatch, 0.1, NEVER)
    waited: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        waited.append((low, high))
        return 0.001

    monkeypatch.setattr(random, "uniform", uniform)
    line.cut = True
    make(relay_interval=0.01)
    line.wait(lambda: line.attempts >= 5)
    assert [high for _, high in waited[:4]] == [0.2, 0.4, 0.8, 1.6]


def test_a_broker_that_is_lost_in_the_middle(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    outbox = make(relay_interval=0.02)
    until(lambda: outbox.broker_reachable, SECONDS_MAX, "it is connected")
    line.cut = True
    ids = [house.submit(queue=queue) for _ in range(3)]
    owed_again(house)
    line.wait(lambda: line.attempts >= 2)
    assert len(house.owed()) == 3
    line.cut = False
    owed_again(house)
    until(lambda: not house.owed(), SECONDS_MAX, "the rows are deleted")
    assert sorted(set(line.published)) == sorted(ids)


def test_a_stop_publishes_what_waits(house: House, database: Database, line: Line) -> None:
    queue = f"q{new_id()}"
    outbox = Outbox(database, LineBroker("memory://", line=line))
    ids = []
    for _ in range(3):
        ids.append(house.submit(queue=queue))
        outbox.tell(house.effects)
    outbox.control({"cancel": "x"})
    outbox.start()
    outbox.stop()
    assert line.published == ids
    assert line.controls == [{"cancel": "x"}]
    assert house.owed() == []


def test_a_stop_does_not_wait_for_a_broker_that_is_away(
    house: House, database: Database, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_out_of_reach(monkeypatch, NEVER, NEVER)
    line.cut = True
    outbox = Outbox(database, LineBroker("memory://", line=line))
    outbox.start()
    house.submit()
    outbox.tell(house.effects)
    line.wait(lambda: line.attempts >= 1)
    stopped = threading.Thread(target=outbox.stop, daemon=True)
    stopped.start()
    stopped.join(SECONDS_MAX)
    assert not stopped.is_alive()
    assert house.owed() == ["job"]


def test_it_keeps_no_more_than_its_backlog(
    database: Database, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is the relay's, whose rows stay."""
    monkeypatch.setattr(module, "BACKLOG_MAX", 5)
    outbox = Outbox(database, LineBroker("memory://", line=line))
    ids = []
    for _ in range(8):
        ids.append(house.submit(queue=queue))
        outbox.tell(house.effects)
        outbox.control({"cancel": "x"})
    outbox.start()
    outbox.stop()
    assert line.published == ids[:5]
    assert len(line.controls) == 5
    assert len(house.owed()) == 3


def test_hints_of_one_job_are_gathered(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last counts, and their number is bounded."""
    monkeypatch.setattr(module, "BACKLOG_MAX", 3)
    sent: list[Change] = []
    monkeypatch.setattr(Publisher, "hint", lambda _, changes: sent.extend(changes))
    outbox = Outbox(database, Broker("amqp://127.0.0.1:9//"))  # connects to nothing here
    for sequence in range(1, 101):
        outbox.tell(Effects((Change("a", sequence),)))
    for number in range(100):
        outbox.tell(Effects((Change(f"b{number}", 1),)))
    outbox.start()
    outbox.stop()
    assert sent == [Change("a", 100), Change("b0", 1), Change("b1", 1)]


def test_what_is_sent_within_a_moment_is_settled_together(
    make: MakeOutbox, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", NEVER)
    monkeypatch.setattr(module, "BATCH", 3)
    settled: list[Sequence[int]] = []
    forget = hot.forget_published

    def noted(by: Database, ids: Sequence[int]) -> None:
        settled.append(ids)
        forget(by, ids)

    monkeypatch.setattr(hot, "forget_published", noted)
    outbox = make()
    for count in range(1, 5):
        house.submit(queue=queue)
        outbox.tell(house.effects)
        line.wait(lambda c=count: len(line.published) == c)  # type: ignore[misc]
    until(lambda: len(house.owed()) == 1, SECONDS_MAX, "three rows are deleted")
    assert [len(ids) for ids in settled] == [3]
    outbox.stop()
    assert [len(ids) for ids in settled] == [3, 1]


def test_jobs_that_come_quickly_share_a_sending(
    make: MakeOutbox, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first goes at once."""
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.5)
    sendings: list[int] = []
    line.on_publish = lambda: sendings.append(len(line.published))
    outbox = make()
    ids = [house.submit(queue=queue)]
    outbox.tell(house.effects, watched=False)
    line.wait(lambda: line.published == ids)
    for _ in range(3):
        ids.append(house.submit(queue=queue))
        outbox.tell(house.effects, watched=False)
    line.wait(lambda: line.published == ids)
    assert sendings == [0, 1]  # by what was published before


def test_an_unexpected_fault_ends_nothing(
    make: MakeOutbox, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = Outbox._send, threading.Event()

    def fail_once(self: Outbox, dispatches: Sequence[Dispatch]) -> None:
        if not failed.is_set():
            failed.set()
            raise ZeroDivisionError
        real(self, dispatches)

    monkeypatch.setattr(Outbox, "_send", fail_once)
    outbox = make()
    house.submit(queue=queue)
    outbox.tell(house.effects)
    assert failed.wait(SECONDS_MAX)
    second = house.submit(queue=queue)
    outbox.tell(house.effects)
    line.wait(lambda: second in line.published)


def test_a_queue_that_nobody_named_before(make: MakeOutbox, house: House) -> None:
    outbox = make()
    for queue in (f"q{new_id()}", f"q{new_id()}"):
        house.submit(queue=queue)
        outbox.tell(house.effects)
        until(lambda: not house.owed(), SECONDS_MAX, "its row is deleted")
        assert queue in house.database.read(queues.generations)
        assert len(on_broker(queue)) == 1


def test_a_new_broker_gets_a_message_for_every_job_that_waits(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    waiting = [house.submit(queue=queue) for _ in range(3)]
    house.submit(queue=queue, delay=100.0)
    house.start(queue=queue)
    house.deliver()  # to the broker that was here before
    owed = house.submit(queue=queue)
    make(relay_interval=0.02)
    line.wait(lambda: len(line.published) >= 3)
    until(lambda: len(house.owed()) == 1, SECONDS_MAX, "the rows are deleted")
    assert sorted(line.published) == sorted(waiting)
    assert house.owed(owed) == ["job"]  # its writer is at it


def test_the_best_are_sent_again_first_and_the_others_not_before_them(
    make: MakeOutbox, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked for, or owed, before what was found is sent."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(recovery, "WINDOW_JOBS", 3)
    waiting = [(-p, house.submit(queue=queue, priority=p)) for p in (0, 5, 0, 9, 5, 0, 0, 5)]
    house.deliver()
    owed: list[int] = []
    line.on_publish = lambda: owed.append(len(house.owed()))
    make(relay_interval=NEVER)
    line.wait(lambda: len(line.published) == len(waiting))
    assert line.published == [job_id for _, job_id in sorted(waiting)]
    assert max(owed) <= 2
    until(lambda: not house.owed(), SECONDS_MAX, "the rows are deleted")


def test_what_is_new_does_not_wait_for_what_is_sent_again(
    make: MakeOutbox, house: House, queue: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    for _ in range(20):
        house.submit(queue=queue)
    house.deliver()
    new: list[str] = []

    def submit_one() -> None:
        if not new:
            new.append(house.submit(queue=queue))
            outbox.tell(house.effects)

    line.on_publish = submit_one
    outbox = make(relay_interval=NEVER)
    line.wait(lambda: len(line.published) == 21)
    assert line.published.index(new[0]) <= 4


def lost(house: House, queue: str, minutes: int = 5) -> str:
    """A job that was dispatched long ago and whose message is gone."""
    job_id = house.submit(queue=queue)
    house.deliver()
    house.change(job_id, dispatch_time=house.now() - timedelta(minutes=minutes))
    return job_id


class Sweeps:
    """An outbox whose redispatch is called by hand."""

    def __init__(self, database: Database, line: Line) -> None:
        self.outbox = Outbox(database, LineBroker("memory://", line=line), relay_interval=NEVER)

    def sweep(self) -> None:
        self.outbox._redispatch.look()
        self.go_through()

    def go_through(self) -> None:
        while self.outbox._redispatch.pending:
            self.outbox._redispatch.next_batch(100)


@pytest.fixture
def sweeps(database: Database, line: Line) -> Iterator[Sweeps]:
    made = Sweeps(database, line)
    made.outbox._publisher.connect()
    made.go_through()
    yield made
    made.outbox._publisher.close()


def test_redispatch_takes_two_shortages_in_a_row(
    sweeps: Sweeps, house: House, queue: str, line: Line
) -> None:
    job_id = lost(house, queue)
    line.depths[queue] = 0
    sweeps.sweep()
    assert house.owed() == []
    sweeps.sweep()
    assert house.owed(job_id) == ["job"]


def test_one_shortage_may_be_chance(sweeps: Sweeps, house: House, queue: str, line: Line) -> None:
    lost(house, queue)
    for depth in (0, 1, 0, 1, 0):
        line.depths[queue] = depth
        sweeps.sweep()
    assert house.owed() == []


def test_shortages_with_nothing_overdue_between_are_not_in_a_row(
    sweeps: Sweeps, house: House, queue: str, line: Line
) -> None:
    job_id = lost(house, queue)
    line.depths[queue] = 0
    sweeps.sweep()
    house.change(job_id, dispatch_time=house.now())
    sweeps.sweep()
    house.change(job_id, dispatch_time=house.now() + LONG_AGO)
    sweeps.sweep()
    assert house.owed() == []


def test_a_healthy_backlog_is_not_dispatched_again(
    sweeps: Sweeps, house: House, queue: str, line: Line
) -> None:
    for _ in range(3):
        lost(house, queue)
    line.depths[queue] = 3
    for _ in range(3):
        sweeps.sweep()
    assert house.owed() == []


def test_a_queue_that_is_not_there_holds_no_messages(
    sweeps: Sweeps, house: House, queue: str, line: Line
) -> None:
    lost(house, queue)
    line.depths[queue] = None
    for _ in range(2):
        sweeps.sweep()
    assert house.owed() == ["job"]


def test_what_live_workers_may_hold_is_not_missing(
    sweeps: Sweeps, house: House, queue: str, line: Line
) -> None:
    house.announce(worker(queues=(queue,), prefetch=2))
    line.depths[queue] = 0
    for _ in range(2):
        lost(house, queue)
    for _ in range(3):
        sweeps.sweep()
    assert house.owed() == []
    lost(house, queue)
    for _ in range(2):
        sweeps.sweep()
    assert house.owed() == ["job"] * 3


def test_it_follows_a_queue_to_its_next_generation(
    sweeps: Sweeps, house: House, queue: str
) -> None:
    """Else it would go on to fill one that nobody reads."""
    publisher = sweeps.outbox._publisher
    job_id = house.submit(queue=queue)
    publisher.publish(house.effects.dispatches)
    house.write(lambda tx: queues.next_generation(tx, queue, 1))
    sweeps.sweep()
    publisher.publish(house.effects.dispatches)
    assert [len(on_broker(queue, generation)) for generation in (1, 2)] == [1, 1]
    connection = publisher.connect()
    sweeps.sweep()
    assert publisher.connect() is connection
    assert house.owed(job_id) == ["job"]


def test_the_loop_redispatches_by_itself(
    make: MakeOutbox, house: House, queue: str, line: Line
) -> None:
    outbox = make(relay_interval=0.01, redispatch_interval=0.01)
    until(lambda: outbox.broker_reachable, SECONDS_MAX, "it is connected")
    job_id = lost(house, queue)
    line.depths[queue] = 0
    line.wait(lambda: job_id in line.published)
