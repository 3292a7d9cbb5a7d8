"""The whole service in one process: SQLite and Kombu's memory transport, the same code paths."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvloop

from jobsvc import telemetry, tracing
from jobsvc.bootstrap.server import DATABASE_THREADS, OTHER_CONNECTIONS, serve
from jobsvc.bootstrap.worker import start_worker
from jobsvc.broker.topology import Broker
from jobsvc.errors import CannotStart
from jobsvc.outbox import Outbox
from jobsvc.settings import Settings
from jobsvc.store import migrating, registry, verbs
from jobsvc.store.database import Database
from jobsvc.store.dialects.engines import sqlite_url
from worker.runtime.worker import Worker

DEMO = "worker.handlers.demo"
DEFAULT_ADDRESS = "127.0.0.1:50051"
REAP_LIMIT = 500
START_SECONDS = 10.0


def run(settings: Settings, data_dir: Path) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit code. Raises CannotStart."""
    telemetry.configure(settings)
    tracing.configure("dev")
    data_dir.mkdir(parents=True, exist_ok=True)
    handlers = tuple(dict.fromkeys((*settings.handlers, DEMO)))
    settings = settings.model_copy(update={"handlers": handlers, "processes": 1})
    with _locked(data_dir):
        url = sqlite_url((data_dir / "jobsvc.db").resolve())
        database = Database(url, pool_size=DATABASE_THREADS + OTHER_CONNECTIONS)
        try:
            migrating.migrate(database)
            _reap_predecessors(database)
            uvloop.run(_serve(settings, database, data_dir))
        finally:
            database.close()
    return 0


async def _serve(settings: Settings, database: Database, data_dir: Path) -> None:
    broker = Broker("memory://")
    workers: list[Worker] = []

    def start(outbox: Outbox, address: str) -> None:
        mail = data_dir.resolve() / "mail"
        worker = Worker(settings, database, broker, outbox, {"JOBSVC_MAIL_DIR": str(mail)})
        start_worker(worker)
        workers.append(worker)
        worker.wait_consuming(START_SECONDS)
        print(_line_to_paste(address), flush=True)  # noqa: T201 - what the command is for

    def stop() -> None:
        for worker in workers:
            worker.stop(settings.shutdown_grace)

    await serve(settings, database, broker, on_start=start, on_stopping=stop)


def _line_to_paste(address: str) -> str:
    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    command = shlex.quote(sys.argv[0])
    return f"""{command} submit demo.sleep '{{"seconds": 3, "steps": 10}}' --watch{where}"""


def _reap_predecessors(database: Database) -> None:
    """Whoever worked here before is gone: the lock is ours. Their jobs need not wait for their
    leases to run out; what was on the broker is dispatched anew because the broker is new."""
    log = telemetry.get_logger("jobsvc")
    gone = database.read(registry.worker_ids)
    count = REAP_LIMIT if gone else 0
    while count == REAP_LIMIT:
        count, effects = database.write(lambda tx: verbs.reap_workers(tx, gone, REAP_LIMIT))
        for dead in effects.failed:
            log.error("job failed", **dead.told())
    for worker_id in gone:
        database.write(partial(registry.retire, worker_id=worker_id))


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    with (data_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CannotStart(
                f"{data_dir} is in use by process {file.read().strip() or 'unknown'}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
