"""What a server offers, put together."""

from __future__ import annotations

from dataclasses import dataclass

from jobsvc.outbox import Outbox
from jobsvc.services.jobs import Jobs
from jobsvc.services.schedules import Schedules
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from jobsvc.store import schema
from jobsvc.store.database import Database
from jobsvc.store.schema import Identity


@dataclass(frozen=True, slots=True)
class Services:
    """All belong to one event loop."""

    identity: Identity
    hub: WatchHub
    jobs: Jobs
    schedules: Schedules


def assemble(database: Database, threads: AsyncDatabase, outbox: Outbox, hub: WatchHub) -> Services:
    """Reads who the database is, and so blocks for a moment. Raises DatabaseUnavailable."""
    return Services(
        identity=database.read(schema.identity),
        hub=hub,
        jobs=Jobs(database, threads, outbox, hub),
        schedules=Schedules(threads, outbox),
    )
