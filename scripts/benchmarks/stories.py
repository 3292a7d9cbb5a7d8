"""What becomes of this service as time goes on: behind a long history, and behind a transaction
that somebody else holds open. Both take long, and are measured once a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg2

from scripts.benchmarks.orders import Order
from scripts.benchmarks.results import Notes
from scripts.benchmarks.sections import (
    IN_FLIGHT,
    Effort,
    Stage,
    Story,
    drain_waiting,
    follow,
    keep_rate,
    list_pages,
    load,
    rotated,
    watch_fleet,
)
from scripts.benchmarks.sides import Jobsvc

SLICE_SECONDS = 30.0
MIB = 1 << 20
TABLES = ("jobs", "job_events", "outbox")


def growth(stage: Stage) -> None:
    """Behind none, some and many finished jobs, in databases side by side, which take turns."""
    with ExitStack() as stack:
        sides = {"empty": Jobsvc(stage.nodes, stack)}
        for size in stage.effort.sizes:
            sides[f"{size:,} rows"] = Jobsvc(stage.nodes, stack, size)
        for turn in range(stage.effort.turns):
            for who, side in rotated(list(sides.items()), turn):
                probe(side, stage.effort, stage.results.notes(who, turn), "growth")


def probe(side: Jobsvc, effort: Effort, notes: Notes, prefix: str) -> None:
    """Submit, watch all, claim and run, watch one by one, list; leaves nothing to do."""
    print(f"{prefix}: {notes.who}", file=sys.stderr, flush=True)
    order = Order("submit", in_flight=IN_FLIGHT, seconds=effort.seconds)
    loaded, cpu = load(side, order)
    notes.value(f"{prefix}_submit", loaded.count / loaded.seconds, cpu)
    watch_fleet(side, effort, notes, f"{prefix}_fleet")
    waiting = loaded.warmed_up + loaded.count + effort.fleet
    drain_waiting(side, waiting, notes, f"{prefix}_drain")
    follow(side, effort, notes, f"{prefix}_")
    side.stop_workers()
    list_pages(side, effort, notes, f"{prefix}_list")


def pressure(stage: Stage) -> None:
    """Before, while and after a transaction that has written is held open, under load all along."""
    effort = stage.effort
    with ExitStack() as stack:
        side = Jobsvc(stage.nodes, stack)
        phase(side, effort, effort.other_seconds, stage.results.notes("before", stage.turn))
        with _held_transaction(side.url):
            phase(side, effort, effort.held_seconds, stage.results.notes("during", stage.turn))
        phase(side, effort, effort.other_seconds, stage.results.notes("after", stage.turn))


def phase(side: Jobsvc, effort: Effort, seconds: float, notes: Notes) -> None:
    """Load for so long, whose last slice is noted; then a probe, and what there is then."""
    side.start_worker()
    total = side.ended_count()
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        slice_seconds = min(SLICE_SECONDS, max(left, 1.0))
        total = keep_rate(side, effort.load_rate, slice_seconds, total, notes, "load")
    side.stop_workers()
    probe(side, effort, notes, "pressure")
    for table in TABLES:
        ((heap, indexes, dead),) = side.ask(
            "SELECT pg_relation_size(c.oid), pg_indexes_size(c.oid), n_dead_tup"
            " FROM pg_class AS c JOIN pg_stat_user_tables AS s ON s.relid = c.oid"
            " WHERE c.relname = %s",
            table,
        )
        notes.value(f"{table}_mib", heap / MIB)
        notes.value(f"{table}_indexes_mib", indexes / MIB)
        notes.value(f"{table}_dead", dead)
    notes.value("finished", side.ended_count())


@contextmanager
def _held_transaction(url: str) -> Iterator[None]:
    """One that has written, and so has a number that nobody may forget what came after."""
    connection = psycopg2.connect(url.replace("+psycopg2", "", 1))
    try:
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE held (number int)")
            connection.commit()
            cursor.execute("INSERT INTO held VALUES (1)")
        yield
        connection.commit()
    finally:
        connection.close()


STORIES = {"growth": Story(growth, once=True), "pressure": Story(pressure, once=True)}
