"""The whole service as processes: servers and workers on one database and one broker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa
from google.protobuf.struct_pb2 import Value

from jobsvc.client import Client
from jobsvc.core.states import EventType, JobState
from jobsvc.store import migrating
from jobsvc.store.database import Database
from jobsvc.store.tables import job_events, jobs, outbox
from tests.checker import Report, check
from tests.harness.broker import Rabbit
from tests.harness.process import Process
from tests.harness.wait import until

LEASE_SECONDS = 2.0
REAP_SECONDS = 0.3
# What a bound of the service is multiplied by: the machine may be busy with something else, and
# what a bound is to find out stands still for good, or for a time limit of minutes.
PATIENCE = 10.0

SETTINGS: Mapping[str, str] = {
    "JOBSVC_LISTEN": "127.0.0.1:0",
    "JOBSVC_METRICS_LISTEN": "",
    "JOBSVC_LOG_FORMAT": "json",
    "JOBSVC_HANDLERS": "worker.handlers,worker.handlers.demo",
    "JOBSVC_CONCURRENCY": "2",
    "JOBSVC_LEASE": f"{LEASE_SECONDS}s",
    "JOBSVC_HEARTBEAT": "500ms",
    "JOBSVC_REAP_INTERVAL": f"{REAP_SECONDS}s",
    "JOBSVC_RELAY_INTERVAL": "300ms",
    "JOBSVC_SWEEP_INTERVAL": "300ms",
    "JOBSVC_PROMOTE_INTERVAL": "100ms",
    "JOBSVC_REDISPATCH_INTERVAL": "500ms",
    "JOBSVC_SHUTDOWN_GRACE": "5s",
}
_ENDED = [state.value for state in JobState if state.terminal]


class Service:
    """Makes the schema, starts what is asked for, and leaves nothing running when it is closed.

    Settings of a process are given without their prefix: `worker(concurrency="8")`.
    """

    def __init__(self, database_url: str, broker_url: str, directory: Path, **common: str) -> None:
        self.database_url = database_url
        self.database = Database(database_url, pool_size=4)
        migrating.migrate(self.database)
        self.broker = Rabbit(broker_url)
        self.directory = directory
        self.servers: list[Process] = []
        self.workers: list[Process] = []
        self._channels: list[grpc.Channel] = []
        self._settings = {
            **SETTINGS,
            "JOBSVC_DATABASE_URL": database_url,
            "JOBSVC_BROKER_URL": broker_url,
            **_named(common),
        }

    # Processes.

    def start(self, servers: int = 1, workers: int = 1, **settings: str) -> None:
        """Starts them side by side and waits until all are ready."""
        started = [self._spawn("server", self.servers, settings) for _ in range(servers)]
        started += [self._spawn("worker", self.workers, settings) for _ in range(workers)]
        for process in started:
            process.wait_ready()

    def server(self, **settings: str) -> Process:
        process = self._spawn("server", self.servers, settings)
        process.wait_ready()
        return process

    def spawn_server(self, **settings: str) -> Process:
        """One that may not come to be ready."""
        return self._spawn("server", self.servers, settings)

    def worker(self, **settings: str) -> Process:
        process = self._spawn("worker", self.workers, settings)
        process.wait_ready()
        return process

    def _spawn(self, kind: str, others: list[Process], settings: Mapping[str, str]) -> Process:
        name = f"{kind}{len(others) + 1}"
        process = Process(name, [kind], {**self._settings, **_named(settings)}, self.directory)
        others.append(process)
        return process

    @property
    def addresses(self) -> list[str]:
        """Of every server that was started."""
        return [str(server.wait_ready()["address"]) for server in self.servers]

    def channel(self) -> grpc.Channel:
        """Goes to any server that answers. Stays the service's to close."""
        options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        channel = grpc.insecure_channel(f"ipv4:{','.join(self.addresses)}", options=options)
        self._channels.append(channel)
        return channel

    def client(self, **options: Any) -> Client:
        return Client(channel=self.channel(), **options)

    def log_text(self) -> str:
        """All that any process has written."""
        processes = (*self.servers, *self.workers)
        paths = [path for p in processes for path in (p.log_path, p.out_path)]
        return "".join(path.read_text(errors="replace") for path in paths)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for process in (*self.workers, *self.servers):
            process.close()
        self.database.close()

    # What is stored.

    def count(self, *where: sa.ColumnElement[bool]) -> int:
        """Of jobs."""
        statement = sa.select(sa.func.count()).select_from(jobs).where(*where)
        return int(self.database.read(lambda c: c.execute(statement).scalar_one()))

    def running(self, worker_id: str | None = None) -> int:
        """Jobs that run, at that worker or at any."""
        where = [jobs.c.state == JobState.RUNNING]
        return self.count(*where, *([jobs.c.worker_id == worker_id] if worker_id else []))

    def owed(self) -> int:
        statement = sa.select(sa.func.count()).select_from(outbox)
        return int(self.database.read(lambda c: c.execute(statement).scalar_one()))

    def events(self, *where: sa.ColumnElement[bool]) -> Sequence[Any]:
        statement = (
            sa.select(job_events).where(*where).order_by(job_events.c.job_id, job_events.c.sequence)
        )
        return self.database.read(lambda c: c.execute(statement).all())

    def history(self, job_id: str) -> list[str]:
        """The types of its events."""
        return [event.type for event in self.events(job_events.c.job_id == job_id)]

    def errors(self, kind: str) -> list[Any]:
        """The events of failed attempts with an error of that type."""
        failed = self.events(job_events.c.type == EventType.ATTEMPT_FAILED)
        return [event for event in failed if event.detail["error"]["type"] == kind]

    def results(self) -> dict[str, Value]:
        """By idempotency key: what the jobs that SUCCEEDED ended with."""
        statement = sa.select(jobs.c.idempotency_key, jobs.c.result).where(
            jobs.c.state == JobState.SUCCEEDED, jobs.c.idempotency_key.is_not(None)
        )
        rows = self.database.read(lambda c: c.execute(statement).all())
        return {row.idempotency_key: Value.FromString(row.result) for row in rows}

    # The end of a test.

    def wait_ended(self, count: int, seconds: float) -> None:
        """Until there are so many jobs and all have ended."""

        def ended() -> bool:
            running = self.count(jobs.c.state.not_in(_ENDED))
            return not running and self.count() >= count

        try:
            until(ended, seconds, f"{count} jobs have ended")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._standing()}") from None

    def wait_idle(self, seconds: float = 20.0, queues: Collection[str] = ("default",)) -> None:
        """Until no message is owed, and none is left in the queues."""
        until(lambda: self.owed() == 0, seconds, "the outbox is empty")
        for queue in queues:
            self._wait_empty(f"jobs.q.{queue}", seconds)

    def _wait_empty(self, queue: str, seconds: float) -> None:
        until(lambda: self.broker.depth(queue) == 0, seconds, f"{queue} is empty")

    def check(self, acknowledged: Collection[str], jobs_min: int) -> Report:
        """The last step of every test: all has ended, and every history is legal."""
        return check(
            self.database,
            acknowledged=acknowledged,
            all_ended=True,
            outbox_empty=True,
            jobs_min=jobs_min,
        )

    def _standing(self) -> str:
        """For the message of a failure."""
        states = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        rows = self.database.read(lambda c: c.execute(states).all())
        tails = [process.tail() for process in (*self.servers, *self.workers)]
        return "\n".join([f"jobs: {dict(map(tuple, rows))}, owed: {self.owed()}", *tails])


def _named(settings: Mapping[str, str]) -> dict[str, str]:
    return {f"JOBSVC_{name.upper()}": value for name, value in settings.items()}
