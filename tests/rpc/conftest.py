"""A gRPC server over the real services on SQLite, and channels to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from generated.jobsvc.v1 import job_service_pb2_grpc
from jobsvc.broker.topology import Broker
from jobsvc.core.attempts import Claimed, Ending, JobTypeInfo, Report
from jobsvc.core.model import Effects
from jobsvc.outbox import Outbox
from jobsvc.rpc.access import Access
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.rpc.server import Server
from jobsvc.services.assembly import assemble
from jobsvc.services.fleet import Fleet
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from tests.store.conftest import open_database, sqlite_url
from tests.store.house import House, worker

SWEEP_SECONDS = 0.2
THREADS = 4


@dataclass(frozen=True)
class World:
    """A server, a client's stub, and the worker's side of the store."""

    server: Server
    boundary: CallBoundary
    hub: WatchHub
    fleet: Fleet
    house: House
    threads: AsyncDatabase
    channel: grpc.aio.Channel
    stub: Any

    async def start(self, job_id: str) -> Claimed:
        """An attempt of the job begins."""
        claimed: Claimed = await self._tell(self.house.claim, job_id)
        return claimed

    async def report(self, claimed: Claimed, *entries: Report) -> None:
        assert await self._tell(self.house.report, claimed, *entries)

    async def finish(self, claimed: Claimed, ending: Ending) -> None:
        assert await self._tell(self.house.finish, claimed, ending)

    async def announce(self, *types: JobTypeInfo) -> None:
        names = tuple(each.name for each in types)
        await self.threads.run(self.house.announce, worker(job_types=names), *types)

    async def _tell(self, verb: Any, *arguments: Any) -> Any:
        def run() -> tuple[Any, Effects]:
            answer = verb(*arguments)
            return answer, self.house.effects

        answer, effects = await self.threads.run(run)
        self.hub.notify(effects.changes)
        self.fleet.notify()
        return answer


@pytest.fixture
def boundary() -> CallBoundary:
    """A module replaces it to have other limits."""
    return CallBoundary(Access(None))


@pytest.fixture
async def world(tmp_path: Path, boundary: CallBoundary) -> AsyncIterator[World]:
    async with running_world(tmp_path, boundary) as running:
        yield running


@asynccontextmanager
async def running_world(
    directory: Path, boundary: CallBoundary, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[World]:
    """With credentials its channel, which knows no TLS, is of no use."""
    database = open_database(sqlite_url(directory))
    threads = AsyncDatabase(database, THREADS)
    hub = WatchHub(threads, SWEEP_SECONDS)
    fleet = Fleet(database, threads, SWEEP_SECONDS, timedelta(hours=24))
    # Its thread is not started: what is owed to the broker is of no concern here.
    outbox = Outbox(database, Broker("memory://rpc-tests"), on_changes=hub.notify)
    services = assemble(database, threads, outbox, hub, fleet)
    server = Server("127.0.0.1:0", services, boundary, credentials)
    hub.start()
    fleet.start()
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        yield World(server, boundary, hub, fleet, House(database), threads, channel, stub)
    await server.stop(grace_seconds=5)
    await hub.stop()
    await fleet.stop()
    threads.close()
    database.close()
