"""The worker: its parts in the order in which they start, and stop."""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence

from jobsvc import __version__, telemetry
from jobsvc.broker.topology import Broker
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import WorkerInfo
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.settings import Settings
from jobsvc.store import queues, registry
from jobsvc.store.database import Database
from worker.child import logs
from worker.pool import ChildLimits, make_pool
from worker.runtime.attempts import Attempts
from worker.runtime.claiming import Claiming
from worker.runtime.consumer import Consumer
from worker.runtime.inbox import Inbox
from worker.runtime.keeping import AttemptKeeper
from worker.runtime.lease import LeaseThread
from worker.runtime.prefetch import PREFETCH_MAX, Prefetch
from worker.runtime.recording import Recording

# What a worker on Kombu's memory transport may hold: all there is.
MEMORY_PREFETCH = 1_000_000


class DatabaseQueues:
    """Implements the consumer's Queues."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def generations(self, names: Sequence[str]) -> Mapping[str, int]:
        self._database.write(lambda tx: queues.add_queues(tx, names))
        known = self._database.read(queues.generations)
        return {name: known[name] for name in names}

    def leave_behind(self, name: str, broken: int) -> None:
        self._database.write(lambda tx: queues.next_generation(tx, name, broken))


class Worker:
    """Runs in threads of its own beside whatever else the process does."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        broker: Broker,
        outbox: Outbox,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is added to what handlers see in theirs."""
        # New at each start: a name that is used again would hide the jobs of the dead.
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._settings = settings
        self._database = database
        self._log = telemetry.get_logger("worker")
        self._types: list[JobTypeInfo] = []
        self._announced: frozenset[str] = frozenset()
        alone = broker.memory  # Kombu's memory transport reaches no other process
        self._held_max = MEMORY_PREFETCH if alone else max(PREFETCH_MAX, settings.concurrency)
        claimable, beat = threading.Event(), threading.Event()
        attempts = Attempts(claimable, beat)
        inbox = Inbox(claimable, attempts, redelivered=not alone)
        self._consumer = Consumer(
            broker, settings.queues, inbox, DatabaseQueues(database), settings.concurrency
        )
        self._recording = Recording(
            database,
            outbox,
            attempts,
            self._consumer,
            worker_id=self.worker_id,
            concurrency=settings.concurrency,
        )
        self._pool = make_pool(
            settings.isolation,
            settings.concurrency,
            settings.handlers,
            self._recording,
            {**(environment or {}), logs.VARIABLE: f"{settings.log_format}:{settings.log_level}"},
            ChildLimits(
                jobs=settings.child_jobs,
                age_seconds=settings.child_age or math.inf,
                memory_bytes=settings.child_memory,
                memory_limit_bytes=settings.child_memory_limit,
            ),
        )
        prefetch = None
        if not alone:
            prefetch = Prefetch(
                self._consumer, self._pool, attempts, concurrency=settings.concurrency
            )
        self._claiming = Claiming(
            database,
            outbox,
            inbox,
            attempts,
            self._consumer,
            self._pool,
            self._recording,
            prefetch,
            claimable,
            worker_id=self.worker_id,
            lease_seconds=settings.lease,
        )
        self._lease = LeaseThread(
            database,
            self.worker_id,
            AttemptKeeper(
                attempts, inbox, self._pool, self._consumer, prefetch, worker_id=self.worker_id
            ),
            self._announce,
            beat,
            lease_seconds=settings.lease,
            heartbeat_seconds=settings.heartbeat,
            outdated=lambda: self._pool.job_types != self._announced,
        )

    def start(self) -> None:
        """Returns when it is announced and about to consume. Raises HandlersError, and
        DatabaseUnavailable; it is stopped then."""
        self._types = self._pool.start()
        try:
            self._announce()
        except BaseException:
            self._pool.stop(0)
            raise
        self._recording.start()
        self._claiming.start()
        self._lease.start()
        self._consumer.start()
        types = sorted(self._pool.job_types)
        self._log.info("worker started", worker_id=self.worker_id, job_types=types)

    @property
    def ready(self) -> bool:
        """Whether it does its work: it consumes, reached the database when it last asked, and can
        run handlers."""
        return self._consumer.consuming and self._lease.reached and not self._pool.broken

    def wait_consuming(self, seconds: float) -> bool:
        return self._consumer.wait_consuming(seconds)

    def stop(self, grace_seconds: float) -> None:
        """Takes no more, lets what runs end within the grace, puts the rest back into the queue,
        records every outcome, and only then lets go of the broker."""
        self._consumer.set_prefetch(0)
        self._claiming.stop()
        self._pool.stop(grace_seconds)
        self._recording.stop()
        self._lease.stop()
        self._consumer.stop()
        try:
            self._database.write(lambda tx: registry.retire(tx, self.worker_id))
        except DatabaseUnavailable as error:  # it will be taken for dead instead
            self._log.warning("cannot retire", reason=error.explained)
        self._log.info("worker stopped", worker_id=self.worker_id)

    def hurry(self) -> None:
        """From a signal handler's thread: end the grace of a `stop` that is under way."""
        self._pool.stop(0)

    def _announce(self) -> None:
        """What it can run, which may be nothing for a while: jobs are told to wait for a worker."""
        runnable = self._pool.job_types
        worker = WorkerInfo(
            worker_id=self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues=tuple(self._settings.queues),
            job_types=tuple(sorted(runnable)),
            concurrency=self._settings.concurrency,
            prefetch=self._held_max,
        )
        types = self._types if runnable else []
        self._database.write(lambda tx: registry.announce(tx, worker, types))
        self._announced = runnable
