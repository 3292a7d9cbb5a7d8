"""The systems that this service is compared with, each as a side.

The same job (it answers with its payload) and the same database; two worker processes where one
cannot use two cores; ended jobs are kept, and their results where the system keeps results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from scripts.benchmarks.nodes import Nodes
from scripts.benchmarks.orders import PAYLOAD, Order
from scripts.benchmarks.programs import python, run
from scripts.benchmarks.sides import WORKER_PROCESSES, JobSide

READY = "bench worker ready"
PGBOSS = Path(__file__).with_name("pgboss")


class Celery(JobSide):
    """A submit is answered when the broker has confirmed the message."""

    name = "Celery"
    client = "celery"
    backlog = 2_000
    confirm = True

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        self._settings = {
            "BENCH_DATABASE_URL": self.url,
            "BENCH_BROKER_URL": nodes.vhost(),
            "BENCH_CONFIRM": "1" if self.confirm else "0",
            "BENCH_PREFETCH": "32",
            "BENCH_TRACK_STARTED": "0",
        }

    @classmethod
    def missing(cls) -> str:
        return _missing_package("celery")

    @property
    def environment(self) -> Mapping[str, str]:
        return self._settings

    def start_worker(self, *, tracked: bool = False) -> None:
        settings = {**self._settings, "BENCH_TRACK_STARTED": "1" if tracked else "0"}
        command = python("celery", "-A", "scripts.benchmarks.peers.celery_app", "worker")
        command += ["--concurrency", str(WORKER_PROCESSES)]
        worker = self.spawn("worker", command, settings)
        worker.wait_for(READY)
        self.workers.append(worker)

    def ended_count(self) -> int:
        query = "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'"
        return int(self.ask(query)[0][0])

    def first_start(self, since: float) -> float:
        # When the first job ended, not started: a moment in Celery's favour.
        return min(self.ends(since).values())

    def ends(self, since: float) -> Mapping[str, float]:
        rows = self.ask(
            "SELECT task_id, extract(epoch FROM date_done) FROM celery_taskmeta"
            " WHERE status = 'SUCCESS' AND extract(epoch FROM date_done) >= %s",
            since,
        )
        return {job_id: float(at) for job_id, at in rows}


class UnconfirmedCelery(Celery):
    """A submit is answered when the message was given to the socket: Celery's default."""

    name = "unconfirmed"
    confirm = False


class BackloggedCelery(UnconfirmedCelery):
    """For the backlog that a worker drains: quicker to make, and the same to the worker."""

    name = "Celery"


class DatabaseSide(JobSide):
    """A system that needs PostgreSQL alone."""

    make_schema: ClassVar[Sequence[str]]  # a command that ends
    work: ClassVar[Sequence[str]]  # one that does not
    worker_processes = 1

    count_query: ClassVar[str]  # numbers of ended jobs, as `ended`
    starts_query: ClassVar[str]  # when jobs started, as `at`
    ends_query: ClassVar[str]  # the `id` of each ended job, and `at`

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        self._settings = {"BENCH_DATABASE_URL": self.url.replace("+psycopg2", "", 1)}
        run(self.make_schema, self._settings)

    @property
    def environment(self) -> Mapping[str, str]:
        return self._settings

    def start_worker(self, *, tracked: bool = False) -> None:
        started = [
            self.spawn("worker", self.work, self._settings) for _ in range(self.worker_processes)
        ]
        for worker in started:
            worker.wait_for(READY)
        self.workers += started

    def ended_count(self) -> int:
        query = f"SELECT coalesce(sum(ended), 0) FROM ({self.count_query}) AS counts"
        return int(self.ask(query)[0][0])

    def first_start(self, since: float) -> float:
        ((first,),) = self.ask(
            f"SELECT extract(epoch FROM min(at)) FROM ({self.starts_query}) AS starts"
            " WHERE at >= to_timestamp(%s)",
            since,
        )
        return float(first)

    def ends(self, since: float) -> Mapping[str, float]:
        rows = self.ask(
            f"SELECT id::text, extract(epoch FROM at) FROM ({self.ends_query}) AS ends"
            " WHERE at >= to_timestamp(%s)",
            since,
        )
        return {job_id: float(at) for job_id, at in rows}


class Procrastinate(DatabaseSide):
    """Keeps status and events, by triggers, and no results."""

    name = "Procrastinate"
    client = "procrastinate"
    backlog = 3_000
    make_schema = python("scripts.benchmarks.peers.procrastinate_app")
    work = python("scripts.benchmarks.peers.procrastinate_app", "worker")
    worker_processes = WORKER_PROCESSES  # each is one event loop

    count_query = "SELECT count(*) AS ended FROM procrastinate_jobs WHERE status = 'succeeded'"
    starts_query = "SELECT at FROM procrastinate_events WHERE type = 'started'"
    ends_query = "SELECT job_id AS id, at FROM procrastinate_events WHERE type = 'succeeded'"

    @classmethod
    def missing(cls) -> str:
        return _missing_package("procrastinate")


class Awa(DatabaseSide):
    """In Rust, but for the handlers, on one event loop. Keeps status, and no results."""

    name = "awa"
    client = "awa"
    backlog = 20_000
    make_schema = python("scripts.benchmarks.peers.awa_app")
    work = python("scripts.benchmarks.peers.awa_app", "worker")

    # A job's end is in one of the two, by how it was claimed.
    count_query = """
        SELECT completed_count AS ended FROM awa.receipt_completion_batches
        UNION ALL SELECT count(*) FROM awa.done_entries"""
    starts_query = """
        SELECT unnest(attempted_ats) AS at FROM awa.receipt_completion_batches
        UNION ALL SELECT attempted_at FROM awa.done_entries"""
    ends_query = """
        SELECT unnest(job_ids) AS id, finalized_at AS at FROM awa.receipt_completion_batches
        UNION ALL SELECT job_id, finalized_at FROM awa.done_entries"""

    @classmethod
    def missing(cls) -> str:
        return _missing_package("awa")


class PgBoss(DatabaseSide):
    """A worker fetches and completes many jobs at once, and asks for more twice a second."""

    name = "pg-boss"
    client = "pgboss"
    backlog = 20_000
    make_schema = ("node", str(PGBOSS / "schema.js"))
    work = ("node", str(PGBOSS / "worker.js"))

    count_query = "SELECT count(*) AS ended FROM pgboss.job WHERE state = 'completed'"
    starts_query = "SELECT started_on AS at FROM pgboss.job WHERE state = 'completed'"
    ends_query = "SELECT id, completed_on AS at FROM pgboss.job WHERE state = 'completed'"

    @classmethod
    def missing(cls) -> str:
        if not shutil.which("node"):
            return "Node.js, 20 or later"
        return "" if (PGBOSS / "node_modules").exists() else "the packages of package-lock.json"

    def client_command(self, order: Order) -> list[str]:
        return ["node", str(PGBOSS / "client.js"), json.dumps(asdict(order)), json.dumps(PAYLOAD)]


def _missing_package(name: str) -> str:
    return "" if find_spec(name) else f"the package {name}"
