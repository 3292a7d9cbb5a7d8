"""What a server offers, put together."""

from __future__ import annotations

from dataclasses import dataclass

from jobsvc.outbox import Outbox
from jobsvc.services.bulk import Bulk
from jobsvc.services.fleet import Fleet
from jobsvc.services.jobs import Jobs
from jobsvc.services.lists import Lists
from jobsvc.services.operations import Operations
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
    fleet: Fleet
    jobs: Jobs
    lists: Lists
    bulk: Bulk
    schedules: Schedules
    operations: Operations


def assemble(
    database: Database, threads: AsyncDatabase, outbox: Outbox, hub: WatchHub, fleet: Fleet
) -> Services:
    """Reads who the database is, and so blocks for a moment. Raises DatabaseUnavailable."""
    return Services(
        identity=database.read(schema.identity),
        hub=hub,
        fleet=fleet,
        jobs=Jobs(database, threads, outbox, hub),
        lists=Lists(database, threads),
        bulk=Bulk(database, threads, outbox),
        schedules=Schedules(threads, outbox),
        operations=Operations(threads, outbox),
    )
