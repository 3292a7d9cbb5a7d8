"""What is measured of a side, in jobs, milliseconds and KiB; each on a freshly started one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scripts.benchmarks.load import Order
from scripts.benchmarks.sides import (
    CLIENTS,
    SETTLE_SECONDS,
    BackloggedCelery,
    Celery,
    Cpu,
    Echo,
    Emptied,
    Filled,
    Jobsvc,
    Loaded,
    Nodes,
    Side,
    UnconfirmedCelery,
)

BULK = 500


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often."""

    seconds: float
    fill_seconds: float
    samples: int
    watchers: int
    fleet: int
    rows: int


FULL = Effort(6.0, 3.0, samples=200, watchers=1000, fleet=20_000, rows=10_000_000)
QUICK = Effort(1.5, 0.5, samples=40, watchers=300, fleet=5_000, rows=100_000)


@dataclass(slots=True)
class Measured:
    """`values` by row of the table; `cpu` by phase and part, in microseconds a job."""

    values: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, Cpu] = field(default_factory=dict)


def submit(side: Side, effort: Effort) -> Measured:
    """With no worker."""
    found = Measured()
    one = side.clients(Order("submit", "", in_flight=1, seconds=effort.seconds / 2), 1).run()
    found.values["submit_1"] = one.count / one.seconds
    clients = side.clients(Order("submit", "", in_flight=64, seconds=effort.seconds))
    side.wait_published()
    before = side.cpu()
    many = clients.run()
    found.values["submit_64"] = many.count / many.seconds
    side.wait_published()
    if not isinstance(side, Echo):
        found.values["publish_64"] = many.count / (time.time() - many.began)
    found.cpu["submit at 64"] = _cost(side, before, many)
    if not isinstance(side, Echo):
        order = Order("submit", "", in_flight=CLIENTS, bulk=BULK, seconds=effort.seconds / 2)
        bulk = side.clients(order).run()
        found.values["submit_bulk"] = bulk.count / bulk.seconds
    return found


def drain(side: Side, effort: Effort) -> Measured:
    """A backlog, by a worker that is started when the broker has all of it."""
    total = _fill(side, effort)
    side.wait_published()
    side.start_worker()
    before = side.cpu()
    side.wait_ended(total)
    first, last = side.span()
    return Measured(
        {"drain": total / (last - first)},
        {"drain": _cost(side, before, None, total)},
    )


def _fill(side: Side, effort: Effort) -> int:
    """Submits in bulk; answers how many jobs."""
    order = Order("submit", "", in_flight=CLIENTS, bulk=BULK, seconds=effort.fill_seconds)
    clients = side.clients(order)
    filled = clients.run()
    clients.close()
    return filled.warmed_up + filled.count


def flow(side: Side, effort: Effort) -> Measured:
    """Submits at 64 in flight while a worker works, until the last has ended."""
    side.start_worker()
    clients = side.clients(Order("submit", "", in_flight=64, seconds=effort.seconds))
    time.sleep(1)
    loaded = clients.run()
    side.wait_ended(loaded.warmed_up + loaded.count)
    # The jobs of the warm-up that were left when it began are part of the work.
    return Measured({"flow": loaded.count / (side.span()[1] - loaded.began)})


def latency(side: Side, effort: Effort) -> Measured:
    """One job after the other, as its watcher sees it."""
    side.start_worker(tracked=True)
    order = Order("latency", "", count=effort.samples)
    loaded = side.clients(order, 1).run()
    return Measured(
        {
            "start_p50": _percentile_ms(loaded.to_start, 50),
            "start_p99": _percentile_ms(loaded.to_start, 99),
            "done_p50": _percentile_ms(loaded.to_done, 50),
            "done_p99": _percentile_ms(loaded.to_done, 99),
        }
    )


def memory(side: Side, effort: Effort) -> Measured:
    """Idle processes, and what idle watchers add to a server's."""
    side.start_worker()
    time.sleep(SETTLE_SECONDS)
    found = Measured()
    for part, kib in side.memory().items():
        for kind, value in kib.items():
            found.values[f"{part}_{kind}"] = value / 1024
    if isinstance(side, Jobsvc):
        found.values["watcher"] = _watcher_kib(side, effort.watchers)
    return found


def _watcher_kib(side: Jobsvc, count: int) -> float:
    clients = side.clients(Order("watchers", "", count=count), 1)
    time.sleep(SETTLE_SECONDS)
    before = side.memory()["server"]["uss"]
    clients.run()
    time.sleep(SETTLE_SECONDS)
    return (side.memory()["server"]["uss"] - before) / count


def fan_out(side: Side, effort: Effort) -> Measured:
    """One job, watched by many."""
    if isinstance(side, Jobsvc):
        side.start_worker()
    clients = side.clients(Order("fanout", "", count=effort.watchers), 1)
    before = side.cpu()
    loaded = clients.run()
    return Measured(
        {"fan_out": loaded.count / loaded.seconds},
        {"fan-out, an event": _cost(side, before, loaded)},
    )


def fleet(side: Side, effort: Effort) -> Measured:
    """Many jobs, watched by one."""
    clients = side.clients(Order("fleet", "", count=effort.fleet), 1)
    side.wait_published()  # the submits are over, and so is what followed from them
    before = side.cpu()
    loaded = clients.run()
    return Measured(
        {"fleet": loaded.count / loaded.seconds},
        {"fleet, an event": _cost(side, before, loaded)},
    )


LISTS = {
    "newest": "",
    "failed": "states: JOB_STATE_FAILED",
    "type": "job_types: 'bench.type7'",
    "queue_failed": "queue: 'bench.queue0' states: JOB_STATE_FAILED",
    "label": "labels { key: 'bench' value: '42' }",
}


def scale(side: Side, effort: Effort) -> Measured:
    """Behind many finished jobs and in front of none: submit, run, list."""
    submitted = side.clients(Order("submit", "", in_flight=64, seconds=effort.seconds)).run()
    found = Measured({"scale_submit": submitted.count / submitted.seconds})
    filled = _fill(side, effort)
    side.wait_published()
    side.start_worker()
    side.wait_ended(submitted.warmed_up + submitted.count + filled)
    first, last = side.span()
    found.values["scale_drain"] = side.ended_count() / (last - first)
    for name, wanted in LISTS.items():
        order = Order("list", "", count=effort.samples, filter=wanted)
        listed = side.clients(order, 1).run()
        found.values[f"list_{name}"] = _percentile_ms(listed.to_done, 50)
    return found


Section = Callable[[Side, Effort], Measured]
SECTIONS: Mapping[str, tuple[Section, tuple[type[Side], ...]]] = {
    "submit": (submit, (Jobsvc, Celery, UnconfirmedCelery, Echo)),
    "drain": (drain, (Jobsvc, BackloggedCelery)),
    "flow": (flow, (Jobsvc, Celery)),
    "latency": (latency, (Jobsvc, Celery)),
    "memory": (memory, (Jobsvc, Celery)),
    "fan-out": (fan_out, (Jobsvc, Echo)),
    "fleet": (fleet, (Jobsvc, Echo)),
    "scale": (scale, (Filled, Emptied)),
}


def measure(name: str, side: type[Side], nodes: Nodes, effort: Effort) -> Measured:
    """Starts the side anew for it."""
    section, _ = SECTIONS[name]
    Filled.rows = effort.rows
    with side.open(nodes) as opened:
        return section(opened, effort)


def _cost(side: Side, before: Cpu, loaded: Loaded | None, count: int = 0) -> Cpu:
    used = {part: seconds - before[part] for part, seconds in side.cpu().items()}
    if loaded is not None:
        used["clients"] = loaded.cpu_seconds
        count = loaded.count
    return {part: seconds / count * 1e6 for part, seconds in used.items()}


def _percentile_ms(seconds: tuple[float, ...], percent: int) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000
