"""What is compared: each side on its own database and vhost, its processes started on demand."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import psycopg2

from jobsvc.store import schema
from jobsvc.store.database import Database
from scripts.benchmarks import history
from scripts.benchmarks.load import Done, Order
from scripts.benchmarks.programs import Program, children, cpu_seconds, memory_kib
from tests.harness import until
from tests.services import (
    VHOSTS,
    NodeError,
    PostgresNode,
    RabbitmqNode,
    fresh_database,
    machine_bin,
    vhost_url,
    wheel_bin,
)

WORKER_PROCESSES = 2
CLIENTS = 2
WAIT_SECONDS_MAX = 180.0
POLL_SECONDS = 0.5  # each look costs the database a scan
SETTLE_SECONDS = 3.0

Cpu = Mapping[str, float]


class Nodes:
    """One PostgreSQL with fsync and one RabbitMQ, shared by the sides of a round."""

    def __init__(self) -> None:
        self.postgres = PostgresNode(machine_bin() or wheel_bin(), fsync=True)
        self.rabbitmq = RabbitmqNode()
        self._vhosts = iter(VHOSTS)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.postgres)
            stack.enter_context(self.rabbitmq)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def vhost(self) -> str:
        """The address of one that nobody has used."""
        if name := next(self._vhosts, None):
            return vhost_url(self.rabbitmq.url, name)
        raise NodeError("all vhosts are used up")

    def cpu(self) -> Cpu:
        return {
            "PostgreSQL": sum(cpu_seconds(self.postgres.pid)),
            "RabbitMQ": sum(cpu_seconds(self.rabbitmq.pid)),
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """What several clients did together."""

    count: int
    seconds: float
    warmed_up: int
    began: float  # seconds since 1970
    cpu_seconds: float
    to_start: tuple[float, ...]
    to_done: tuple[float, ...]


class Side(ABC):
    """Closed by its context: every process is killed and the database dropped."""

    name: str
    order_side: str

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        self.nodes = nodes
        self._stack = stack
        self._directory = Path(stack.enter_context(TemporaryDirectory(prefix="jobsvc-bench-")))
        self.server: Program | None = None
        self.worker: Program | None = None
        self._started = 0

    @classmethod
    @contextmanager
    def open(cls, nodes: Nodes) -> Iterator[Self]:
        with ExitStack() as stack:
            yield cls(nodes, stack)

    @property
    def address(self) -> str:
        """Where a server of the side listens, if it has one."""
        return ""

    @property
    def environment(self) -> Mapping[str, str]:
        """What its clients need in theirs."""
        return {}

    def start_worker(self, *, tracked: bool = False) -> None:
        """Returns when it is ready. `tracked`: a start can be seen by whoever waits for a job."""
        raise NotImplementedError

    def ended_count(self) -> int:
        """How many jobs have ended."""
        raise NotImplementedError

    def is_published(self) -> bool:
        """Whether the broker has all that was submitted."""
        return True

    def span(self) -> tuple[float, float]:
        """Of all jobs in the database: the first start (or what is nearest to it) and the last
        end, in seconds since 1970."""
        raise NotImplementedError

    def wait_published(self) -> None:
        until(self.is_published, WAIT_SECONDS_MAX, "all is published")

    def wait_ended(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (ended := self.ended_count()) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"only {ended} of {count} jobs ended")
            time.sleep(POLL_SECONDS)

    def spawn(
        self, kind: str, arguments: list[str], environment: Mapping[str, str], piped: bool = False
    ) -> Program:
        self._started += 1
        log = self._directory / f"{kind}{self._started}.log"
        program = Program(log, arguments, environment, piped=piped)
        self._stack.callback(program.close)
        return program

    def clients(self, order: Order, count: int = CLIENTS) -> Clients:
        """So many of them, that share the order's calls in flight."""
        each = max(1, order.in_flight // count)
        order = replace(order, side=self.order_side, address=self.address, in_flight=each)
        arguments = ["-m", "scripts.benchmarks.load", json.dumps(asdict(order))]
        return Clients(
            [self.spawn("client", arguments, self.environment, piped=True) for _ in range(count)]
        )

    def cpu(self) -> Cpu:
        """Seconds used so far, by part."""
        used = dict(self.nodes.cpu())
        if self.server is not None:
            used["server"] = sum(cpu_seconds(self.server.pid))
        if self.worker is not None:
            used["worker"], used["children"] = cpu_seconds(self.worker.pid)
        return used

    def memory(self) -> dict[str, dict[str, float]]:
        """KiB of each part; of the children, the largest."""
        used = {}
        if self.server is not None:
            used["server"] = memory_kib(self.server.pid)
        if self.worker is not None:
            used["worker"] = memory_kib(self.worker.pid)
            each = [memory_kib(child.pid) for child in children(self.worker.pid)]
            used["child"] = max(each, key=lambda kib: kib["rss"])
        return used

    def _database(self) -> str:
        return self._stack.enter_context(fresh_database(self.nodes.postgres.url))

    def _connect(self, url: str) -> None:
        connection = psycopg2.connect(url.replace("+psycopg2", "", 1))
        self._stack.callback(connection.close)
        connection.autocommit = True
        self._cursor = connection.cursor()

    def _ask(self, query: str) -> Any:
        """The one row of the answer."""
        self._cursor.execute(query)
        return self._cursor.fetchone()


class Clients:
    """Load processes that are told to begin together."""

    def __init__(self, programs: list[Program]) -> None:
        self._programs = programs
        for program in programs:
            assert program.read_line() == "up\n"

    def run(self) -> Loaded:
        """They are idle afterwards, and connected still."""
        began = time.time()
        for program in self._programs:
            program.stdin.write("go\n")
            program.stdin.flush()
        all_done = [Done(**json.loads(program.read_line())) for program in self._programs]
        return Loaded(
            count=sum(done.count for done in all_done),
            seconds=max(d.ended for d in all_done) - min(d.began for d in all_done),
            warmed_up=sum(done.warmed_up for done in all_done),
            began=began,
            cpu_seconds=sum(done.cpu_seconds for done in all_done),
            to_start=tuple(seconds for done in all_done for seconds in done.to_start),
            to_done=tuple(seconds for done in all_done for seconds in done.to_done),
        )

    def close(self) -> None:
        for program in self._programs:
            program.close()


class Jobsvc(Side):
    name = "jobsvc"
    order_side = "jobsvc"
    _ours = "queue = 'default'"  # what history there is lies in other queues

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        url = self._database()
        database = Database(url, pool_size=1)
        schema.migrate(database)
        database.close()
        self._connect(url)
        self._settings = {
            "JOBSVC_DATABASE_URL": url,
            "JOBSVC_BROKER_URL": nodes.vhost(),
            "JOBSVC_LISTEN": "127.0.0.1:0",
            "JOBSVC_METRICS_LISTEN": "",
            "JOBSVC_LOG_FORMAT": "json",
            "JOBSVC_CONCURRENCY": str(WORKER_PROCESSES),
            "JOBSVC_HANDLERS": "worker.handlers,scripts.benchmarks.handlers",
        }
        self.fill(url)
        self.server = self._run("server")
        self._address = self.server.wait_for(r'"ready".*"address": ?"([^"]+)"')[1]

    def fill(self, url: str) -> None:
        """What its database is to hold before anything runs on it."""

    @property
    def address(self) -> str:
        return self._address

    def start_worker(self, *, tracked: bool = False) -> None:  # a start always can be seen
        self.worker = self._run("worker")
        self.worker.wait_for('"ready"')

    def ended_count(self) -> int:
        query = f"SELECT count(*) FROM jobs WHERE state = 'SUCCEEDED' AND {self._ours}"
        return int(self._ask(query)[0])

    def is_published(self) -> bool:
        return bool(self._ask("SELECT count(*) = 0 FROM outbox")[0])

    def span(self) -> tuple[float, float]:
        first, last = self._ask(
            "SELECT extract(epoch FROM min(start_time)), extract(epoch FROM max(finish_time))"
            f" FROM jobs WHERE {self._ours}"
        )
        return float(first), float(last)

    def _run(self, kind: str) -> Program:
        arguments = ["-c", "from jobsvc.cli import main; main()", kind]
        return self.spawn(kind, arguments, self._settings)


class Emptied(Jobsvc):
    """The service on an empty database, to compare the full one with."""

    name = "empty"


class Filled(Jobsvc):
    """The service behind `rows` finished jobs."""

    rows = 0

    def fill(self, url: str) -> None:
        history.fill(url, self.rows, lambda text: print(text, file=sys.stderr, flush=True))


class Celery(Side):
    """A submit is answered when the broker has confirmed the message."""

    name = "Celery"
    order_side = "celery"
    confirm = True

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        url = self._database()
        self._connect(url)
        self._settings = {
            "BENCH_DATABASE_URL": url,
            "BENCH_BROKER_URL": nodes.vhost(),
            "BENCH_CONFIRM": "1" if self.confirm else "0",
            "BENCH_PREFETCH": "32",
            "BENCH_TRACK_STARTED": "0",
        }

    @property
    def environment(self) -> Mapping[str, str]:
        return self._settings

    def start_worker(self, *, tracked: bool = False) -> None:
        settings = {**self._settings, "BENCH_TRACK_STARTED": "1" if tracked else "0"}
        arguments = ["-m", "celery", "-A", "scripts.benchmarks.celery_app", "worker"]
        arguments += ["--concurrency", str(WORKER_PROCESSES)]
        self.worker = self.spawn("worker", arguments, settings)
        self.worker.wait_for("bench worker ready")

    def ended_count(self) -> int:
        query = "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'"
        return int(self._ask(query)[0])

    def span(self) -> tuple[float, float]:
        # When the first job ended, not started: a moment in Celery's favour.
        first, last = self._ask(
            "SELECT extract(epoch FROM min(date_done)), extract(epoch FROM max(date_done))"
            " FROM celery_taskmeta WHERE status = 'SUCCESS'"
        )
        return float(first), float(last)


class UnconfirmedCelery(Celery):
    """A submit is answered when the message was given to the socket: Celery's default."""

    name = "unconfirmed"
    confirm = False


class BackloggedCelery(UnconfirmedCelery):
    """For the backlog that a worker drains: quicker to make, and the same to the worker."""

    name = "Celery"


class Echo(Side):
    name = "echo"
    order_side = "echo"

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        self.server = self.spawn("server", ["-m", "scripts.benchmarks.echo"], {})
        self._address = self.server.wait_for(r"listening on (\S+)")[1]

    @property
    def address(self) -> str:
        return self._address
