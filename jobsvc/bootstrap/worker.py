"""The worker process."""

from __future__ import annotations

import threading

from jobsvc import telemetry, tracing
from jobsvc.bootstrap.probes import serve_probes
from jobsvc.bootstrap.signals import on_stop
from jobsvc.broker.topology import Broker
from jobsvc.errors import CannotStart
from jobsvc.outbox import Outbox
from jobsvc.settings import Settings
from jobsvc.store import schema
from jobsvc.store.database import Database
from worker.pool import HandlersError
from worker.runtime.worker import Worker

# Claim, record, lease, outbox and consumer threads have one each.
CONNECTIONS = 6


def run(settings: Settings) -> int:
    """Works until SIGTERM or SIGINT; answers the exit code. Raises CannotStart and
    DatabaseUnavailable."""
    telemetry.configure(settings)
    tracing.configure("worker")
    stop = threading.Event()
    on_stop(stop.set)
    database = Database(settings.database_url, pool_size=CONNECTIONS, prepare=settings.prepare)
    try:
        schema.require(database)
        broker = Broker(
            settings.broker_url,
            settings.queue_type,
            settings.broker_ca,
            database.read(schema.service_id),
        )
        outbox = Outbox(database, broker)
        worker = Worker(settings, database, broker, outbox)
        probes = serve_probes(settings, database, lambda: worker.ready)
        start_worker(worker)
        outbox.start()
        log = telemetry.get_logger("jobsvc")
        while not worker.wait_consuming(0.2) and not stop.is_set():
            pass
        if not stop.is_set():
            log.info("ready", worker_id=worker.worker_id)
        stop.wait()
        log.info("stopping")
        worker.stop(settings.shutdown_grace)
        outbox.stop()
        if probes is not None:
            probes.close()
    finally:
        database.close()
    return 0


def start_worker(worker: Worker) -> None:
    """Raises CannotStart where the handlers cannot be loaded."""
    try:
        worker.start()
    except HandlersError as error:
        raise CannotStart(str(error)) from error
