"""What is compared: each side on its own database and vhost, its processes started on demand."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import psycopg2

from jobsvc.store import migrating
from jobsvc.store.database import Database
from scripts.benchmarks import history
from scripts.benchmarks.nodes import Cpu, Nodes
from scripts.benchmarks.orders import Done, Order
from scripts.benchmarks.programs import Program, children, cpu_seconds, memory_kib, python
from tests.harness import until
from tests.services import fresh_database

WORKER_PROCESSES = 2
CLIENTS = 2
WAIT_SECONDS_MAX = 180.0
POLL_SECONDS = 0.5  # each look costs the database a scan


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
    due: Mapping[str, float]


class Side(ABC):
    """Closed by its context: every process is killed and the database dropped."""

    name: ClassVar[str]
    client: ClassVar[str]  # the module of `clients` that makes its calls

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        self.nodes = nodes
        self._stack = stack
        self._directory = Path(stack.enter_context(TemporaryDirectory(prefix="jobsvc-bench-")))
        self.server: Program | None = None
        self._started = 0

    @classmethod
    @contextmanager
    def open(cls, nodes: Nodes) -> Iterator[Self]:
        with ExitStack() as stack:
            yield cls(nodes, stack)

    @classmethod
    def missing(cls) -> str:
        """What this machine lacks to run it; empty: nothing."""
        return ""

    @property
    def address(self) -> str:
        """Where a server of the side listens, if it has one."""
        return ""

    @property
    def environment(self) -> Mapping[str, str]:
        """What its clients need in theirs."""
        return {}

    def client_command(self, order: Order) -> list[str]:
        return python("scripts.benchmarks.clients", json.dumps(asdict(order)))

    def spawn(
        self, kind: str, command: Sequence[str], environment: Mapping[str, str], piped: bool = False
    ) -> Program:
        self._started += 1
        log = self._directory / f"{kind}{self._started}.log"
        program = Program(log, command, environment, piped=piped)
        self._stack.callback(program.close)
        return program

    def clients(self, order: Order, count: int = CLIENTS) -> Clients:
        """So many of them, that share what is in flight, the rate and the jobs of the order."""
        order = replace(
            order,
            side=self.client,
            address=self.address,
            in_flight=max(1, order.in_flight // count),
            rate=order.rate / count,
            count=order.count // count,
        )
        command = self.client_command(order)
        return Clients(
            [self.spawn("client", command, self.environment, piped=True) for _ in range(count)]
        )

    def is_settled(self) -> bool:
        """Whether nothing is left to do of what calls began, but for the jobs themselves."""
        return True

    def settle(self) -> None:
        until(self.is_settled, WAIT_SECONDS_MAX, "all that calls began is over")

    def cpu(self) -> Cpu:
        """Seconds used so far, by part."""
        used = dict(self.nodes.cpu())
        if self.server is not None:
            used["server"] = sum(cpu_seconds(self.server.pid))
        return used


class JobSide(Side):
    """A side that runs jobs, and keeps them in a database."""

    backlog: ClassVar[int]  # how many jobs its worker drains in some seconds

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        self.workers: list[Program] = []
        self.url = stack.enter_context(fresh_database(nodes.postgres.url))
        connection = psycopg2.connect(self.url.replace("+psycopg2", "", 1))
        stack.callback(connection.close)
        connection.autocommit = True
        self._cursor = connection.cursor()

    @abstractmethod
    def start_worker(self, *, tracked: bool = False) -> None:
        """Returns when it is ready. `tracked`: a start can be seen by whoever waits for a job."""

    @abstractmethod
    def ended_count(self) -> int:
        """How many jobs have ended."""

    @abstractmethod
    def first_start(self, since: float) -> float:
        """When the first job started since then, or what is nearest to it; in seconds since
        1970."""

    @abstractmethod
    def ends(self, since: float) -> Mapping[str, float]:
        """When each job ended that has since then, by its id; in seconds since 1970."""

    def wait_ended(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (ended := self.ended_count()) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"only {ended} of {count} jobs ended")
            time.sleep(POLL_SECONDS)

    def stop_workers(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers.clear()

    def cpu(self) -> Cpu:
        used = dict(super().cpu())
        if self.workers:
            each = [cpu_seconds(worker.pid) for worker in self.workers]
            used["worker"] = sum(own for own, _ in each)
            used["children"] = sum(below for _, below in each)
        return used

    def memory(self) -> dict[str, dict[str, float]]:
        """KiB of each part: of a server with all its processes, of the largest worker, and of the
        largest child of one."""
        used = {}
        if self.server is not None:
            pids = [self.server.pid, *(child.pid for child in children(self.server.pid))]
            each = [memory_kib(pid) for pid in pids]
            used["server"] = {kind: sum(kib[kind] for kib in each) for kind in each[0]}
        below = [child.pid for worker in self.workers for child in children(worker.pid)]
        for part, pids in ("worker", [w.pid for w in self.workers]), ("child", below):
            if each := [memory_kib(pid) for pid in pids]:
                used[part] = max(each, key=lambda kib: kib["rss"])
        return used

    def ask(self, query: str, *values: Any) -> Sequence[Any]:
        """The rows of the answer."""
        self._cursor.execute(query, values)
        return list(self._cursor.fetchall())


class Clients:
    """Load processes that are told to begin together."""

    def __init__(self, programs: list[Program]) -> None:
        self._programs = programs
        for program in programs:
            assert program.read_line() == "up\n"

    def run(self) -> Loaded:
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
            due={job_id: at for done in all_done for job_id, at in done.due.items()},
        )

    def close(self) -> None:
        for program in self._programs:
            program.close()


class Jobsvc(JobSide):
    """This service."""

    name = "jobsvc"
    client = "service"
    backlog = 20_000
    _ours = "queue = 'default'"  # the history lies in other queues

    def __init__(self, nodes: Nodes, stack: ExitStack, past: int = 0) -> None:
        """On a database that holds so many finished jobs."""
        super().__init__(nodes, stack)
        database = Database(self.url, pool_size=1)
        migrating.migrate(database)
        database.close()
        if past:
            history.fill(self.url, past)
        self._settings = {
            "JOBSVC_DATABASE_URL": self.url,
            "JOBSVC_BROKER_URL": nodes.vhost(),
            "JOBSVC_LISTEN": "127.0.0.1:0",
            "JOBSVC_METRICS_LISTEN": "",
            "JOBSVC_LOG_FORMAT": "json",
            "JOBSVC_CONCURRENCY": str(WORKER_PROCESSES),
            "JOBSVC_HANDLERS": "worker.handlers,scripts.benchmarks.handlers",
        }
        self.server = self._run("server", {"JOBSVC_PROCESSES": str(nodes.server_processes)})
        self._address = self.server.wait_for(r'"ready".*"address": ?"([^"]+)"')[1]

    @property
    def address(self) -> str:
        return self._address

    def start_worker(self, *, tracked: bool = False) -> None:  # a start always can be seen
        worker = self._run("worker", {})
        worker.wait_for('"ready"')
        self.workers.append(worker)

    def ended_count(self) -> int:
        query = f"SELECT count(*) FROM jobs WHERE state = 'SUCCEEDED' AND {self._ours}"
        return int(self.ask(query)[0][0])

    def is_settled(self) -> bool:
        """All is on the broker."""
        return bool(self.ask("SELECT count(*) = 0 FROM outbox")[0][0])

    def first_start(self, since: float) -> float:
        ((first,),) = self.ask(
            "SELECT extract(epoch FROM min(start_time)) FROM jobs"
            f" WHERE start_time >= to_timestamp(%s) AND {self._ours}",
            since,
        )
        return float(first)

    def ends(self, since: float) -> Mapping[str, float]:
        rows = self.ask(
            "SELECT id::text, extract(epoch FROM finish_time) FROM jobs"
            f" WHERE finish_time >= to_timestamp(%s) AND {self._ours}",
            since,
        )
        return {job_id: float(at) for job_id, at in rows}

    def _run(self, kind: str, settings: Mapping[str, str]) -> Program:
        command = [sys.executable, "-c", "from jobsvc.cli import main; main()", kind]
        return self.spawn(kind, command, {**self._settings, **settings})


class Echo(Side):
    """As little of grpc.aio as answers a call, or feeds a stream."""

    name = "echo"
    client = "echo"

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        super().__init__(nodes, stack)
        self.server = self.spawn("server", python("scripts.benchmarks.echo_server"), {})
        self._address = self.server.wait_for(r"listening on (\S+)")[1]

    @property
    def address(self) -> str:
        return self._address
