"""What is measured, in jobs, milliseconds and KiB; each section on freshly started sides."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from scripts.benchmarks.nodes import Cpu, Nodes
from scripts.benchmarks.orders import Order
from scripts.benchmarks.peers.sides import (
    Awa,
    BackloggedCelery,
    Celery,
    PgBoss,
    Procrastinate,
    UnconfirmedCelery,
)
from scripts.benchmarks.results import Notes, Results
from scripts.benchmarks.sides import CLIENTS, Echo, JobSide, Jobsvc, Loaded, Side

IN_FLIGHT = 64
BULK = 500
BULK_IN_FLIGHT = 4
SETTLE_SECONDS = 3.0
FLEET_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How long, how many and how often."""

    seconds: float
    backlog: float  # as a part of what each side's worker drains in some seconds
    samples: int
    latency_seconds: float  # less samples, rather than longer
    watchers: int
    fleet: int
    listed: int
    sizes: tuple[int, ...]
    turns: int
    held_seconds: float  # how long a transaction is held open, and
    other_seconds: float  # how long there is load before and after it
    load_rate: float  # jobs a second


FULL = Effort(
    seconds=4.0,
    backlog=1.0,
    samples=200,
    latency_seconds=8.0,
    watchers=1000,
    fleet=20_000,
    listed=20_000,
    sizes=(100_000, 10_000_000),
    turns=3,
    held_seconds=600.0,
    other_seconds=60.0,
    load_rate=200.0,
)
QUICK = Effort(
    seconds=1.0,
    backlog=0.1,
    samples=40,
    latency_seconds=3.0,
    watchers=300,
    fleet=5_000,
    listed=2_000,
    sizes=(10_000, 100_000),
    turns=1,
    held_seconds=20.0,
    other_seconds=5.0,
    load_rate=50.0,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A round: what it runs on, and where its results go."""

    nodes: Nodes
    effort: Effort
    turn: int
    results: Results
    chosen: Callable[[type[Side]], bool]

    @contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Says what is tried. A failure is noted: what was measured before is worth showing."""
        what = f"round {self.turn + 1}: {what}"
        print(what, file=sys.stderr, flush=True)
        try:
            yield
        except (AssertionError, RuntimeError) as error:
            self.results.failures.append(f"{what}: {error}")


class Section(Protocol):
    def run(self, name: str, stage: Stage) -> None: ...


S = TypeVar("S", bound=Side)


@dataclass(frozen=True, slots=True)
class Race(Generic[S]):
    """The same of each side, who take turns to go first: nobody always has the younger nodes."""

    measure: Callable[[S, Effort, Notes], None]
    sides: tuple[type[S], ...]

    def run(self, name: str, stage: Stage) -> None:
        sides = [side for side in self.sides if stage.chosen(side) and not side.missing()]
        for side in rotated(sides, stage.turn):
            with stage.tried(f"{name}, {side.name}"), side.open(stage.nodes) as opened:
                self.measure(opened, stage.effort, stage.results.notes(side.name, stage.turn))


@dataclass(frozen=True, slots=True)
class Story:
    """Of this service alone. `once`: in the first round only, as it repeats what it measures."""

    tell: Callable[[Stage], None]
    once: bool = False

    def run(self, name: str, stage: Stage) -> None:
        if stage.chosen(Jobsvc) and not (self.once and stage.turn):
            with stage.tried(name):
                self.tell(stage)


T = TypeVar("T")


def rotated(items: Sequence[T], turn: int) -> Sequence[T]:
    first = turn % len(items) if items else 0
    return [*items[first:], *items[:first]]


def cost(side: Side, before: Cpu, count: int, loaded: Loaded | None = None) -> Cpu:
    """Microseconds a job since `before`; empty where no job was done."""
    if count == 0:
        return {}
    used = {part: seconds - before[part] for part, seconds in side.cpu().items()}
    if loaded is not None:
        used["clients"] = loaded.cpu_seconds
    return {part: seconds / count * 1e6 for part, seconds in used.items()}


def load(side: Side, order: Order, clients: int = CLIENTS) -> tuple[Loaded, Cpu]:
    """What clients did, and what each of their jobs cost until all that it began was over."""
    loading = side.clients(order, clients)
    side.settle()
    before = side.cpu()
    loaded = loading.run()
    side.settle()
    cpu = cost(side, before, loaded.count, loaded)
    loading.close()
    return loaded, cpu


def submit(side: Side, effort: Effort, notes: Notes) -> None:
    """With no worker."""
    one, cpu = load(side, Order("submit", seconds=effort.seconds / 2), 1)
    notes.value("submit_1", one.count / one.seconds, cpu)
    notes.value("call_ms", one.seconds / one.count * 1000, cpu)
    many, cpu = load(side, Order("submit", in_flight=IN_FLIGHT, seconds=effort.seconds))
    until_settled = time.time() - many.began
    notes.value("submit_64", many.count / many.seconds, cpu)
    if "server" in cpu:
        notes.value("server_cpu", cpu["server"])
    if isinstance(side, Jobsvc):
        notes.value("publish_64", many.count / until_settled, cpu)
    if isinstance(side, JobSide):
        order = Order("submit", in_flight=BULK_IN_FLIGHT, bulk=BULK, seconds=effort.seconds / 2)
        bulk, cpu = load(side, order)
        notes.value("submit_bulk", bulk.count / bulk.seconds, cpu)


def drain(side: JobSide, effort: Effort, notes: Notes) -> None:
    """A backlog, by a worker that is started when all of it is there."""
    count = int(side.backlog * effort.backlog)
    load(side, Order("fill", in_flight=BULK_IN_FLIGHT, bulk=BULK, count=count))
    drain_waiting(side, count, notes, "drain")
    cpu = notes.figure("drain").cpu[notes.turn]
    notes.value("worker_cpu", cpu["worker"] + cpu["children"])


def drain_waiting(side: JobSide, count: int, notes: Notes, key: str) -> None:
    """The jobs that are there, so many; their worker stays."""
    before = side.ended_count()
    since = time.time()
    side.start_worker()
    started = side.cpu()
    side.wait_ended(before + count)
    cpu = cost(side, started, count)
    ends = side.ends(since)
    first = side.first_start(since)
    notes.value(key, len(ends) / (max(ends.values()) - first), cpu)
    notes.curve(key, [end - first for end in ends.values()])


def flow(side: JobSide, effort: Effort, notes: Notes) -> None:
    """Submits at 64 in flight while a worker works, until the last has ended; then at a fixed
    rate, a quarter and a half of what that was."""
    side.start_worker()
    clients = side.clients(Order("submit", in_flight=IN_FLIGHT, seconds=effort.seconds))
    # The jobs of the warm-up that are left when it begins are part of the work.
    before = side.cpu()
    loaded = clients.run()
    total = loaded.warmed_up + loaded.count
    side.wait_ended(total)
    clients.close()
    peak = loaded.count / (max(side.ends(loaded.began).values()) - loaded.began)
    notes.value("flow", peak, cost(side, before, loaded.count, loaded))
    for part, name in (4, "quarter"), (2, "half"):
        total = keep_rate(side, peak / part, effort.seconds, total, notes, name)


def keep_rate(
    side: JobSide, rate: float, seconds: float, before: int, notes: Notes, name: str
) -> int:
    """So many jobs a second beside a worker, when there were so many before; answers how many there
    are then. A job is done when its row says so."""
    clients = side.clients(Order("rate", rate=rate, seconds=seconds))
    used = side.cpu()
    loaded = clients.run()
    total = before + loaded.warmed_up + loaded.count
    side.wait_ended(total)
    cpu = cost(side, used, loaded.count, loaded)
    clients.close()
    ends = side.ends(loaded.began)
    times = [ends[job_id] - due for job_id, due in loaded.due.items()]
    notes.milliseconds(times, {50: f"{name}_p50", 99: f"{name}_p99"}, cpu)
    notes.curve(name, times)
    return total


def latency(side: JobSide, effort: Effort, notes: Notes) -> None:
    """One job after the other, as its watcher sees it."""
    side.start_worker(tracked=True)
    follow(side, effort, notes, "")


def follow(side: JobSide, effort: Effort, notes: Notes, prefix: str) -> None:
    order = Order("latency", count=effort.samples, seconds=effort.latency_seconds)
    loaded, cpu = load(side, order, 1)
    if loaded.to_start:
        notes.milliseconds(
            loaded.to_start, {50: f"{prefix}start_p50", 99: f"{prefix}start_p99"}, cpu
        )
    notes.milliseconds(loaded.to_done, {50: f"{prefix}done_p50", 99: f"{prefix}done_p99"}, cpu)
    notes.curve(f"{prefix}done", loaded.to_done)


def memory(side: JobSide, effort: Effort, notes: Notes) -> None:
    """Idle processes, and what idle watchers add to a server's."""
    side.start_worker()
    time.sleep(SETTLE_SECONDS)
    for part, kib in side.memory().items():
        for kind in ("rss", "uss"):
            notes.value(f"{part}_{kind}", kib[kind] / 1024)
    if isinstance(side, Jobsvc):
        notes.value("watcher", _watcher_kib(side, effort.watchers))


def _watcher_kib(side: Jobsvc, count: int) -> float:
    clients = side.clients(Order("watchers", count=count), 1)
    time.sleep(SETTLE_SECONDS)
    before = side.memory()["server"]["uss"]
    clients.run()
    time.sleep(SETTLE_SECONDS)
    return (side.memory()["server"]["uss"] - before) / count


def fan_out(side: Side, effort: Effort, notes: Notes) -> None:
    """One job, watched by many."""
    if isinstance(side, Jobsvc):
        side.start_worker()
    loaded, cpu = load(side, Order("fanout", count=effort.watchers), 1)
    notes.value("fan_out", loaded.count / loaded.seconds, cpu)


def fleet(side: Side, effort: Effort, notes: Notes) -> None:
    """Many jobs, watched by one."""
    watch_fleet(side, effort, notes, "fleet")


def watch_fleet(side: Side, effort: Effort, notes: Notes, key: str) -> None:
    """Leaves as many jobs as it watched."""
    loaded, cpu = load(side, Order("fleet", count=effort.fleet, seconds=FLEET_SECONDS_MAX), 1)
    notes.value(key, loaded.count / loaded.seconds, cpu)


LISTS = {
    "newest": "",
    "failed": "states: JOB_STATE_FAILED",
    "type": "job_types: 'bench.type7'",
    "queue_failed": "queue: 'bench.queue0' states: JOB_STATE_FAILED",
    "label": "labels { key: 'bench' value: '42' }",
}


def lists(stage: Stage) -> None:
    """Pages of a list of some thousand finished jobs."""
    with ExitStack() as stack:
        side = Jobsvc(stage.nodes, stack, stage.effort.listed)
        list_pages(side, stage.effort, stage.results.notes(side.name, stage.turn), "list")


def list_pages(side: Jobsvc, effort: Effort, notes: Notes, prefix: str) -> None:
    for name, wanted in LISTS.items():
        order = Order("list", count=effort.samples, filter=wanted)
        listed, cpu = load(side, order, 1)
        notes.milliseconds(listed.to_done, {50: f"{prefix}_{name}"}, cpu)


MAIN: dict[str, Section] = {
    "submit": Race(submit, (Jobsvc, Celery, UnconfirmedCelery, Procrastinate, Awa, PgBoss, Echo)),
    "drain": Race(drain, (Jobsvc, BackloggedCelery, Procrastinate, Awa, PgBoss)),
    "flow": Race(flow, (Jobsvc, Celery, Procrastinate, Awa, PgBoss)),
    "latency": Race(latency, (Jobsvc, Celery, Procrastinate, Awa, PgBoss)),
    "fleet": Race(fleet, (Jobsvc, Echo)),
    "fan-out": Race(fan_out, (Jobsvc, Echo)),
    "lists": Story(lists),
    "memory": Race(memory, (Jobsvc, Celery, Procrastinate, Awa, PgBoss)),
}
PEERS = (Celery, UnconfirmedCelery, Procrastinate, Awa, PgBoss)
